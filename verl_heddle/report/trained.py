"""Of the trajectories that end under an asynchronous trainer, which are trained on, and which are dropped as too stale.

What is trained on is what ended soon enough: the metrics here show how much shorter that is.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from verl_heddle.traces.columns import Columns


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
