"""Confidence interval of a ratio of seconds by paired hierarchical bootstrap: resample pairs, then steps within each pair.

Law: the ratio is total seconds of the baseline over total seconds of the arm, over all steps that both arms of a pair have. Pairs are
resampled with replacement and, within each drawn pair, steps with replacement. A step is drawn for both arms together, so what the arms
share in a step (its prompts) cancels. The interval consists of percentiles of the resampled ratios.
Limits: steps of a run are treated as independent given the run. Percentiles over few pairs are too narrow: with 3 pairs whose ratios truly
differ by 3 %, a 95 % interval covers the truth about `COVERAGE_OF_3` of the time (a test measures it), so more pairs beat more steps.
Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13 (percentile interval); Davison and Hinkley, Bootstrap
Methods and their Application (1997), section 3.8 (hierarchical data).
Cost: O(draws * pairs * steps), vectorised; 4000 * 6 * 100 takes 50 ms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 4000
"""With this many draws, the ends of a 95 % interval vary over seeds by about 3 % of its width."""

LEVEL = 0.95

FEW_PAIRS = 4
"""With fewer pairs, the report warns that the interval is too narrow."""

COVERAGE_OF_3 = 0.85
"""Measured coverage of a 95 % interval over 3 pairs of 10 steps that vary by 3 % between pairs and 5 % between steps."""


@dataclass(frozen=True, slots=True)
class Ratio:
    """A ratio with its interval `low` to `high` (None if there is only one step of one pair); `by_pair` holds each pair's own ratio."""

    value: float
    low: float | None
    high: float | None
    by_pair: tuple[tuple[int, float], ...]
    steps: int
    """Number of steps compared, over all pairs."""

    @property
    def verdict(self) -> str:
        """`faster`, `slower`, or `unclear`: the interval contains 1 or is unknown, or there is only one pair, which hides pair variance."""
        if self.low is None or self.high is None or len(self.by_pair) < 2:
            return "unclear"
        return "faster" if self.low > 1 else "slower" if self.high < 1 else "unclear"


def paired_ratio(pairs: Sequence[tuple[int, Sequence[float], Sequence[float]]], seed: int = 0, draws: int = DRAWS) -> Ratio | None:
    """The ratio over all pairs with its interval; None if no pair has steps to compare.

    Args:
        pairs: (number, seconds of the baseline by step, seconds of the arm for the same steps); all positive.
    """
    used = [(number, np.asarray(base, dtype=float), np.asarray(arm, dtype=float)) for number, base, arm in pairs if len(base)]
    if not used:
        return None
    value = sum(base.sum() for _, base, _ in used) / sum(arm.sum() for _, _, arm in used)
    by_pair = tuple((number, float(base.sum() / arm.sum())) for number, base, arm in used)
    steps = sum(len(base) for _, base, _ in used)
    if steps == 1:
        return Ratio(float(value), None, None, by_pair, steps)
    rng = np.random.default_rng(seed)
    above, below = np.zeros(draws), np.zeros(draws)
    chosen = rng.integers(len(used), size=(len(used), draws))
    for slot in chosen:
        for index, (_, base, arm) in enumerate(used):
            here = np.flatnonzero(slot == index)
            taken = rng.integers(len(base), size=(len(here), len(base)))
            above[here] += base[taken].sum(axis=1)
            below[here] += arm[taken].sum(axis=1)
    low, high = np.exp(
        np.quantile(np.log(above / below), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    )  # in log space, swapping the arms gives exact reciprocals
    return Ratio(float(value), float(low), float(high), by_pair, steps)
