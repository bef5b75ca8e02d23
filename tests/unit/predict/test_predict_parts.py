"""Pool, prompts, empirical Bayes, tools, text, tables, trees: each against its docstring."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from verl_heddle.predict.bayes import Belief, Evidence, Pool, believe, remaining
from verl_heddle.predict.features import NAMES
from verl_heddle.predict.fit import fit
from verl_heddle.predict.live import GROUP_COLUMNS, OWN_COLUMNS
from verl_heddle.predict.model import MANY, Forest
from verl_heddle.predict.prompts import Prompts, TextModel, hashed
from verl_heddle.predict.quantities import ODDS_UPPER, Estimate
from verl_heddle.predict.tools import MAX_PARALLEL, Tools, names
from verl_heddle.predict.window import EMPTY, Batch, Window, looked_at, rows_of

logs = st.floats(-2, 12)


@given(st.lists(logs, min_size=1, max_size=50))
def test_pool_mean_stays_among_what_it_saw(values):
    pool = Pool()
    for value in values:
        pool.observe(np.full(3, value), 0, None)
    low, high = min([*values, np.log(1.0)]), max([*values, np.log(1000.0)])
    assert (pool.mean >= low - 1e-9).all() and (pool.mean <= high + 1e-9).all()
    assert (pool.within > 0).all() and (pool.between > 0).all()
    again = Pool.restore(pool.state())
    assert (again.mean == pool.mean).all() and (again.ratio == pool.ratio).all() and (again.step_mean(0) == pool.step_mean(0)).all()


def test_pool_finds_the_two_variances():
    rng, pool = np.random.default_rng(0), Pool()
    for number in range(500):
        usual, seen = rng.normal(7, 0.8), []
        for _ in range(8):
            value = np.full(3, rng.normal(usual, 0.4))
            inside = (value - np.mean(seen)) ** 2 * len(seen) / (len(seen) + 1) if seen else None
            pool.observe(value, number // 50, inside)
            seen.append(value[0])
    assert pool.within[0] == pytest.approx(0.16, rel=0.15) and pool.between[0] == pytest.approx(0.64, rel=0.25)


def _evidence(history=0.0, history_count=0.0, finished=0, finished_mean=0.0, running=0, running_mean=0.0):
    one = np.ones((3, 1))
    return Evidence(
        np.zeros(1),
        np.array([history_count]),
        one * history,
        np.array([float(finished)]),
        one * finished * finished_mean,
        np.array([float(running)]),
        one * running * running_mean,
    )


@given(st.floats(-2, 2), st.integers(1, 30), st.integers(1, 30))
def test_more_history_shrinks_less(history, few, more):
    pool = Pool()
    few, more = sorted((few, few + more))
    little, much = (believe(pool, _evidence(history, count)) for count in (few, more))
    assert (np.abs(little.middle[:, 0] - pool.mean) <= np.abs(much.middle[:, 0] - pool.mean) + 1e-9).all()
    assert (np.abs(much.middle[:, 0] - pool.mean) <= abs(history) + 1e-9).all()
    assert (much.scale <= little.scale + 1e-12).all()


@given(st.integers(1, 20), st.floats(-5, 10))
def test_running_siblings_never_shorten_the_estimate_below_the_pool(running, mean):
    pool = Pool()
    assert (believe(pool, _evidence(running=running, running_mean=mean)).middle[:, 0] >= pool.mean - 1e-9).all()


@given(st.floats(0, 10), st.floats(0.05, 2), st.floats(0, 1e6))
def test_remaining_is_the_conditional_median(middle, scale, done):
    belief = Belief(np.full((3, 1), middle), np.full((3, 1), scale), np.zeros((3, 1)))
    left, spread = remaining(belief, np.full((3, 1), done))
    assert np.isfinite(left).all() and (spread > 0).all()
    assume(done > 1e-3 and abs(np.log(done) - middle) < 20 * scale and left[0, 0] > 0.01)

    def survives(size):
        return 1 / (1 + np.exp((np.log(size) - middle) / scale))

    assert survives(done + np.exp(left[0, 0])) / survives(done) == pytest.approx(0.5, rel=1e-3)


@given(st.lists(st.tuples(st.integers(0, 3), st.floats(-2, 2)), min_size=1, max_size=40))
def test_prompt_history_is_bounded_by_what_was_seen(seen):
    pool, prompts = Pool(), Prompts()
    for step, value in sorted(seen):
        prompts.observe("p", step, pool.mean + value, pool)
    history = prompts.look_up("p", pool)
    values = [value for _, value in seen]
    assert min(values) - 1e-9 <= history.deviation[0] <= max(values) + 1e-9
    assert 0 < history.samples <= 32 + 40 and history.spread >= 0
    again = Prompts.restore(*prompts.state()).look_up("p", pool)
    assert again.samples == history.samples and (again.deviation == history.deviation).all()
    assert prompts.look_up("q", pool).samples == 0


def test_tool_names_speak_after_some_calls():
    tools = Tools(0.0)
    assert names("a+b") == ("a", "b") and names(None) == () and len(names("+".join("x" * 50))) == MAX_PARALLEL
    for _ in range(200):
        tools.took(("pip",), 3.0)
        tools.took(("ls",), -4.0)
        tools.led_to(("submit",), -2.0)
        tools.led_to(("edit",), 0.0)
    assert tools.says(("pip", "ls"))[0] > 2.5 and tools.says(("ls",))[0] < -3
    assert (
        tools.says(("submit",))[1] < -0.8 < 0.8 < tools.says(("edit",))[1]
        and abs(tools.says(("never",))[1]) < 1e-9
        and tools.says(())[1] == 0
    )
    again = Tools.restore(tools.state())
    assert again.says(("pip",)) == tools.says(("pip",)) and again.says(("never",)) == tools.says(("never",))


@given(st.text(max_size=200))
def test_any_text_is_hashed_to_length_one(text):
    words = hashed(text)
    assert len(words.buckets) == len(words.weights)
    assert not len(words.weights) or np.linalg.norm(words.weights) <= 1 + 1e-9
    model = TextModel()
    model.observe(words, 1.0)
    assert 0 <= model.deviation(words) <= 0.05 + 1e-9


def test_looks_get_sparse():
    assert [turn for turn in range(70) if looked_at(turn)] == [0, 1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 48, 64]


@given(st.lists(st.integers(1, 5), max_size=60))
def test_window_keeps_the_newest_rows(sizes):
    window, wrote = Window(rows=20), []
    for number, size in enumerate(sizes):
        state = np.full((size, OWN_COLUMNS + GROUP_COLUMNS), number, dtype=np.float32)
        window.add(Batch(state, np.ones((size, 3), np.float32), np.ones((size, 3), np.float32), np.zeros(size, np.uint32)))
        wrote += [number] * size
    assert window.copy().state[:, 0].tolist() == wrote[-20:] and len(window) == min(20, len(wrote))


def test_nothing_left_teaches_nothing():
    assert rows_of("p", [], (1.0, 1.0, 0.0), False) is EMPTY


def _features(rows: int, seed: int):
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(rows, len(NAMES))).astype(np.float32)
    left = np.exp(features[:, :3] + features[:, 8:11] + 0.2 * rng.normal(size=(rows, 3))).astype(np.float32)
    return features, Batch(features, left, left, rng.integers(0, 60, rows).astype(np.uint32))


def test_trees_in_numpy_and_in_xgboost_agree():
    model, (rows, _) = fit(*_features(1500, 0)), _features(MANY + 30, 1)
    assert model is not None
    assert Forest(model.trees).sums(rows) == pytest.approx(model._xgboost(rows), abs=1e-4)
    assert np.array(model.remaining(rows[:5])[0]) == pytest.approx(model.remaining(rows)[0][:5], abs=1e-4)


def test_scale_of_an_estimate_is_that_of_its_quantiles():
    estimate = Estimate(100.0, 100.0 * np.exp(0.7 * ODDS_UPPER), 1.0, 0.0)
    assert estimate.scale == pytest.approx(0.7)
