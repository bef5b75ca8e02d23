"""Length statistics: censored samples count as what they are, and the past is remembered and forgotten."""

from __future__ import annotations

import json
from math import exp, log

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_heddle.shape.budget import NEWEST, Spreads
from verl_heddle.shape.censored import Prior, fit

LITTLE = Prior(7.0, 0.25, 1e-9, 1e-9)


def test_without_censoring_it_is_mean_and_variance():
    tokens = [100, 200, 400]
    mean, variance = fit([(t, False) for t in tokens], LITTLE)
    assert mean == pytest.approx(np.log(tokens).mean()) and variance == pytest.approx(np.log(tokens).var(), rel=1e-6)


def test_a_stopped_half_is_estimated_and_the_kept_alone_are_not():
    """Shortest 8 of 16, the rest stopped at the eighth's length: what the authors' code calls the prompt's spread, and what it is."""
    rng = np.random.default_rng(0)
    means, spreads, naive = [], [], []
    for _ in range(400):
        tokens = np.sort(np.exp(rng.normal(7.0, 0.6, 16)))
        seen = [(float(t), False) for t in tokens[:8]] + [(float(tokens[7]), True)] * 8
        mean, variance = fit(seen, Prior(7.0, 0.36, 0.3, 2.0))
        means.append(mean)
        spreads.append(variance**0.5)
        naive.append(np.log(tokens[:8]).std(ddof=1))
    assert np.mean(means) == pytest.approx(7.0, abs=0.05)
    assert np.mean(spreads) == pytest.approx(0.6, rel=0.1)
    assert np.mean(naive) < 0.65 * 0.6


@given(st.lists(st.tuples(st.integers(1, 10**6), st.booleans()), min_size=1, max_size=12))
@settings(deadline=None)
def test_it_is_finite_and_censored_samples_pull_up(samples):
    prior = Prior(7.0, 0.25, 0.5, 4.0)
    mean, variance = fit(samples, prior)
    assert np.isfinite(mean) and 0 < variance < 1e4
    assert fit([(tokens, True) for tokens, _ in samples], prior)[0] >= fit([(tokens, False) for tokens, _ in samples], prior)[0] - 1e-9


def test_nothing_known_is_refused():
    with pytest.raises(ValueError):
        fit([], Prior(7.0, 0.25, 0.0, 0.0))


def taught(visits: int = 200, seed: int = 0) -> tuple[Spreads, dict[str, tuple[float, float]]]:
    rng = np.random.default_rng(seed)
    truth = {f"p{i}": (8 + 0.7 * rng.normal(), 0.2 + 0.5 * rng.random()) for i in range(visits)}
    spreads = Spreads()
    for prompt, (mean, spread) in truth.items():
        spreads.observe(prompt, [(max(1, int(t)), False) for t in np.exp(rng.normal(mean, spread, 12))])
    return spreads, truth


def test_prompts_are_told_apart_and_strangers_get_the_pool():
    spreads, truth = taught()
    told = np.array([(spreads.law(p).mean, m) for p, (m, _) in truth.items()])
    assert np.corrcoef(told.T)[0, 1] > 0.9
    wide = np.array([(spreads.law(p).spread, s) for p, (_, s) in truth.items()])
    assert np.corrcoef(wide.T)[0, 1] > 0.5
    stranger = spreads.law("nobody")
    assert stranger.mean == pytest.approx(8, abs=0.3) and stranger.doubt == pytest.approx(0.7, abs=0.25)
    assert stranger.doubt > 2 * spreads.law("p0").doubt


def test_visits_are_averaged_with_the_papers_weight_and_follow_the_pool():
    spreads = Spreads()
    for number in range(50):
        spreads.observe(f"q{number}", [(1000, False)] * 4)
    spreads.observe("p", [(4000, False)] * 400)
    first = spreads.law("p").mean
    assert first == pytest.approx(log(4000), abs=0.05)
    spreads.observe("p", [(1000, False)] * 400)
    pool = spreads.law("nobody").mean
    assert spreads.law("p").mean == pytest.approx((1 - NEWEST) * log(4000) + NEWEST * log(1000), abs=0.1)
    for _ in range(2000):
        spreads.observe("q0", [(3000, False)] * 4)
    assert exp(spreads.law("nobody").mean) > 2500 and spreads.law("p").mean - first > 0.3 + pool - pool


def test_the_state_survives_json_and_bounds_hold():
    spreads, _ = taught(50)
    other = Spreads.restore(json.loads(json.dumps(spreads.state())))
    assert other.law("p3") == spreads.law("p3") and len(other) == 50 and other.visits == spreads.visits
    other.observe("p3", [(500, True), (300, False)])
    spreads.observe("p3", [(500, True), (300, False)])
    assert other.state() == spreads.state()
    small = Spreads(max_prompts=2)
    for name in "abca":
        small.observe(name, [(100, False)])
    assert len(small) == 2 and small.law("b") == small.law("never")


@pytest.mark.parametrize(
    "state", [{}, {"visits": 1, "pool": [1, 2], "prompts": []}, {"visits": 1, "pool": [1, 2, float("nan")], "prompts": []}]
)
def test_other_states_are_refused(state):
    with pytest.raises(ValueError):
        Spreads.restore(state)


def test_samples_that_never_generated_teach_nothing():
    spreads = Spreads()
    spreads.observe("p", [(0, True), (0, False)])
    assert len(spreads) == 0 and spreads.visits == 0
