"""Which batch every turn ran in, from the turns' own intervals on one replica.

Law: a turn is in the batch from the end of its prefill to its last token; its context grows evenly from what it read to that plus what
it wrote. Between two events (a turn joining or leaving) the batch is constant and the total context linear in time, so means over any
turn's interval are differences of prefix sums. Source: derived here. Cost: O(n log n) for n turns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Work:
    """One turn as its replica saw it: seconds on a common clock, tokens."""

    begin_s: float
    """When it left the queue."""
    end_s: float
    new_tokens: float
    """Prefilled: not in the cache."""
    context_tokens: float
    """Read in all, before the first output token."""
    output_tokens: float
    usable: bool = True
    """Whether its duration is to be explained; all turns load the replica."""


@dataclass(frozen=True, slots=True)
class BatchHistory:
    """Per turn, in the order given, each of shape [turns]."""

    batch: Array
    """Sequences decoding, the mean over the turn's decode steps, itself included."""
    total_context: Array
    """Sum of their contexts, tokens, likewise."""
    prefilled_tokens: Array
    """Tokens that were prefilled during the turn: its own and those of turns that began within it."""


def batch_history(works: Sequence[Work], parameters: Sequence[float] | Array) -> BatchHistory:
    """Rebuild what ran beside each turn.

    Args:
        works: the turns of one replica, at least one.
        parameters: (a, b, c, p) of `verl_heddle.latency.calibrate` as far as known; zeros weigh all times alike and count no prefill time.
    """
    a, b, c, p = map(float, parameters)
    origin = min(work.begin_s for work in works)  # small numbers keep the sums precise
    begin = np.array([work.begin_s for work in works]) - origin
    end = np.array([work.end_s for work in works]) - origin
    new, context, output = (np.array([getattr(work, name) for work in works]) for name in ("new_tokens", "context_tokens", "output_tokens"))
    # A prefill estimate longer than the turn itself cannot be right; half of it leaves time to decode in.
    decode = begin + np.minimum(a + p * new, 0.5 * (end - begin))
    rate = output / (end - decode)

    order = np.argsort(np.concatenate([decode, end]), kind="stable")
    times = np.concatenate([decode, end])[order]
    sign = np.concatenate([np.ones(len(works)), -np.ones(len(works))])[order]
    who = np.concatenate([np.arange(len(works))] * 2)[order]
    middle, length = 0.5 * (times[:-1] + times[1:]), np.diff(times)
    count = np.maximum(np.cumsum(sign)[:-1], 1.0)
    slope = np.cumsum(sign * rate[who])[:-1]
    offset = np.cumsum(sign * (context - rate * decode)[who])[:-1]
    total = np.maximum(offset + slope * middle, 0.0)

    step = a + b * count + c * total
    weight = length / step if step.min() > 0 else length
    reached = {
        name: np.concatenate([[0.0], np.cumsum(weight * part)]) for name, part in (("steps", 1.0), ("count", count), ("total", total))
    }
    first, last = np.searchsorted(times, decode, "left"), np.searchsorted(times, end, "left")
    steps = np.maximum(reached["steps"][last] - reached["steps"][first], 1e-300)
    batch = (reached["count"][last] - reached["count"][first]) / steps
    mean_total = (reached["total"][last] - reached["total"][first]) / steps

    by_begin = np.argsort(begin, kind="stable")
    tokens = np.concatenate([[0.0], np.cumsum(new[by_begin])])
    # A slot is often taken in the very step that frees it, and clocks differ: half a step decides on which side of an edge a start lies.
    half_step = 0.5 * (end - begin) / np.maximum(output, 1.0)
    low, high = (np.searchsorted(begin[by_begin], edge - half_step, "left") for edge in (begin, end))
    return BatchHistory(np.maximum(batch, 1.0), mean_total, tokens[high] - tokens[low])
