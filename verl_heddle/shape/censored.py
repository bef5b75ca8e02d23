"""Mean and spread of log lengths when some samples are censored, that is, known only to be longer than observed.

Law: a prompt's log lengths are normal. A sample that was stopped, cut or lost at c tokens means "longer than c". Expectation maximisation:
replace its log by the conditional mean m + s h and its square by the conditional second moment, with h the hazard of the standard normal at
(ln c - m) / s, then recompute mean and variance; `ROUNDS` times. The prior, worth `weight` samples, makes one sample sufficient and keeps
the variance above 0. Without censoring this is the shrunken sample mean and variance.
Invariants: a censored sample counts for more than its bound, and at least for the mean if nothing contradicts it. Source: Dempster, Laird
and Rubin 1977, for a normal (as in tobit models). Cost: O(ROUNDS * samples), plain floats.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import erfc, exp, log, pi, sqrt
from typing import NamedTuple

ROUNDS = 30
"""With half of the samples censored, each round halves the distance to the fixed point, so 30 rounds leave a billionth."""

FAR = 6.0
"""Standard deviations beyond which the normal hazard uses its asymptotic expansion; erfc would lose all digits only at 37."""


class Law(NamedTuple):
    """Log tokens of a prompt's samples: mean, standard deviation, and the standard deviation of the mean's uncertainty."""

    mean: float
    spread: float
    doubt: float = 0.0


class Prior(NamedTuple):
    """Prior mean and variance, each with its weight in samples."""

    mean: float
    variance: float
    mean_weight: float
    variance_weight: float


def fit(samples: Iterable[tuple[float, bool]], prior: Prior) -> tuple[float, float]:
    """Mean and variance of log tokens from (tokens, censored) samples.

    Raises:
        ValueError: no samples and a prior without weight.
    """
    logs = [(log(max(tokens, 1.0)), censored) for tokens, censored in samples]
    ended = [value for value, censored in logs if not censored]
    bounds = [value for value, censored in logs if censored]
    if len(logs) + prior.mean_weight <= 0 or len(logs) + prior.variance_weight <= 0:
        raise ValueError("no samples and no prior")
    mean, variance = prior.mean, prior.variance
    for _ in range(ROUNDS if bounds else 1):
        expected = [_beyond(bound, mean, sqrt(variance)) for bound in bounds]
        total = sum(ended) + sum(first for first, _ in expected) + prior.mean_weight * prior.mean
        mean = total / (len(logs) + prior.mean_weight)
        square = sum((value - mean) ** 2 for value in ended)
        square += sum(extra + (first - mean) ** 2 for first, extra in expected)
        square += prior.mean_weight * (prior.mean - mean) ** 2 if prior.variance_weight else 0.0
        variance = (square + prior.variance_weight * prior.variance) / (len(logs) + prior.variance_weight)
    return mean, variance


def _beyond(bound: float, mean: float, spread: float) -> tuple[float, float]:
    """Mean and variance of a normal variable conditioned on exceeding the bound."""
    if spread <= 0:
        return max(bound, mean), 0.0
    z = (bound - mean) / spread
    hazard = _hazard(z)
    return mean + spread * hazard, max(0.0, spread**2 * (1.0 - hazard * (hazard - z)))


def _hazard(z: float) -> float:
    if z > FAR:
        return z + 1.0 / z - 2.0 / z**3
    return exp(-0.5 * z * z) / sqrt(2 * pi) / (0.5 * erfc(z / sqrt(2)))
