"""The predictor as a whole: cold start, learning, determinism, bounded memory, what teaches and what does not."""

import subprocess
import sys
from random import Random

import numpy as np
import pytest
from play import FINISHED, Run, rollouts

from verl_heddle.predict import live, predictor
from verl_heddle.predict.quantities import UPPER
from verl_heddle.trajectory import Outcome


def test_first_step_is_sane_without_any_history():
    run = Run()
    run.start("a", prompt_tokens=300)
    cold = run.predict("a")
    assert 100 < cold.median_tokens < 10_000
    assert cold.median_tokens < cold.upper_tokens < 100_000
    assert cold.turns >= 1 and cold.tool_s > 0
    assert run.predictor.predict("nobody") is None


def test_what_outlived_its_estimate_still_goes_on():
    run = Run()
    run.start("a")
    for _ in range(20):
        run.turn("a", 50_000)
    estimate = run.predict("a")
    assert 1 <= estimate.median_tokens < estimate.upper_tokens < np.inf


def test_finished_siblings_teach_at_once():
    run = Run()
    for prompt, tokens in (("long", 20_000), ("short", 200)):
        for sample in range(8):
            run.whole(prompt, f"{prompt}{sample}", [tokens // 4] * 4)
        run.start(f"{prompt}-new", prompt=prompt)
    assert run.predict("long-new").median_tokens > 20 * run.predict("short-new").median_tokens


def test_history_survives_to_the_next_visit_and_a_drift_of_the_policy():
    """All lengths double from epoch to epoch; what was a long prompt is expected to be long on the new level."""
    run = Run()
    rng = np.random.default_rng(0)
    level = {f"p{number}": float(np.exp(rng.normal(7, 1))) for number in range(64)}
    for epoch in range(3):
        for prompt, usual in level.items():
            for sample in range(8):
                tokens = int(usual * 2**epoch * np.exp(rng.normal(0, 0.2)))
                run.whole(prompt, f"{prompt}-{epoch}-{sample}", [tokens], step=epoch)
    for prompt in level:
        run.start(prompt, prompt=prompt, step=3)
    said = np.log([run.predict(prompt).median_tokens for prompt in level])
    truth = np.log(list(level.values()))
    assert np.corrcoef(said, truth)[0, 1] > 0.95
    assert np.mean(said - truth) > np.log(2), "follows the newer levels, not the first"


def test_running_siblings_correct_the_short_first_finisher():
    """One of eight finished early; the others have long passed it, so the group must not look short."""
    alone, crowd = Run(), Run()
    for run in (alone, crowd):
        for number in range(100):
            run.whole(f"q{number}", f"q{number}", [1000 * 4 ** (number % 5) // 16] * 2)
        run.whole("p", "first", [100])
        for sample in range(6 if run is crowd else 0):
            run.start(f"p{sample}", prompt="p")
            run.turn(f"p{sample}", 6000)
        run.start("asked", prompt="p")
    assert crowd.predict("asked").median_tokens > 1.3 * alone.predict("asked").median_tokens


def test_validation_teaches_nothing():
    run = Run()
    before = run.predictor.to_bytes()
    run.whole("p", "a", [10, 10], validate=True)
    assert run.predictor.to_bytes() == before


def test_cap_bounds_the_estimate():
    run = Run(cap_tokens=1000)
    run.start("a")
    run.turn("a", 990)
    assert run.predict("a").median_tokens <= run.predict("a").upper_tokens <= 10


def test_unknown_trajectories_and_failed_turns_are_ignored():
    run = Run()
    run.end("ghost", FINISHED)
    run.start("a")
    run.turn("a", 500, completed=False)
    assert run.predictor._live.trajectories[run.key("a")].done == (0, 0, 0)


def test_same_events_same_answers():
    answers = []
    for _ in range(2):
        run = rollouts(prompts=40, samples=6, seed=3)
        run.predictor.adopt(run.predictor.fit_job().run())
        run.start("x", prompt="p1", step=9)
        run.turn("x", 700, ("bash",))
        answers.append((run.predict("x"), run.predictor.to_bytes()))
    assert answers[0] == answers[1]


def test_one_and_many_agree():
    run = rollouts(prompts=40, samples=6, seed=4)
    run.predictor.adopt(run.predictor.fit_job().run())
    keys = [f"n{number}" for number in range(60)]
    for number, key in enumerate(keys):
        run.start(key, prompt=f"p{number}", step=9)
        run.turn(key, 10 * number, ("bash",))
    many = run.predictor.predict_many([run.key(key) for key in keys])
    for column, name in zip(many, many._fields, strict=True):
        assert column == pytest.approx([getattr(run.predict(key), name) for key in keys], rel=1e-4)
    assert run.predictor.predict_many([]).median_tokens.shape == (0,)


def test_learns_what_bayes_cannot_see_and_knows_its_tail():
    """The first turn's length tells the rest: the trees find it, and UPPER of the truths lie below the upper quantile."""
    rng = np.random.default_rng(0)
    run = Run()
    for number in range(500):
        first = int(np.exp(rng.normal(5, 1)))
        run.whole(f"p{number}", f"p{number}", [first, max(1, int(first * 5 * np.exp(rng.normal(0, 0.3))))], step=number // 100)
    run.predictor.adopt(run.predictor.fit_job().run())
    truth, median, upper = [], [], []
    for number in range(400):
        first = int(np.exp(rng.normal(5, 1)))
        run.start(f"t{number}", prompt=f"new{number}", step=5)
        run.turn(f"t{number}", first, ("bash",))
        estimate = run.predict(f"t{number}")
        truth.append(np.log(first * 5 * np.exp(rng.normal(0, 0.3))))
        median.append(np.log(estimate.median_tokens))
        upper.append(np.log(estimate.upper_tokens))
    assert np.corrcoef(truth, median)[0, 1] > 0.8
    assert abs(np.mean(np.array(truth) <= upper) - UPPER) < 0.06


def test_first_fit_does_not_repeat_the_error_of_the_cold_start():
    """All of the first step is 40 times as long as the prior thinks; the next step must not be expected longer still."""
    rng = np.random.default_rng(0)
    run = Run()
    names = [f"s{number}" for number in range(300)]
    for name in names:
        run.start(name, prompt=f"p{name}")
    for name in names:
        run.turn(name, int(np.exp(rng.normal(np.log(20_000), 0.5))))
    for name in names:
        run.turn(name, int(np.exp(rng.normal(np.log(20_000), 0.5))))
        run.end(name)
    run.predictor.adopt(run.predictor.fit_job().run())
    run.start("next", step=1)
    assert 0.6 < run.predict("next").median_tokens / 43_000 < 1.6


def test_too_little_to_learn_from_changes_nothing():
    run = rollouts(prompts=2, samples=2, seed=0)
    assert run.predictor.fit_job().run() is None
    run.predictor.adopt(None)
    assert run.predictor.model is None


def test_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(live, "MAX_IDLE_GROUPS", 5)
    monkeypatch.setattr(predictor.tool_names, "MAX_TOOLS", 7)
    run = Run()
    run.predictor._prompts._max_prompts = 9
    run.predictor._window._size = 30
    rng = Random(0)
    for number in range(300):
        run.whole(f"p{number}", f"p{number}", [rng.randrange(1, 99) for _ in range(3)], tools=(f"t{number}",), step=number)
    core = run.predictor
    assert not core._live.trajectories
    assert len(core._live.visits) <= 5
    assert len(core._prompts) <= 9 and len(core._tools) <= 8 and len(core._window) <= 30 and len(core.fit_job().batch) <= 30
    assert sum(len(batch) for batch in core._window._batches) <= 60


def test_endless_trajectory_keeps_few_snapshots():
    run = Run()
    run.start("a")
    for _ in range(3000):
        run.turn("a", 1)
    assert len(run.predictor._live.trajectories[run.key("a")].snapshots) < 30


@pytest.mark.parametrize("outcome", [Outcome.CANCELLED, Outcome.FAILED])
def test_live_and_stopped_trajectories_become_bounds(outcome):
    run = Run()
    run.start("a")
    run.turn("a", 100)
    batch = run.predictor.fit_job().batch
    assert np.isinf(batch.upper).all() and batch.lower[0, 0] == 100
    run.end("a", outcome)
    stopped = run.predictor.fit_job().batch
    assert np.isinf(stopped.upper).all() and (stopped.lower == batch.lower).all()


def test_xgboost_is_not_imported_before_it_is_needed():
    code = "import sys; from verl_heddle.predict.predictor import Predictor; Predictor().to_bytes(); sys.exit('xgboost' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_text_tells_prompts_apart():
    run = Run()
    for number in range(200):
        long = number % 2
        text = "Prove this theorem in full detail" if long else "What is two plus two"
        run.whole(f"p{number}", f"p{number}", [20_000 if long else 200], text=f"{text} {number}")
    run.start("a", prompt="new a", text="Prove another theorem in full detail")
    run.start("b", prompt="new b", text="What is three plus four")
    assert run.predict("a").median_tokens > 3 * run.predict("b").median_tokens
