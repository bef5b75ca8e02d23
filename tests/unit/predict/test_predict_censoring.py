"""Stopping trajectories early must not teach that everything is short; quantiles of censored samples."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from play import FINISHED, Run

from verl_heddle.predict import fit
from verl_heddle.predict.model import quantile
from verl_heddle.trajectory import Outcome

MEDIAN = np.log(2000.0)


def bias(mode: str, seed: int = 1) -> float:
    """Mean log error after one turn on new prompts, when half of the training samples were stopped early.

    Modes: `aft` says that they were cancelled, `naive` lets them pass for finished, `clean` stops none.
    """
    rng = np.random.default_rng(seed)
    run = Run()
    for number in range(200):
        size = rng.normal(MEDIAN, 0.6)
        for sample in range(4):
            turns = [max(1, int(np.exp(size + rng.normal(0, 0.4)) / 8))] * 8
            fits = max(1, int(np.exp(rng.normal(MEDIAN - 0.2, 0.72)) / turns[0]))  # a stop that knows nothing of the length
            stopped = mode != "clean" and fits < 8
            outcome = Outcome.CANCELLED if stopped and mode == "aft" else FINISHED
            run.whole(f"p{number}", f"p{number}-{sample}", turns[:fits] if stopped else turns, outcome=outcome, step=number // 20)
    run.predictor.adopt(run.predictor.fit_job().run())
    errors = []
    for number in range(200):
        turn = max(1, int(np.exp(rng.normal(MEDIAN, np.hypot(0.6, 0.4))) / 8))
        run.start(f"t{number}", prompt=f"new{number}", step=12)
        run.turn(f"t{number}", turn, ("bash",), tool_s=0.5)
        errors.append(np.log(run.predict(f"t{number}").median_tokens) - np.log(turn * 7))
    return float(np.mean(errors))


def test_bias_of_early_stopping_is_below_a_third_of_the_naive_models(monkeypatch):
    monkeypatch.setattr(fit, "MAX_TREES", 60)  # enough for this simple law, and the test stays short
    clean, naive, aft = (bias(mode) for mode in ("clean", "naive", "aft"))
    assert abs(clean) < 0.05
    assert naive < -0.15, "the test has no teeth if early stopping does not mislead the naive model"
    assert abs(aft) < abs(naive) / 3


@given(st.lists(st.floats(-50, 50), min_size=1, max_size=60), st.floats(0.01, 0.99))
def test_quantile_without_censoring_is_the_empirical_one(values, p):
    values = np.array(values)
    expected = np.sort(values)[int(np.ceil(p * len(values) - 1e-9)) - 1]
    assert quantile(values, np.zeros(len(values), dtype=bool), p) == expected


@given(st.lists(st.tuples(st.floats(-50, 50), st.booleans()), min_size=1, max_size=60), st.floats(0.01, 0.99))
def test_censoring_only_raises_a_quantile(samples, p):
    values, censored = np.array([v for v, _ in samples]), np.array([c for _, c in samples])
    assert quantile(values, censored, p) >= quantile(values, np.zeros_like(censored), p)


def test_quantile_sees_through_random_censoring():
    rng = np.random.default_rng(0)
    truth, stop = rng.normal(size=4000), rng.normal(0.5, 1, size=4000)
    assert quantile(np.minimum(truth, stop), stop < truth, 0.5) == pytest.approx(0, abs=0.07)


def test_quantile_of_nothing():
    with pytest.raises(ValueError, match="no values"):
        quantile(np.empty(0), np.empty(0, dtype=bool), 0.5)
