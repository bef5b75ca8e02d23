"""Gradient-boosted trees evaluated with numpy, for the few trajectories of one decision.

Law: every tree is stored as a complete binary tree of depth `DEPTH` (node i has children 2i+1 and 2i+2; shallow leaves repeat), so
that all trees take one step down per numpy call: a sum over a thousand trees costs `DEPTH` gathers, about 60 microseconds, where one
call of xgboost costs more than 100 per model. For many rows xgboost's own loop is faster (`predictor`); both give the same sums up to
the order of float32 additions. Rows have no missing values, so default directions do not matter.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from verl_heddle.predict.quantities import Floats

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
