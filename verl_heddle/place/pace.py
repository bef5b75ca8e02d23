"""Converts a latency model into seconds per token, and tracks the trajectory means that the conversion needs.

Law: k trajectories are resident on a replica, with contexts of c tokens; d of them want to decode at any moment, the rest are in tools.
A token of one of them takes

    tau(k) = step + tool_s        d = k * step / tau(k)
    step = [decode_s(tp, b, c) + b * read / turn_tokens] * max(1, d / room)        b = min(d, room)
    read = seconds to prefill a turn's new input, or, in a share `lost` of the turns, to recompute the whole context
    lost = (k - held) / (k - d) within 0 and 1

by fixed-point iteration. held = contexts that fit the KV cache; room = the most that decode at once, the lesser of slots and `held`; beyond
it trajectories take turns. A prefix is evicted least recently used first. If it lives for A seconds, waiting takes W and tools are
exponential with mean T, then lambda * E[min(W + tool, A)] = held - b prefixes of those that do not run are kept, lambda * (W + T) = k - b,
and the share P(W + tool > A) that comes back too late is `lost`. Without tools all trajectories wait equally long, and one context too
many makes all of them recompute theirs: overload costs far more than its decoding. tool_s = seconds in tools per generated token, which
does not depend on load.
Invariant: tau is non-decreasing in k. Source: the cost model of `simulate/engine.py` and its prefix cache, averaged.

Law of the means, taken from the planner's own events: tokens per turn and context growth per token average all turns since the start of
the run, with old turns faded (`FADE`); the context is the mean over live trajectories; tool seconds per token come from their estimates.
Cost: `ROUNDS` vectorised calls of the latency model; O(1) per event. `habit` is read only when `due`, since tables are rebuilt from it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import log
from typing import Any, NamedTuple, Protocol

import numpy as np

from verl_heddle.fleet import Replica
from verl_heddle.place.cost import Degree, Floats
from verl_heddle.predict.quantities import Estimate
from verl_heddle.trajectory import Trajectory

ROUNDS = 6
"""Iterations of the fixed point; it contracts by at least the share of time in tools, and times are known to a percent at best."""

COUNTS = 40
"""Batch sizes at which a `Tempo` is kept, in even ratios: linear between them in log k, within 1 % up to 2,000 trajectories."""


class Latency(Protocol):
    """Latency model interface the planner needs, in seconds; implemented by `verl_heddle.latency.LatencyModel`."""

    def decode_s(self, tp: int, batch: Any, context_tokens: Any, /) -> Any:
        """One decode step; numbers or arrays that broadcast."""

    def prefill_s(self, tp: int, new_tokens: Any, context_tokens: Any = 0, /) -> Any:
        """Prefill of new tokens after cached ones, alone on the replica."""


class Habit(NamedTuple):
    """Mean behaviour of current trajectories."""

    context_tokens: float = 1000.0
    """Context at the time of the estimate."""
    growth: float = 1.0
    """Context growth per generated token: 1 plus tool output."""
    turn_tokens: float = 500.0
    """Generated in a turn."""
    tool_s: float = 0.0
    """Seconds in tools per generated token."""

    @property
    def input_tokens(self) -> float:
        """New input of a turn."""
        return max(0.0, self.growth - 1.0) * self.turn_tokens


def habit_of(trajectories: Iterable[Trajectory]) -> Habit | None:
    """Mean behaviour of ended trajectories, from their start; None if they generated nothing."""
    items = list(trajectories)
    tokens = sum(item.output_tokens for item in items)
    if not tokens:
        return None
    turns = sum(len(item.steps) for item in items)
    fresh = sum(turn.input_tokens or 0 for item in items for turn in item.steps)
    prompt = sum(item.prompt_tokens or 0 for item in items) / len(items)
    return Habit(max(1.0, prompt), 1.0 + fresh / tokens, tokens / turns, sum(item.tool_s for item in items) / tokens)


def pace(latency: Latency, replica: Replica, together: Floats, context_tokens: Floats | float, habit: Habit) -> Floats:
    """tau with `together` trajectories of this context (both broadcast); non-decreasing along the last axis if `together` is.

    Raises:
        ValueError: a number of `habit` is negative, or no tokens are generated in a turn.
    """
    if min(habit) < 0 or not habit.turn_tokens > 0:
        raise ValueError(f"a habit's numbers must not be negative, and a turn generates tokens; got {habit}")
    tp, (count, context) = replica.tp, np.broadcast_arrays(np.asarray(together, dtype=np.float64), np.maximum(context_tokens, 1.0))
    held = np.full(context.shape, np.inf) if replica.kv_tokens is None else replica.kv_tokens / context
    room = np.maximum(1.0, np.minimum(replica.slots, held))
    first = latency.prefill_s(tp, np.ones_like(context), context)
    fresh = np.maximum(0.0, latency.prefill_s(tp, np.full_like(context, 1.0 + habit.input_tokens), context) - first)
    again = np.maximum(fresh, latency.prefill_s(tp, context, np.zeros_like(context)) - first)

    def step(wanting: Floats) -> Floats:
        batch = np.clip(wanting, 1.0, room)
        lost = np.clip((count - held) / np.maximum(count - wanting, 1e-9), 0.0, 1.0)
        reading = batch * (fresh + lost * (again - fresh)) / habit.turn_tokens
        seconds = (latency.decode_s(tp, batch, context) + reading) * np.maximum(1.0, wanting / room)
        return np.asarray(seconds, dtype=np.float64)

    seconds = step(count)
    for _ in range(ROUNDS if habit.tool_s else 0):
        seconds = step(count * seconds / (seconds + habit.tool_s))
    return np.asarray(np.maximum.accumulate(seconds, axis=-1) + habit.tool_s, dtype=np.float64)


def degree(latency: Latency, replica: Replica, most: int, habit: Habit) -> Degree:
    """A table of `pace` for the exact solver: up to `most` trajectories on replicas like this one, waiting for slots and KV included."""
    together = np.arange(1, most + 1, dtype=np.float64)
    return Degree(replica.tp, pace(latency, replica, together, habit.context_tokens, habit))


class Tempo:
    """tau along a grid of generated tokens, while contexts grow; `at` interpolates in the number of trajectories."""

    def __init__(self, latency: Latency, replica: Replica, grid: Floats, most: float, habit: Habit) -> None:
        most = max(2.0, most)
        counts = np.geomspace(1.0, most, COUNTS)
        contexts = habit.context_tokens + habit.growth * grid
        self._per_log = (COUNTS - 1) / log(most)
        self._tau = pace(latency, replica, counts[None, :], contexts[:, None], habit)
        self._slope = np.diff(self._tau, axis=1)
        self._rows = np.arange(len(grid))

    def at(self, together: Floats) -> Floats:
        """Seconds per token at each point of the grid, shape [..., grid]; below 1 trajectory as for 1, beyond the most on the last line."""
        place = np.log(np.maximum(together, 1.0)) * self._per_log
        cell = np.minimum(place.astype(np.intp), COUNTS - 2)
        tau: Floats = self._tau[self._rows, cell] + (place - cell) * self._slope[self._rows, cell]
        return tau


FADE = 1.0 - 1.0 / 4096
"""Per turn: a usual step has thousands of turns, and the next step runs a different policy."""

RETUNE = 64
"""Events between updates, or a quarter of the trajectories if there are more than 256."""

UNSEEN = Habit()
"""Used until the first turn has ended."""


class TrajectoryMeans:
    """See the module."""

    def __init__(self) -> None:
        self._turns = self._output = self._input = 0.0
        self._events = self._covers = 0

    def answered(self, tokens: int) -> None:
        """A turn starts with `tokens` new tokens in its context."""
        self._input += max(0, tokens)

    def spoke(self, tokens: int) -> None:
        """A turn ended after generating `tokens`."""
        self._turns, self._output, self._input = FADE * self._turns + 1, FADE * self._output + tokens, FADE * self._input

    def due(self, live: int) -> bool:
        """Count an event; returns whether an update is due. True marks the update as done."""
        self._events += 1
        if live <= self._covers and self._events < max(RETUNE, live // 4):
            return False
        self._events, self._covers = 0, 2 * live
        return True

    def look_again(self) -> None:
        """Make an update due at the next event."""
        self._covers = -1

    @property
    def covers(self) -> float:
        """Number of trajectories above which an update is due."""
        return float(max(2, self._covers))

    def habit(self, living: LiveTotals) -> Habit:
        """Habit from the contexts and estimates of all live trajectories."""
        context = living.context / max(1, living.count)
        tool_s = living.tool_s / max(living.tokens, 1.0)
        if not self._output:
            return UNSEEN._replace(context_tokens=context, tool_s=tool_s)
        return Habit(context, 1.0 + self._input / self._output, max(1.0, self._output / self._turns), tool_s)


@dataclass(slots=True)
class LiveTotals:
    """Sums over all live trajectories, updated on every event."""

    count: int = 0
    context: int = 0
    logs: float = 0.0
    """Of log median tokens left."""
    tokens: float = 0.0
    tool_s: float = 0.0

    def come(self, context: int, left: Estimate) -> None:
        """Add a trajectory."""
        self.count += 1
        self.context += context
        self._add(left, 1)

    def go(self, context: int, left: Estimate) -> None:
        """Remove a trajectory; the sums are exactly 0 once none is live."""
        self.count -= 1
        self.context -= context
        self._add(left, -1)
        if not self.count:
            self.logs = self.tokens = self.tool_s = 0.0

    def change(self, before: Estimate, left: Estimate) -> None:
        """Replace a trajectory's estimate."""
        self._add(before, -1)
        self._add(left, 1)

    @property
    def usual_log(self) -> float:
        """Mean log median."""
        return self.logs / max(1, self.count)

    def _add(self, left: Estimate, sign: int) -> None:
        self.logs += sign * log(max(left.median_tokens, 1.0))
        self.tokens += sign * left.median_tokens
        self.tool_s += sign * left.tool_s
