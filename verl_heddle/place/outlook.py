"""What a group of trajectories will take when their lengths are distributions: the expected staircase, in closed form.

Law: B(x) = how many of the group go on beyond x tokens. The drain time is the integral over x of tau(B(x)), with tau(0) = 0 (`cost.py`,
staircase). For independent lengths, with S_i(x) the chance that i goes on beyond x,

    E[B] = sum_i S_i(x)        P = P(B >= 1) = 1 - prod_i (1 - S_i(x))        E[tau(B)] ~ P * tau(E[B] / P)

which is exact where tau is affine from 1 on, as decode steps nearly are. Both sums are additive, so a group's cost needs its two rows on a
grid of tokens and no sampled scenario: nothing for an optimizer to exploit, and adding a trajectory is adding two vectors.

What a step waits for is the slowest of its replicas, and the mean of a maximum is not the maximum of means: moving one of two trajectories
of unknown length to an empty replica shortens the first replica's mean, and the step hardly at all. So whole fleets are priced by

    E[makespan] = integral of 1 - prod_r P(drain_r <= t) dt,   P(drain_r <= t) = prod_i (1 - S_i(x)) at the x that r reaches at t

with x(t) along E[B] / P as above: the lengths are random, the speed at which a replica gets through them is taken at its mean.
Lengths are log-logistic, as `predict.quantities.Estimate` gives them, cut off at what a trajectory may still generate.
Source: own; bench/placement/scenarios.py holds it against sampled scenarios.
Cost: O(len(GRID)) per group, O(len(GRID) + TIMES) per replica.
"""

from __future__ import annotations

from math import inf

import numpy as np
from numpy.typing import ArrayLike

from verl_heddle.place.cost import Floats
from verl_heddle.place.pace import Tempo

GRID: Floats = np.concatenate([[0.0], np.geomspace(24.0, 400_000.0, 64)])
"""Tokens at which chances are kept; steps of 17 % put integrals within 2 %."""

with np.errstate(divide="ignore"):
    LOG_GRID: Floats = np.log(GRID)
STEPS: Floats = np.diff(GRID)

WEIGHTS: Floats = np.concatenate([[GRID[1] / 2], (GRID[2:] - GRID[:-2]) / 2, [0.0]])
"""Trapezoid rule; what is beyond the grid does not count."""

SURE = 1e-9
"""Smallest chance to have ended that is told from none; keeps logarithms finite."""

TIMES, UNLIKELY = 128, 1e-3
"""Points in time at which chances to have drained are kept; chance below which nobody is expected to go on."""

LEAST_SCALE = 0.02
"""Of a log-logistic: nobody knows a length to 2 %, and the grid could not show it."""


def curves(median: ArrayLike, scale: ArrayLike, at_most: ArrayLike = inf) -> Floats:
    """Rows to add up, shape [..., 2, len(GRID)]: the chance to go on beyond each grid point, and the log of the chance not to.

    Args:
        median, scale: of the log-logistic remaining tokens; they broadcast.
        at_most: tokens a trajectory may still generate.
    """
    middle = np.maximum(np.asarray(median, dtype=np.float64), 1.0)[..., None]
    spread = np.maximum(np.asarray(scale, dtype=np.float64), LEAST_SCALE)[..., None]
    away = (LOG_GRID - np.log(middle)) / spread
    goes_on = 1.0 / (1.0 + np.exp(np.minimum(np.maximum(away, -40.0), 40.0)))
    allowed = np.asarray(at_most, dtype=np.float64)[..., None]
    goes_on = np.where(allowed > GRID, goes_on, 0.0)
    rows: Floats = np.empty((*goes_on.shape[:-1], 2, len(GRID)))  # written in place: stacking takes longer than computing
    rows[..., 0, :] = goes_on
    rows[..., 1, :] = np.log(np.maximum(1.0 - goes_on, SURE))
    return rows


def drain_s(sums: Floats, tempo: Tempo) -> Floats:
    """Expected seconds to drain groups whose summed `curves` these are, shape [..., 2, len(GRID)]; returns shape [...]."""
    some = -np.expm1(np.minimum(sums[..., 1, :], 0.0))
    together = np.maximum(sums[..., 0, :], 0.0) / np.maximum(some, SURE)
    seconds: Floats = (some * tempo.at(together)) @ WEIGHTS
    return seconds


def laws(sums: Floats, tempo: Tempo) -> tuple[Floats, Floats]:
    """When groups reach each grid point, seconds, and the chance that all of them have ended by then; both [..., len(GRID)]."""
    ended = np.minimum(sums[..., 1, :], 0.0)
    some = np.maximum(-np.expm1(ended), SURE)
    tau = tempo.at(np.maximum(sums[..., 0, :], 0.0) / some)
    pieces = 0.5 * (tau[..., 1:] + tau[..., :-1]) * STEPS
    reached = np.concatenate([np.zeros((*tau.shape[:-1], 1)), np.cumsum(pieces, axis=-1)], axis=-1)
    return reached, np.exp(ended)


def log_ended(times: Floats, reached: Floats, ended: Floats) -> Floats:
    """Log of the chance that one group has drained, at each of these times."""
    chance: Floats = np.log(np.maximum(np.interp(times, reached, ended), SURE))
    return chance


def late_s(reached: Floats, ended: Floats) -> Floats:
    """When groups have surely drained, seconds; rows of `laws`, shape [..., len(GRID)] to [...]."""
    late: Floats = np.where(ended < 1.0 - UNLIKELY, reached, 0.0).max(axis=-1)
    return late


def clock(late: float) -> Floats:
    """`TIMES` times, evenly from 0 to a quarter after the last has surely drained."""
    return np.linspace(0.0, 1.25 * max(late, 1e-6), TIMES)
