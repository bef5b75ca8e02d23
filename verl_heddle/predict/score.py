"""Scores a prediction of remaining tokens: three numbers on logs, for the bench and W&B."""

from __future__ import annotations

import numpy as np

from verl_heddle.predict.quantities import Floats

LONGEST = 0.2
"""The tail that a prediction must find: the longest 20 %."""


def spearman(truth: Floats, said: Floats) -> float:
    """Rank correlation, ties at their mean rank; 0 if either side is constant."""
    return pearson(_ranks(truth), _ranks(said))


def pearson(truth: Floats, said: Floats) -> float:
    """Correlation; 0 if either side is constant."""
    return float(np.corrcoef(truth, said)[0, 1]) if np.ptp(truth) > 1e-9 and np.ptp(said) > 1e-9 else 0.0


def recall(truth: Floats, said: Floats) -> float:
    """Share of the truly longest that are among as many predicted longest; ties in the prediction count in proportion."""
    count = max(1, round(LONGEST * len(truth)))
    tail = np.zeros(len(truth), dtype=bool)
    tail[np.argsort(-truth, kind="stable")[:count]] = True
    edge = np.sort(said)[-count]
    above, level = said > edge, said == edge
    return float((tail[above].sum() + tail[level].sum() * (count - above.sum()) / level.sum()) / count)


def _ranks(values: Floats) -> Floats:
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: Floats = (np.cumsum(counts) - (counts - 1) / 2)[which]
    return ranks
