"""Of the trajectories that end under an asynchronous trainer, which are trained on, and which are dropped as too stale.

What is trained on is what ended soon enough: the metrics here show how much shorter that is.

How good the predictions of a recorded step were: what was believed when a turn began, against what came.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from verl_heddle.predict.score import pearson, recall, spearman
from verl_heddle.traces.columns import Columns, as_columns
from verl_heddle.trajectory import Trajectory


class Trained:
    """Ended and not trained on yet.

    Args:
        fresh_steps: a trajectory that began so many steps before the batch, or more, will not be trained on any more.
    """

    def __init__(self, fresh_steps: int) -> None:
        self._fresh_steps = fresh_steps
        self._ended: dict[str, tuple[int, int]] = {}
        """By trajectory: the step in which it began, and its tokens."""
        self._tokens, self._trained_tokens = [0, 0], [0, 0]
        """Number and sum, of those trained on or dropped, and of those trained on, since the start."""

    def ended(self, table: Columns) -> None:
        """These trajectories are over."""
        tokens = table.per_trajectory(table.numbers("output_tokens")).astype(int).tolist()
        for head, made in zip(table.heads, tokens, strict=True):
            if head.meta["outcome"] == "finished":
                self._ended[f"{head.meta['uid']}_{head.trial}"] = (head.meta["step"], made)

    def batch(self, keys: Iterable[str], step: int, seconds: float) -> dict[str, float]:
        """The batch of this step, by verl's keys (`<uid>_<sample>_<output>`); numbers for W&B, names without the `heddle/` prefix."""
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
