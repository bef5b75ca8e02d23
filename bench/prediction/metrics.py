"""How good a ranking of the remaining tokens is, with intervals from resampling whole prompts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bench.prediction.replay import Look
from verl_heddle.predict.score import pearson, recall, spearman

DRAWS = 400
"""Bootstrap draws: the bounds of a 95 % interval then repeat within a few per cent of its width."""

METHODS = ("prompt_length", "tokens_so_far", "turn_count", "history", "siblings", "bayes", "heddle", "oracle")
BASELINES = METHODS[:5]
"""What a user could do without us; `bayes` is our own estimate without trees, an ablation."""

METRICS = ("spearman", "pearson", "recall")

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
