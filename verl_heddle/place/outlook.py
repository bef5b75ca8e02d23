"""Computes expected drain times and makespans when trajectory lengths are distributions: the expected staircase, in closed form.

Law: B(x) = the number of trajectories in the group longer than x tokens. The drain time is the integral over x of tau(B(x)), with
tau(0) = 0 (`cost.py`, staircase). For independent lengths, with S_i(x) the probability that i is longer than x,

    E[B] = sum_i S_i(x)        P = P(B >= 1) = 1 - prod_i (1 - S_i(x))        E[tau(B)] ~ P * tau(E[B] / P)

which is exact where tau is affine from 1 on, as decode steps nearly are. Both sums are additive, so a group's cost needs its two rows on a
grid of tokens and no sampled scenarios. An optimizer has no samples to exploit, and adding a trajectory adds two vectors.

A step waits for its slowest replica, and the mean of a maximum is not the maximum of means: moving one of two trajectories of unknown
length to an empty replica shortens the first replica's mean, but hardly the step. Whole fleets are therefore priced by

    E[makespan] = integral of 1 - prod_r P(drain_r <= t) dt,   P(drain_r <= t) = prod_i (1 - S_i(x)) at the x that r reaches at t

with x(t) along E[B] / P as above: lengths are random, replica speed is taken at its mean.
Lengths are log-logistic, from `predict.quantities.Estimate`, truncated at the tokens a trajectory may still generate.
Source: own; bench/placement/scenarios.py compares it with sampled scenarios.
Cost: O(len(GRID)) per group, O(len(GRID) + TIMES) per replica.
"""

from __future__ import annotations

from math import inf

import numpy as np
from numpy.typing import ArrayLike

from verl_heddle.place.cost import Floats
from verl_heddle.place.pace import Tempo

GRID: Floats = np.concatenate([[0.0], np.geomspace(24.0, 400_000.0, 64)])
"""Tokens at which probabilities are kept; steps of 17 % keep integrals within 2 %."""

with np.errstate(divide="ignore"):
    LOG_GRID: Floats = np.log(GRID)
STEPS: Floats = np.diff(GRID)

WEIGHTS: Floats = np.concatenate([[GRID[1] / 2], (GRID[2:] - GRID[:-2]) / 2, [0.0]])
"""Trapezoid rule; lengths beyond the grid are ignored."""

SURE = 1e-9
"""Smallest probability distinguished from zero; keeps logarithms finite."""

TIMES, UNLIKELY = 128, 1e-3
"""Points in time at which drain probabilities are kept; probability below which no trajectory is expected to be left."""

LEAST_SCALE = 0.02
"""Smallest log-logistic scale: no length is known to 2 %, and the grid could not resolve it."""


def curves(median: ArrayLike, scale: ArrayLike, at_most: ArrayLike = inf) -> Floats:
    """Additive rows, shape [..., 2, len(GRID)]: the probability of exceeding each grid point, and the log of its complement.

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
    """Seconds at which groups reach each grid point, and the probability that all members have ended by then; both [..., len(GRID)]."""
    ended = np.minimum(sums[..., 1, :], 0.0)
    some = np.maximum(-np.expm1(ended), SURE)
    tau = tempo.at(np.maximum(sums[..., 0, :], 0.0) / some)
    pieces = 0.5 * (tau[..., 1:] + tau[..., :-1]) * STEPS
    reached = np.concatenate([np.zeros((*tau.shape[:-1], 1)), np.cumsum(pieces, axis=-1)], axis=-1)
    return reached, np.exp(ended)


def log_ended(times: Floats, reached: Floats, ended: Floats) -> Floats:
    """Log of the probability that one group has drained, at each of these times."""
    chance: Floats = np.log(np.maximum(np.interp(times, reached, ended), SURE))
    return chance


def late_s(reached: Floats, ended: Floats) -> Floats:
    """Seconds after which groups have almost surely drained; rows of `laws`, shape [..., len(GRID)] to [...]."""
    late: Floats = np.where(ended < 1.0 - UNLIKELY, reached, 0.0).max(axis=-1)
    return late


def clock(late: float) -> Floats:
    """`TIMES` times, evenly spaced from 0 to 1.25 times the latest drain."""
    return np.linspace(0.0, 1.25 * max(late, 1e-6), TIMES)
