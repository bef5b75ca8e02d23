"""The ratio and its interval: exact where nothing varies, paired, and covering the truth about as often as said."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_heddle.compare.bootstrap import COVERAGE_OF_3, paired_ratio

SECONDS = st.floats(0.01, 1e4)


@settings(deadline=None)
@given(st.lists(st.lists(SECONDS, min_size=1, max_size=6), min_size=1, max_size=4), st.floats(0.2, 5))
def test_a_constant_ratio_has_no_width_however_steps_differ(pairs, factor):
    found = paired_ratio([(n, base, [value / factor for value in base]) for n, base in enumerate(pairs)], draws=50)
    assert found.value == pytest.approx(factor) and found.steps == sum(map(len, pairs))
    if found.steps > 1:
        assert found.low == pytest.approx(factor) and found.high == pytest.approx(factor)


@settings(deadline=None)
@given(st.lists(st.tuples(SECONDS, SECONDS), min_size=2, max_size=8), st.floats(0.1, 10))
def test_units_do_not_matter_and_arms_swap(rows, scale):
    base, arm = zip(*rows, strict=True)
    found = paired_ratio([(1, base, arm)], draws=200)
    assert found.low <= found.high and min(a / b for a, b in rows) * 0.999 <= found.value <= max(a / b for a, b in rows) * 1.001
    scaled = paired_ratio([(1, [scale * x for x in base], [scale * x for x in arm])], draws=200)
    assert scaled.value == pytest.approx(found.value) and scaled.low == pytest.approx(found.low)
    swapped = paired_ratio([(1, arm, base)], draws=200)
    assert swapped.value == pytest.approx(1 / found.value) and swapped.high == pytest.approx(1 / found.low)


def test_what_a_step_has_in_common_cancels():
    rng = np.random.default_rng(0)
    steps = rng.lognormal(2, 1, size=30)  # prompts of very different length
    together, again = (paired_ratio([(pair, steps, steps / 1.1 * rng.lognormal(0, 0.01, 30)) for pair in range(n)]) for n in (1, 2))
    apart = paired_ratio([(1, steps, rng.permutation(steps) / 1.1)])
    assert together.high - together.low < 0.1 * (apart.high - apart.low)
    assert again.verdict == "faster" and apart.verdict == "unclear"
    assert together.low > 1 and together.verdict == "unclear", "one pair does not show how much pairs differ"


def test_one_step_of_one_pair_has_no_interval_and_nothing_has_no_ratio():
    assert paired_ratio([(1, [2.0], [1.0])]).low is None
    assert paired_ratio([(1, [2.0], [1.0])]).verdict == "unclear"
    assert paired_ratio([]) is None and paired_ratio([(1, [], [])]) is None


def test_the_interval_of_three_pairs_covers_about_as_often_as_documented():
    rng = np.random.default_rng(1)
    hits, trials = 0, 300
    for trial in range(trials):
        pairs = []
        for pair in range(3):
            base = rng.lognormal(2, 0.3, 10)
            pairs.append((pair, base, base / 1.1 * np.exp(rng.normal(0, 0.03)) * rng.lognormal(0, 0.07, 10)))
        found = paired_ratio(pairs, trial, 400)
        hits += found.low <= 1.1 <= found.high
    assert hits / trials == pytest.approx(COVERAGE_OF_3, abs=0.08)
