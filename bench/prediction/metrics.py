"""How good a ranking of the remaining tokens is, with intervals from resampling whole prompts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from bench.prediction.replay import Look

LONGEST = 0.2
"""The tail that must be found: the longest 20 %."""

DRAWS = 400
"""Bootstrap draws: the bounds of a 95 % interval then repeat within a few per cent of its width."""

METHODS = ("prompt_length", "tokens_so_far", "turn_count", "history", "siblings", "bayes", "heddle", "oracle")
BASELINES = METHODS[:-2]
METRICS = ("spearman", "pearson", "recall")

Floats = NDArray[np.float64]


def spearman(truth: Floats, said: Floats) -> float:
    """Rank correlation, ties at their mean rank; 0 where nothing is told apart."""
    return pearson(_ranks(truth), _ranks(said))


def pearson(truth: Floats, said: Floats) -> float:
    """Correlation; 0 where nothing is told apart."""
    return float(np.corrcoef(truth, said)[0, 1]) if np.ptp(truth) > 1e-9 and np.ptp(said) > 1e-9 else 0.0


def recall(truth: Floats, said: Floats) -> float:
    """Share of the truly longest that is among the equally many predicted longest; ties in the prediction count in proportion."""
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


_FUNCTIONS = {"spearman": spearman, "pearson": pearson, "recall": recall}


def measure(looks: Sequence[Look], seed: int = 0) -> dict | None:
    """All metrics of all methods, and per metric the best baseline and the 95 % interval of our margin over it; None below 20 looks."""
    if len(looks) < 20:
        return None
    truth = np.log([look.left for look in looks])
    said = {name: np.log([look.says[name] for look in looks]) for name in METHODS}
    upper = np.log([look.upper for look in looks])
    _, which = np.unique([look.group for look in looks], return_inverse=True)
    members = [np.flatnonzero(which == number) for number in range(which.max() + 1)]
    rng = np.random.default_rng(seed)
    draws = [np.concatenate([members[i] for i in rng.integers(len(members), size=len(members))]) for _ in range(DRAWS)]
    result: dict = {"looks": len(looks), "prompts": len(members), "methods": {name: {} for name in METHODS}, "margin": {}}
    for metric in METRICS:
        function = _FUNCTIONS[metric]
        for name in METHODS:
            result["methods"][name][metric] = function(truth, said[name])
        best = max(BASELINES, key=lambda name: result["methods"][name][metric])
        ours = np.array([function(truth[rows], said["heddle"][rows]) for rows in draws])
        theirs = np.array([function(truth[rows], said[best][rows]) for rows in draws])
        low, high = np.quantile(ours - theirs, [0.025, 0.975])
        low_ours, high_ours = np.quantile(ours, [0.025, 0.975])
        margin = result["methods"]["heddle"][metric] - result["methods"][best][metric]
        result["margin"][metric] = {"best": best, "margin": margin, "low": low, "high": high, "ours_low": low_ours, "ours_high": high_ours}
    result["below_upper"] = float((truth <= upper + 1e-9).mean())
    result["bias"] = float((truth - said["heddle"]).mean())
    return result
