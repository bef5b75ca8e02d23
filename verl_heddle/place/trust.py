"""How much a planner may believe a predictor: as much as its predictions have come true.

Law: of every finished trajectory, x = log tokens predicted at its first turn, y = log tokens it had. Over the last `MEMORY` of them
    slope    = least-squares slope of y on x, within 0 and 1: predictions that are noise have 0, honest ones 1;
    widen    = residual scale / mean scale claimed, within 1 and `MOST`: who claims to know more than he does is not believed.
An estimate is used with its log median drawn towards the mean of all that run, by the slope, and its scale times `widen`. So a predictor
without worth makes everybody alike, and a plan for equals is an even split.

What finished first is short: pairs count only once everybody has ended (`close`). Before `FEWEST` pairs, predictions are taken at their
word. Invariant: scale never shrinks. Source: regression to the mean, as a check on the optimizer's curse. Cost: O(1) per trajectory.
"""

from __future__ import annotations

from collections import deque
from math import exp, log, sqrt

import numpy as np

from verl_heddle.predict.quantities import LOGISTIC, ODDS_UPPER, Estimate

MEMORY = 2048
"""Trajectories; a few steps of a usual batch, so that a predictor that improves is believed soon."""

FEWEST = 64
"""Below it the slope's own error is above 0.1."""

MOST = 4.0
"""A predictor that errs more than so many times what it claims is caught by the slope."""


class Trust:
    """See the module."""

    def __init__(self) -> None:
        self.slope = 1.0
        self.widen = 1.0
        self.quality: float | None = None
        """Correlation of log predicted and log true length over the pairs that count; None before there are enough."""
        self._told: dict[str, tuple[float, float]] = {}
        self._fresh: list[tuple[float, float, float]] = []
        self._pairs: deque[tuple[float, float, float]] = deque(maxlen=MEMORY)

    def told(self, key: str, estimate: Estimate) -> None:
        """The predictor's word at a trajectory's first turn."""
        self._told[key] = (log(max(estimate.median_tokens, 1.0)), estimate.scale)

    def ended(self, key: str, tokens: int | None) -> None:
        """The trajectory had so many tokens; None: cut short or not to be learnt from."""
        said = self._told.pop(key, None)
        if said is not None and tokens:
            self._fresh.append((said[0], log(tokens), said[1]))

    def close(self) -> None:
        """Everybody has ended: what was collected counts."""
        self._pairs.extend(self._fresh)
        self._fresh.clear()
        if len(self._pairs) < FEWEST:
            return
        x, y, claimed = np.array(self._pairs).T
        spread, both = float(np.var(x)), float(np.cov(x, y, bias=True)[0, 1])
        self.slope = min(1.0, max(0.0, both / spread)) if spread > 1e-9 else 1.0
        self.quality = both / sqrt(spread * float(np.var(y))) if spread > 1e-9 and np.var(y) > 1e-9 else 0.0
        residual = LOGISTIC * float(np.std(y - self.slope * x))
        self.widen = min(MOST, max(1.0, residual / max(float(np.mean(claimed)), 1e-6)))

    def believed(self, estimate: Estimate, usual_log: float) -> Estimate:
        """The estimate as it may be used; `usual_log`: mean log median of what runs."""
        if self.slope == 1.0 and self.widen == 1.0:
            return estimate
        median = exp(usual_log + self.slope * (log(max(estimate.median_tokens, 1.0)) - usual_log))
        upper = median * exp(min(50.0, estimate.scale * self.widen * ODDS_UPPER))
        return estimate._replace(median_tokens=median, upper_tokens=upper)
