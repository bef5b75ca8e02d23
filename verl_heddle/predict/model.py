"""The fitted predictor of remaining tokens: an empirical-Bayes estimate, corrected by trees, with a calibrated upper quantile.

Law: log median remaining = empirical-Bayes log remaining + `trust` * sum of the trees + `shift`. log(upper / median) = empirical-Bayes
spread times `widen`, one factor per stage of a trajectory (`stage`), because its own turns tell the trees more than the empirical-Bayes
spread accounts for. The trees thus predict only how a trajectory differs from what pool, history and siblings suggest. `trust`, from 0 to
1, is what the trees are worth on held-out prompts: one value for prompts with history, one for new ones (`informed`). At 0 the estimate is
the empirical-Bayes one. Immutable and thread-safe. Cost: one row about 0.1 ms, 10,000 rows about 50 ms.

Trees (`Forest`) are evaluated with numpy, for the few trajectories of one decision. Every tree is stored as a complete binary tree of depth
`DEPTH` (node i has children 2i+1 and 2i+2; shallow leaves are repeated), so that all trees descend one level per numpy call: a thousand
trees cost `DEPTH` gathers, about 60 microseconds; one call of xgboost costs more than 100 per model. For many rows xgboost's own loop is
faster (`predictor`); both give the same sums up to the order of float32 additions. Rows have no missing values, so default directions do
not matter.

Censored quantiles (`quantile`): the product-limit estimate of the survival function (Kaplan and Meier 1958). The p-quantile is the smallest
event at which survival has fallen to 1 - p, or the largest sample if survival never falls so far. Without censoring it is the empirical
quantile.
Cost: O(n log n).
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from verl_heddle.predict.features import NAMES
from verl_heddle.predict.quantities import QUANTITIES, Floats


def quantile(values: Floats, censored: NDArray[np.bool_], p: float) -> float:
    """p-quantile of what `values` are, or are lower bounds of where `censored`.

    Raises:
        ValueError: there are no values.
    """
    if not len(values):
        raise ValueError("no values")
    order = np.lexsort((censored, values))  # of equal values events come first, as the estimate asks
    at_risk = np.arange(len(values), 0, -1)
    survival = np.cumprod(1 - (~censored[order]) / at_risk)
    reached = np.flatnonzero(survival <= 1 - p + 1e-12)
    return float(values[order][reached[0] if len(reached) else -1])


DEPTH = 4
"""Depth of the trees: interactions of up to four features; the flat form doubles with each level."""

_INNER = 2**DEPTH - 1


class Forest:
    """Several ensembles over the same features, evaluated together.

    Args:
        ensembles: each the raw `json` form of an xgboost booster (`save_raw("json")`).
    """

    def __init__(self, ensembles: Sequence[bytes]) -> None:
        flat = [[_flat(tree) for tree in _trees(raw)] for raw in ensembles]
        every = [tree for trees in flat for tree in trees]
        self._counts = [len(trees) for trees in flat]
        self._feature = np.array([feature for feature, _, _ in every], dtype=np.intp).reshape(-1, _INNER).ravel()
        self._threshold = np.array([threshold for _, threshold, _ in every], dtype=np.float32).reshape(-1, _INNER).ravel()
        self._leaf = np.array([leaf for _, _, leaf in every], dtype=np.float32).reshape(-1, _INNER + 1).ravel()
        self._root: NDArray[np.intp] = np.arange(len(every), dtype=np.intp) * _INNER
        self._bounds = np.cumsum([0, *self._counts])

    def sums(self, rows: NDArray[np.float32]) -> Floats:
        """(n, ensembles) sums of the leaves that (n, features) rows fall into."""
        result = np.zeros((len(rows), len(self._counts)))
        for number, row in enumerate(rows):
            node = np.zeros(len(self._root), dtype=np.intp)
            for _ in range(DEPTH):
                at = self._root + node
                node += node
                node += 1
                node += row[self._feature[at]] >= self._threshold[at]
            leaves = self._leaf[self._root + node + (np.arange(len(node)) - _INNER)]
            running = np.concatenate([[0.0], np.cumsum(leaves, dtype=np.float64)])
            result[number] = np.diff(running[self._bounds])
        return result


def _trees(raw: bytes) -> list[dict]:
    trees: list[dict] = json.loads(raw)["learner"]["gradient_booster"]["model"]["trees"]
    return trees


def _flat(tree: dict) -> tuple[list[int], list[float], list[float]]:
    left, right = tree["left_children"], tree["right_children"]
    feature, value = tree["split_indices"], tree["split_conditions"]
    level, features, thresholds = [0], [0] * 0, [0.0] * 0
    for _ in range(DEPTH):
        below = []
        for node in level:
            if left[node] < 0:  # a leaf: both ways lead to itself
                features.append(0)
                thresholds.append(0.0)
                below += [node, node]
            else:
                features.append(feature[node])
                thresholds.append(value[node])
                below += [left[node], right[node]]
        level = below
    if any(left[node] >= 0 for node in level):
        raise ValueError(f"a tree is deeper than {DEPTH}")
    return features, thresholds, [value[node] for node in level]


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
