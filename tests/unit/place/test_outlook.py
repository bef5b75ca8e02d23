"""Seconds per token, expected drain times, and plans on distributions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_heddle.fleet import Replica
from verl_heddle.latency import LatencyModel, load
from verl_heddle.place.books import Books
from verl_heddle.place.cost import Cost, price, work
from verl_heddle.place.outlook import GRID, curves, drain_s
from verl_heddle.place.pace import Habit, Tempo, degree, pace
from verl_heddle.place.robust import plan
from verl_heddle.simulate import EngineOptions, simulate
from verl_heddle.simulate.baselines import Stock
from verl_heddle.trajectory import Trajectory, Turn

AFFINE = LatencyModel.affine(0.01, 0.0005, prefill_per_token_s=1e-5, tps=(1, 2), speedup={2: 1.6})
ALONE = Habit(1000.0, 1.0, 500.0, 0.0)


def tempo(tp: int = 1, habit: Habit = ALONE, kv: int | None = None, slots: int = 512) -> Tempo:
    return Tempo(AFFINE, Replica("r", tp, slots, kv), GRID, 256, habit)


@given(
    st.integers(1, 300),
    st.one_of(st.none(), st.integers(2_000, 400_000)),
    st.builds(Habit, st.floats(1, 5e4), st.floats(1, 3), st.floats(1, 4000), st.floats(0, 0.5)),
)
@settings(max_examples=60, deadline=None)
def test_more_together_are_never_faster_and_never_faster_than_alone(slots, kv, habit):
    latency = load("H200", "Qwen3-8B")
    tau = pace(latency, Replica("r", 1, slots, kv), np.arange(1.0, 301), habit.context_tokens, habit)
    assert np.all(np.diff(tau) >= 0) and np.all(np.isfinite(tau))
    assert tau[0] >= float(latency.decode_s(1, 1, habit.context_tokens)) + habit.tool_s - 1e-12


def test_slots_make_the_rest_wait_and_tools_make_room():
    few = pace(AFFINE, Replica("r", 1, 10), np.array([10.0, 20.0, 40.0]), 1000.0, ALONE)
    assert few[1] / few[0] == pytest.approx(2) and few[2] / few[0] == pytest.approx(4)
    busy = pace(AFFINE, Replica("r", 1, 10), np.array([20.0]), 1000.0, ALONE._replace(tool_s=0.02))
    assert busy[0] < 2 * few[0] + 0.02 - 1e-3  # half of them are in tools, so nearly nobody waits


def test_a_crowd_beyond_the_kv_cache_reads_its_contexts_again():
    roomy = pace(AFFINE, Replica("r", 1, 512), np.array([100.0]), 1000.0, ALONE)
    tight = pace(AFFINE, Replica("r", 1, 512, 50_000), np.array([50.0, 100.0]), 1000.0, ALONE)
    again_s = 1000 * 1e-5 / 500  # a context per turn of 500 tokens
    assert tight[1] == pytest.approx(2 * (0.01 + 50 * (0.0005 + again_s)), rel=0.02)
    assert tight[1] > roomy[0] and tight[0] == pytest.approx(0.01 + 50 * 0.0005, rel=1e-3)


@pytest.mark.parametrize("slots", [8, 64])
@pytest.mark.parametrize("crowd", [15, 19, 22, 30])
def test_a_crowd_is_as_slow_as_in_the_simulated_engine(crowd, slots):
    """20 long contexts fit; the contexts grow little, so the crowd is in one state from the first turn to the last."""
    replica, prompt, turns, output = Replica("r", 1, slots, 84_000), 4000, 8, 50
    items = [Trajectory("s", "w", f"p{i}", 0, prompt, (Turn(0, output),) * turns) for i in range(crowd)]
    model = LatencyModel.affine(0.01, 0.0005, prefill_per_token_s=1e-5)
    made = simulate(items, [replica], model, Stock(0), engine=EngineOptions(block_tokens=1)).makespan_s
    habit = Habit(prompt + turns * output / 2, 1.0, output, 0.0)
    first_s = crowd * prompt * 1e-5
    per_token = float(pace(model, replica, np.array([float(crowd)]), habit.context_tokens, habit)[0])
    assert first_s + per_token * turns * output == pytest.approx(made, rel=0.1)


@pytest.mark.parametrize("scale", [0.05, 0.3, 0.6])
def test_expected_drain_is_the_mean_over_sampled_scenarios(scale):
    """Exact for affine times up to the grid; sampled with 4,000 scenarios."""
    rng = np.random.default_rng(1)
    medians = np.exp(rng.normal(8, 0.7, 30))
    uniform = rng.random((4000, 30))
    lengths = np.minimum(medians * (uniform / (1 - uniform)) ** scale, 40_960)
    falling = -np.sort(-lengths, axis=1)
    steps = np.diff(0.01 + 0.0005 * np.arange(1, 31), prepend=0.0)
    sampled = (falling @ steps).mean()
    assert drain_s(curves(medians, scale, 40_960).sum(axis=0), tempo()) == pytest.approx(sampled, rel=0.03)


@pytest.mark.parametrize("scale", [0.1, 0.5])
def test_expected_makespan_is_the_mean_over_sampled_scenarios(scale):
    """Of three replicas; the speed is taken at its mean, which costs a few percent."""
    rng = np.random.default_rng(2)
    groups = [np.exp(rng.normal(8, 0.7, size)) for size in (3, 12, 25)]
    books = Books(AFFINE)
    for name in ("a", "b", "c"):
        books.add(Replica(name, 1, 512))
    books.tune(256, ALONE)
    steps = np.diff(0.01 + 0.0005 * np.arange(1, 26), prepend=0.0)
    drains = []
    for medians in groups:
        uniform = rng.random((4000, len(medians)))
        lengths = np.minimum(medians * (uniform / (1 - uniform)) ** scale, 40_960)
        drains.append(-np.sort(-lengths, axis=1) @ steps[: len(medians)])
    sums = np.stack([curves(medians, scale, 40_960).sum(axis=0) for medians in groups])
    assert books.makespan_of(sums, np.zeros(3)) == pytest.approx(np.max(drains, axis=0).mean(), rel=0.06)


def test_splitting_two_of_unknown_length_shortens_the_replica_and_hardly_the_step():
    books = Books(AFFINE)
    for name in ("a", "b"):
        books.add(Replica(name))
    books.tune(8, ALONE)
    for key in ("k", "l"):
        books.put(key, "a", curves(5000.0, 0.5, 40_960))
    stay, (moved,) = books.makespans_moved("k", np.zeros(2), np.array([1]))
    drains = books.drains()
    books.put("k", "b", curves(5000.0, 0.5, 40_960))
    assert books.drains().max() < 0.85 * drains[0]
    assert 0.9 * stay < moved < stay
    late = books.makespans_moved("k", np.full(2, 20.0), np.array([0]))[1][0]
    assert late > books.makespans_moved("k", np.zeros(2), np.array([0]))[1][0]


def test_a_known_group_drains_as_its_staircase():
    tokens = np.array([20_000.0, 9_000, 4_000, 4_000, 100])
    exact = price(work(tokens), range(5), degree(AFFINE, Replica("r"), 5, ALONE), Cost.STAIRCASE)
    assert drain_s(curves(tokens, 0.0).sum(axis=0), tempo()) == pytest.approx(exact, rel=0.05)


@given(st.lists(st.floats(1, 1e5), min_size=1, max_size=30), st.floats(0, 1.5), st.integers(0, 29))
@settings(max_examples=60, deadline=None)
def test_one_member_less_never_costs_more(tokens, scale, number):
    rows = curves(tokens, scale, 1e5)
    one = tempo()
    assert drain_s(rows.sum(axis=0) - rows[number % len(tokens)], one) <= drain_s(rows.sum(axis=0), one) * (1 + 1e-9) + 1e-9
    assert drain_s(np.zeros((2, len(GRID))), one) == 0.0


def test_a_plan_that_knows_nothing_splits_evenly():
    medians = np.full(120, 5000.0)
    found = plan(medians, curves(medians, 0.5, 40_960), {1: tempo()}, layout=(1,) * 4)
    assert {len(group) for group in found.groups} <= {29, 30, 31}


def test_a_plan_that_knows_isolates_the_longest():
    medians = np.sort(np.exp(np.random.default_rng(0).normal(8, 1, 200)))[::-1]
    known = plan(medians, curves(medians, 0.02), {1: tempo()}, layout=(1,) * 4)
    guess = plan(medians, curves(medians, 0.6), {1: tempo()}, layout=(1,) * 4)
    sizes = [len(group) for group in known.groups]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1] / 4
    assert sorted(i for group in known.groups for i in group) == list(range(200))
    assert len(guess.groups[0]) > sizes[0]  # who may be wrong keeps company


def test_layouts_are_chosen_and_respected():
    medians = np.exp(np.random.default_rng(0).normal(8, 1, 60))
    tempos = {1: tempo(1), 2: tempo(2)}
    free = plan(medians, curves(medians, 0.3), tempos, gpus=5)
    assert sum(free.layout) == 5
    given_ = plan(medians, curves(medians, 0.3), tempos, layout=(1, 2, 1, 1))
    assert given_.layout == (1, 2, 1, 1)
    assert free.forecast_s <= given_.forecast_s * 1.01
    with pytest.raises(ValueError, match="either gpus or a layout"):
        plan(medians, curves(medians, 0.3), tempos)
    with pytest.raises(ValueError, match="no times"):
        plan(medians, curves(medians, 0.3), tempos, layout=(4,))


def test_bad_habits_are_refused():
    with pytest.raises(ValueError, match="habit"):
        pace(AFFINE, Replica("r"), np.ones(1), 1.0, ALONE._replace(turn_tokens=0.0))
