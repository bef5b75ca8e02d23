"""How good the predictions of a recorded step were: what was believed when a turn began, against what came."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from verl_heddle.predict.score import pearson, recall, spearman
from verl_heddle.trajectory import Trajectory

AFTER_TURNS = (0, 2)
"""Looked at when a trajectory begins, and when two turns have shown something of it."""

FEWEST = 10
"""Trajectories below which a correlation says nothing."""


def prediction_quality(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """W&B numbers without the `heddle/` prefix, on log tokens remaining; trajectories cut off by a limit are left out.

    `predict/<metric>_after_<turns>`: spearman, pearson, recall20 (share of the longest 20 % found), bias (mean of log predicted / true),
    below_upper (share below the predicted 0.9 quantile).
    """
    metrics: dict[str, float] = {}
    for turns in AFTER_TURNS:
        rows = []
        for item in trajectories:
            if len(item.steps) <= turns or item.meta.get("truncated") or item.meta.get("outcome", "finished") != "finished":
                continue
            turn = item.steps[turns]
            if turn.predicted_remaining is not None:
                left = sum(later.output_tokens or 0 for later in item.steps[turns:])
                rows.append((max(1, left), max(1.0, turn.predicted_remaining), max(1.0, turn.predicted_upper or turn.predicted_remaining)))
        if len(rows) < FEWEST:
            continue
        truth, said, upper = np.log(np.array(rows)).T
        metrics |= {
            f"predict/spearman_after_{turns}": spearman(truth, said),
            f"predict/pearson_after_{turns}": pearson(truth, said),
            f"predict/recall20_after_{turns}": recall(truth, said),
            f"predict/bias_after_{turns}": float((said - truth).mean()),
            f"predict/below_upper_after_{turns}": float((truth <= upper).mean()),
        }
    return metrics
