"""Expected staircase of groups that end with their n-th sample: `place.outlook` extended by early stopping.

Law. A prompt has m independent samples, S(x) is the chance that one runs beyond x tokens, F = 1 - S, and N(x) ~ Bin(m, F(x)) have ended.
The group ends with its n-th sample, except that it waits up to w tokens for its long slots (`select.Rule.patience_tokens`) before it stops
the rest:

    x <  w:  live = m S                                         the group is live while any sample is: 1 - F^m
    x >= w:  live = m S P(Bin(m - 1, F) < n)                    the group is live while N < n: P(Bin(m, F) < n)

because (m - k) C(m, k) = m C(m - 1, k). Both are additive over prompts (the second as the log of the chance that the group is over), as in
`place.outlook`, so pricing a step needs no sampled scenarios. Plain sampling of n is m = n, w = inf. Uncertainty about a prompt's mean is
integrated over `NODES` points, so its samples are long together or short together. The recurrence
    P(Bin(m + 1, F) < n) = P(Bin(m, F) < n) - F P(Bin(m, F) = n - 1)
gives all m from n on in one pass.
Invariants: along the grid, live samples fall from m and the chance that the group is live falls; at w = 0 that chance falls with m.
Source: derived here; Heddle and DARTS price a group by its last sample. Cost: O(prompts * NODES * (bound - n) * len(GRID)).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import comb, inf, log, pi, sqrt

import numpy as np

from verl_heddle.place.cost import Floats
from verl_heddle.place.outlook import GRID, SURE, WEIGHTS
from verl_heddle.predict.quantities import LOGISTIC
from verl_heddle.shape.censored import Law

NODES = 5
"""Gauss-Hermite points for the uncertainty of a prompt's mean: moments up to the ninth are exact."""

_POINTS, _WEIGHTS = np.polynomial.hermite_e.hermegauss(NODES)
_WEIGHTS = _WEIGHTS / sqrt(2 * pi)


def live(laws: Sequence[Law], size: int, most: int, patience: float = 0.0, cap_tokens: float = inf) -> Floats:
    """Additive rows for groups of `size` out of m samples, m = size ... most; shape [prompts, most - size + 1, 2, len(GRID)].

    Row 0: expected live samples at each grid point. Row 1: log of the chance that the group is over.

    Raises:
        ValueError: fewer samples than the group keeps, or a law without spread.
    """
    if not 1 <= size <= most or any(not law.spread > 0 or law.doubt < 0 for law in laws):
        raise ValueError(f"need 1 <= size <= most and laws with a spread, got {size}, {most}")
    mean = np.array([law.mean for law in laws])[:, None, None]
    spread = np.array([law.spread for law in laws])[:, None, None]
    doubt = np.array([law.doubt for law in laws])[:, None, None]
    with np.errstate(divide="ignore"):
        score = (np.log(GRID) - mean - doubt * _POINTS[:, None]) / (spread * LOGISTIC)
    beyond = np.where(cap_tokens > GRID, 1.0 / (1.0 + np.exp(np.clip(score, -40.0, 40.0))), 0.0)
    ended = 1.0 - beyond
    waits = patience > GRID
    made = np.empty((len(laws), most - size + 1, 2, len(GRID)))
    short_one_less = np.ones_like(ended)  # P(Bin(m - 1, F) < n), starting at m = n
    for level, samples in enumerate(range(size, most + 1)):
        exactly = comb(samples - 1, size - 1) * ended ** (size - 1) * beyond ** (samples - size)
        short = np.clip(short_one_less - ended * exactly, 0.0, 1.0)  # P(Bin(m, F) < n)
        alive = samples * beyond * np.where(waits, 1.0, short_one_less)
        over = np.where(waits, ended**samples, 1.0 - short)
        made[:, level, 0] = np.tensordot(alive, _WEIGHTS, (1, 0))
        made[:, level, 1] = np.log(np.maximum(np.tensordot(over, _WEIGHTS, (1, 0)), SURE))
        short_one_less = short
    return made


def deadline(over: Floats, groups: float = 1.0) -> float:
    """Tokens at which at most `groups` groups are expected to be live; `over`: row 1 of `live`, [groups, len(GRID)]."""
    left = -np.expm1(np.minimum(over, 0.0)).sum(axis=0)
    above = np.flatnonzero(left > groups)
    if not len(above):
        return 0.0
    last = int(above[-1])
    if last + 1 == len(GRID):
        return float(GRID[-1])
    high, low = max(float(left[last]), 1e-12), max(float(left[last + 1]), 1e-12)
    share = (log(high) - log(groups)) / (log(high) - log(low)) if low < high else 1.0
    return float(GRID[last] + min(1.0, max(0.0, share)) * (GRID[last + 1] - GRID[last]))


def tails(over: Floats, from_tokens: float) -> Floats:
    """Expected tokens that groups run beyond `from_tokens`; over [..., len(GRID)], returns [...]."""
    live_chance = -np.expm1(np.minimum(over, 0.0))
    weights = np.where(from_tokens <= GRID, WEIGHTS, 0.0)
    excess: Floats = live_chance @ weights
    return excess
