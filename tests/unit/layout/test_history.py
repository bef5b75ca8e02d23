"""What a coming step is taken to be like: as long as was predicted, as uncertain as the predictions were."""

from __future__ import annotations

import numpy as np
import pytest
from drawn import examples
from hypothesis import given
from hypothesis import strategies as st

from verl_heddle.layout.planner import again
from verl_heddle.trajectory import Trajectory, Turn


def record(tokens: int, predicted: float | None) -> Trajectory:
    return Trajectory("s", "w", "p", 0, 10, (Turn(0, tokens, predicted_remaining=predicted),))


@examples(20)
@given(st.integers(0, 99), st.floats(0.2, 5), st.floats(0.05, 1.0))
def test_bias_and_spread_of_the_predictions_are_found_again(seed, bias, scale):
    rng = np.random.default_rng(seed)
    predicted = np.exp(rng.normal(7, 1, 4000))
    lengths = np.maximum(1, predicted * bias * np.exp(rng.logistic(0, scale, 4000)))
    told = again([record(round(length), guess) for length, guess in zip(lengths, predicted, strict=True)])
    assert np.median(told.medians / predicted) == pytest.approx(bias, rel=0.15)
    middle = np.searchsorted(told.rows[0, 0] < 0.5, True)
    assert 0 < middle < told.rows.shape[2]


def test_perfect_predictions_give_the_lengths_back():
    told = again([record(100 * n, 100.0 * n) for n in range(1, 50)])
    assert np.allclose(told.medians, [100 * n for n in range(1, 50)])


def test_without_predictions_all_are_alike_and_as_different_as_they_were():
    told = again([record(n, None) for n in (100, 200, 400, 800, 1600)])
    assert np.allclose(told.medians, 400)


def test_nothing_generated_is_nothing_coming():
    assert again([]) is None and again([record(0, 5.0)]) is None
