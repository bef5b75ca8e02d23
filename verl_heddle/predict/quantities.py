"""The three predicted quantities of a trajectory, and the record of an estimate.

Inside this package a quantity is a column: `TOKENS`, `TURNS`, `TOOL_S`, always in this order, and always as a natural logarithm, because
lengths span decades and a factor of two is as wrong for a short trajectory as for a long one.
"""

from __future__ import annotations

from math import log, pi, sqrt
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

TOKENS, TURNS, TOOL_S = range(3)
QUANTITIES = 3

FLOOR = np.array([1.0, 1.0, 0.01])
"""Smallest amount distinguished from zero: a token, a turn, and 10 ms, below which a tool is not worth planning for."""

UPPER = 0.9
"""The upper quantile. The tail is what makes a step long; beyond 0.9 a group of 16 holds too few samples to calibrate it."""

LOGISTIC = sqrt(3) / pi
"""Scale of a logistic distribution of standard deviation 1."""

ODDS_UPPER = log(UPPER / (1 - UPPER))
"""Distance between the median and the upper quantile of a standard logistic distribution."""


class Estimate(NamedTuple):
    """Remaining work of a trajectory, from the end of its last finished turn.

    `median_tokens` and `upper_tokens` (`UPPER` quantile) describe a log-logistic distribution of the remaining tokens; `turns` and
    `tool_s` (seconds in tools, including the call in flight) are medians.
    """

    median_tokens: float
    upper_tokens: float
    turns: float
    tool_s: float

    @property
    def scale(self) -> float:
        """Scale of log remaining tokens: a scenario is `median_tokens * (u / (1 - u)) ** scale` for uniform u."""
        return log(self.upper_tokens / self.median_tokens) / ODDS_UPPER


class Estimates(NamedTuple):
    """`Estimate` of many trajectories, one array of float64 per field."""

    median_tokens: Floats
    upper_tokens: Floats
    turns: Floats
    tool_s: Floats
