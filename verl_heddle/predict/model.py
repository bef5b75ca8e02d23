"""A fitted predictor of what remains: empirical Bayes, corrected by trees, with a calibrated upper quantile.

Law: log median remaining = empirical-Bayes log remaining + `trust` * sum of the trees + `shift`; log(upper / median) = empirical-Bayes
spread times `widen`, one factor per stage of a trajectory (`stage`), because its own turns tell the trees more than the empirical-Bayes
spread knows of. The trees thus only say how a trajectory differs from what pool, history and siblings suggest. `trust`, from 0 to 1, is
what held-out prompts say the trees are worth, once for prompts of which something is known and once for new ones (`informed`): with trust
0 the estimate is the empirical-Bayes one. Immutable; safe to use from several threads. Cost: one row about 0.1 ms, 10,000 rows about 50 ms.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import Any

import numpy as np
from numpy.typing import NDArray

from verl_heddle.predict.features import NAMES
from verl_heddle.predict.forest import Forest
from verl_heddle.predict.quantities import QUANTITIES, Floats

SPREAD = NAMES.index("bayes_spread")
"""Column of the empirical-Bayes log(upper / median)."""

STAGES = (1, 2, 3, 6)
"""Turns at which a new stage begins: start, after 1, after 2, after 3 to 5, later."""

TURNS_DONE = NAMES.index("turns")

HISTORY, FINISHED = NAMES.index("history_count"), NAMES.index("finished")

MANY = 24
"""Rows from which a call of xgboost per quantity is cheaper than walking the trees row by row in numpy (0.06 ms each)."""

LOG_MOST = 30.0
"""Largest log remaining answered (1e13): a wild extrapolation must not become infinite."""


def stage(rows: NDArray[np.float32]) -> NDArray[np.intp]:
    """Number of the stage each feature row is in, 0 to len(STAGES)."""
    return np.searchsorted(STAGES, rows[:, TURNS_DONE], side="right")


def informed(rows: NDArray[np.float32]) -> NDArray[np.intp]:
    """1 where an earlier visit or a finished sibling speaks for the prompt, 0 where nothing does."""
    known: NDArray[np.intp] = ((rows[:, HISTORY] > 0) | (rows[:, FINISHED] > 0)).astype(np.intp)
    return known


class Model:
    """Trees and calibration.

    Args:
        trees: per quantity the raw `json` form of its booster.
        shift: (QUANTITIES,) added to the logs.
        widen: (stages,) factors on the spread.
        trust: (QUANTITIES, 2) factors on the trees by `informed`.
        rows: how many rows it was fitted on.

    Raises:
        ValueError: shapes or numbers that no fit gives.
    """

    def __init__(self, trees: list[bytes], shift: Floats, widen: Floats, trust: Floats, rows: int) -> None:
        shapes = len(trees), np.shape(shift), np.shape(widen), np.shape(trust)
        if shapes != (QUANTITIES, (QUANTITIES,), (len(STAGES) + 1,), (QUANTITIES, 2)):
            raise ValueError(f"a model has one ensemble and shift per quantity, one factor per stage, two per quantity, got {shapes}")
        if not np.isfinite([*shift, *widen, *np.ravel(trust)]).all() or np.min(widen) <= 0:
            raise ValueError("a model's shift, widen and trust are finite, and widen is positive")
        self.trees, self.shift, self.widen, self.trust, self.rows = trees, shift, widen, trust, rows
        self._forest = Forest(trees)
        self._boosters: list[Any] = []
        self._worths: list[list[float]] = np.transpose(trust).tolist()
        self._shifts: list[float] = np.ravel(shift).tolist()
        self._widths: list[float] = np.ravel(widen).tolist()

    def remaining(self, rows: NDArray[np.float32]) -> tuple[Floats, Floats]:
        """Log median remaining (n, QUANTITIES) and log(upper / median) of the tokens (n,) for feature rows."""
        sums = self._forest.sums(rows) if len(rows) < MANY else self._xgboost(rows)
        worth = self.trust.T[informed(rows)]
        left: Floats = np.clip(rows[:, :QUANTITIES] + worth * sums + self.shift, -LOG_MOST, LOG_MOST)
        return left, rows[:, SPREAD] * self.widen[stage(rows)]

    def remaining_one(self, row: NDArray[np.float32]) -> tuple[list[float], float]:
        """`remaining` of one row (features,), in plain floats."""
        sums = self._forest.sums(row[None])[0].tolist()
        worth = self._worths[int(row[HISTORY] > 0 or row[FINISHED] > 0)]
        left = [
            min(LOG_MOST, max(-LOG_MOST, base + factor * total + shift))
            for base, factor, total, shift in zip(row[:QUANTITIES].tolist(), worth, sums, self._shifts, strict=True)
        ]
        return left, float(row[SPREAD]) * self._widths[bisect_right(STAGES, row[TURNS_DONE])]

    def _xgboost(self, rows: NDArray[np.float32]) -> Floats:
        if not self._boosters:
            import xgboost  # here, not above: its import takes a second, and many processes never predict many rows

            boosters = [xgboost.Booster(params={"nthread": 1}) for _ in self.trees]
            for booster, raw in zip(boosters, self.trees, strict=True):
                booster.load_model(bytearray(raw))
                booster.set_param({"nthread": 1})
            self._boosters = boosters
        none = np.zeros(len(rows), dtype=np.float32)
        return np.stack([b.inplace_predict(rows, predict_type="margin", base_margin=none) for b in self._boosters], axis=1)
