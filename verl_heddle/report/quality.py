"""How good the predictions of a recorded step were: what was believed when a turn began, against what came."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from verl_heddle.predict.score import pearson, recall, spearman
from verl_heddle.traces.columns import Columns, as_columns
from verl_heddle.trajectory import Trajectory

AFTER_TURNS = (0, 2)
"""Looked at when a trajectory begins, and when two turns have shown something of it."""

FEWEST = 10
"""Trajectories below which a correlation says nothing."""


def prediction_quality(trajectories: Columns | Sequence[Trajectory]) -> dict[str, float]:
    """W&B numbers without the `heddle/` prefix, on log tokens remaining; trajectories cut off by a limit are left out.

    `predict/<metric>_after_<turns>`: spearman, pearson, recall20 (share of the longest 20 % found), bias (mean of log predicted / true),
    below_upper (share below the predicted 0.9 quantile).
    """
    table = as_columns(trajectories)
    counts, tokens = table.counts, np.nan_to_num(table.numbers("output_tokens"))
    before = np.concatenate([[0.0], np.cumsum(tokens)])  # tokens of all turns up to each
    first = np.cumsum(counts) - counts
    remaining, upper = table.numbers("predicted_remaining"), table.numbers("predicted_upper")
    whole = np.array([not meta.get("truncated") and meta.get("outcome", "finished") == "finished" for meta in table.metas], dtype=bool)
    metrics: dict[str, float] = {}
    for turns in AFTER_TURNS:
        shown = whole & (counts > turns)
        at, end = (first + turns)[shown], (first + counts)[shown]
        known = ~np.isnan(remaining[at])
        at, end = at[known], end[known]
        if len(at) < FEWEST:
            continue
        said = np.maximum(1.0, remaining[at])
        high = np.where(np.isnan(upper[at]) | (upper[at] == 0), said, np.maximum(1.0, upper[at]))
        truth, said, high = np.log(np.maximum(1.0, before[end] - before[at])), np.log(said), np.log(high)
        metrics |= {
            f"predict/spearman_after_{turns}": spearman(truth, said),
            f"predict/pearson_after_{turns}": pearson(truth, said),
            f"predict/recall20_after_{turns}": recall(truth, said),
            f"predict/bias_after_{turns}": float((said - truth).mean()),
            f"predict/below_upper_after_{turns}": float((truth <= high).mean()),
        }
    return metrics
