"""Compute W&B metrics beyond a step's timing: staleness under an asynchronous trainer, and prediction quality.

Staleness: which ended trajectories are trained on and which are dropped as too stale. Only trajectories that end soon enough are trained
on; the metrics show how much shorter they are. Prediction quality: the remaining length predicted when a turn began, against the true one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from verl_heddle.predict.score import pearson, recall, spearman
from verl_heddle.traces.columns import Columns, as_columns
from verl_heddle.trajectory import Trajectory


class Trained:
    """Tracks trajectories that have ended and have not been trained on yet.

    Args:
        fresh_steps: a trajectory that began at least this many steps before the batch is stale and will not be trained on.
    """

    def __init__(self, fresh_steps: int) -> None:
        self._fresh_steps = fresh_steps
        self._ended: dict[str, tuple[int, int]] = {}
        """By trajectory: the step in which it began, and its tokens."""
        self._tokens, self._trained_tokens = [0, 0], [0, 0]
        """[trajectories, tokens] since the start: of those trained on or dropped, and of those trained on."""

    def ended(self, table: Columns) -> None:
        """Record trajectories that have ended."""
        tokens = table.per_trajectory(table.numbers("output_tokens")).astype(int).tolist()
        for head, made in zip(table.heads, tokens, strict=True):
            if head.meta["outcome"] == "finished":
                self._ended[f"{head.meta['uid']}_{head.trial}"] = (head.meta["step"], made)

    def batch(self, keys: Iterable[str], step: int, seconds: float) -> dict[str, float]:
        """Record the batch of a step by verl's keys (`<uid>_<sample>_<output>`); returns metrics named without the `heddle/` prefix."""
        chosen = {key.rpartition("_")[0] for key in keys}
        found = [self._ended.pop(key) for key in chosen if key in self._ended]
        late = [key for key, (began, _) in self._ended.items() if step - began >= self._fresh_steps]
        dropped = [self._ended.pop(key)[1] for key in late]
        tokens = [made for _, made in found]
        for sums, more in ((self._trained_tokens, tokens), (self._tokens, tokens + dropped)):
            sums[0] += len(more)
            sums[1] += sum(more)
        metrics: dict[str, Any] = {
            "trained/tokens_per_s": sum(tokens) / max(seconds, 1e-9),
            "trained/tokens": sum(tokens),
            "dropped/trajectories": len(dropped),
            "dropped/tokens": sum(dropped),
        }
        if found:
            ages = [step - began for began, _ in found]
            metrics |= {"trained/age_steps/mean": sum(ages) / len(ages), "trained/age_steps/max": max(ages)}
        if self._trained_tokens[1]:
            kept, every = (sums[1] / sums[0] for sums in (self._trained_tokens, self._tokens))
            metrics["trained/length_bias"] = kept / every - 1 if every else 0.0
        return {name: float(value) for name, value in metrics.items()}


AFTER_TURNS = (0, 2)
"""Turns after which predictions are scored: at the start of a trajectory, and after two turns of evidence."""

FEWEST = 10
"""Trajectories below which a correlation is meaningless."""


def prediction_quality(trajectories: Columns | Sequence[Trajectory]) -> dict[str, float]:
    """Metrics named without the `heddle/` prefix, on log remaining tokens; truncated and unfinished trajectories are left out.

    `predict/<metric>_after_<turns>`: spearman, pearson, recall20 (share of the longest 20 % found), bias (mean of log predicted / true),
    below_upper (share below the predicted 0.9 quantile).
    """
    table = as_columns(trajectories)
    counts, tokens = table.counts, np.nan_to_num(table.numbers("output_tokens"))
    before = np.concatenate([[0.0], np.cumsum(tokens)])  # tokens of all earlier turns
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
        predicted = np.maximum(1.0, remaining[at])
        high = np.where(np.isnan(upper[at]) | (upper[at] == 0), predicted, np.maximum(1.0, upper[at]))
        truth, predicted, high = np.log(np.maximum(1.0, before[end] - before[at])), np.log(predicted), np.log(high)
        metrics |= {
            f"predict/spearman_after_{turns}": spearman(truth, predicted),
            f"predict/pearson_after_{turns}": pearson(truth, predicted),
            f"predict/recall20_after_{turns}": recall(truth, predicted),
            f"predict/bias_after_{turns}": float((predicted - truth).mean()),
            f"predict/below_upper_after_{turns}": float((truth <= high).mean()),
        }
    return metrics
