"""A lower bound on the makespan of any schedule: the part of a result that no policy can improve.

`lower_bound` = max(longest, work). It holds for every split of `gpus` GPUs into replicas of the degrees `tps`, and for any placement,
order, preemption and free migration, in the cost model of `engine.py`.

Premises: decode_s is non-decreasing in batch and context; prefilling more of a context adds no less to a step, and prefilling it in two
pieces adds no more (both hold for the formula and for roofline-like tables); the fleet never exceeds `gpus` GPUs.

*longest*: let a trajectory generate a token when its context is c. That step has a batch of b requests with at least c tokens of context in
total, so their mean context is at least c / b, and the step lasts at least

    m(c) = min over degrees tp and batches b <= slots of decode_s(tp, b, c / b)

(on well-behaved hardware the minimum is at b = 1; taking it over all b avoids that premise). The steps that generate a trajectory's tokens
overlap neither each other nor its tools and per-turn overheads, and the step of a turn's first token waits for its prefill. So the
trajectory takes at least the sum of m over its tokens, plus its tools, overheads and prefills. A prompt shared within a group is not
counted here, because a sibling may have computed it.

*work*: a step on a replica of degree tp with b requests of mean context c uses tp * decode_s(tp, b, c) GPU-seconds, at least b * u(c) with

    u(c) = min over tp and feasible b of tp * decode_s(tp, b, c) / b,

where feasible means b <= slots and b * (c - longest shared prompt) <= KV tokens. Let h be the largest convex function below u. Summed over
all tokens of all trajectories, GPU-seconds >= sum over steps of b * h(mean context of the step) >= N * h(C) by Jensen, with N tokens and C
their mean context (averaging within a step is exact: the mean over its requests *is* the argument of decode_s). Prefill adds its own
GPU-seconds: every turn's new tokens at least once, a shared prompt once per group. A makespan T offers at most gpus * T GPU-seconds.

Between sampled contexts, m and u take their value at the next lower sample. It is no larger, so the bound stays valid.
Cost: one vectorised table of (SAMPLES x slots) step times per degree, then O(turns).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from verl_heddle.simulate.layouts import DEFAULT_SLOTS
from verl_heddle.simulate.options import EngineOptions
from verl_heddle.simulate.policy import Latency
from verl_heddle.simulate.workload import states, walk
from verl_heddle.trajectory import Trajectory

Floats = NDArray[np.float64]

SAMPLES = 512
"""Evenly spaced contexts at which step times are sampled: the bound loses less than one part in 500 of its context-dependent part."""


@dataclass(frozen=True, slots=True)
class Bound:
    """The two bounds in seconds; `longest_index` is the trajectory that determines `longest_s`."""

    longest_s: float
    work_s: float
    longest_index: int

    @property
    def makespan_s(self) -> float:
        """The larger of the two bounds, seconds."""
        return max(self.longest_s, self.work_s)


def lower_bound(
    trajectories: Sequence[Trajectory],
    gpus: int,
    latency: Latency,
    tps: Iterable[int],
    *,
    slots: int | Mapping[int, int] = DEFAULT_SLOTS,
    kv_tokens: Mapping[int, int | None] | None = None,
    engine: EngineOptions | None = None,
) -> Bound:
    """The bound for `trajectories` on `gpus` GPUs split into replicas of any of the degrees `tps`.

    Degrees that exceed `gpus` or cannot hold the model are ignored. `slots` and `kv_tokens` are as in `make_fleet`, `engine` as in
    `simulate`; of `engine`, only the overhead and prompt sharing matter.

    Raises:
        ValueError: no degree is left, or `simulate` would reject the trajectories.
    """
    options = engine or EngineOptions()
    degrees = [tp for tp in sorted(set(tps)) if tp <= gpus and latency.fits(tp)]
    if not degrees:
        raise ValueError(f"none of the tensor-parallel degrees {sorted(set(tps))} fits {gpus} GPUs and holds the model")
    work = states(trajectories, options, 0)
    turns = [list(walk(item)) for item in trajectories]
    top = max(context + output for item in turns for context, _, output in item)
    grid = np.unique(np.linspace(0, top, SAMPLES).astype(np.int64)).astype(np.float64)
    reuse = max(state.shared for state in work)
    alone, bulk = np.full(len(grid), np.inf), np.full(len(grid), np.inf)
    for tp in degrees:
        most = slots[tp] if isinstance(slots, Mapping) else slots
        capacity = kv_tokens[tp] if kv_tokens is not None else latency.kv_tokens(tp)
        fast, cheap = _step_times(latency, tp, most, capacity, grid, reuse)
        alone, bulk = np.minimum(alone, fast), np.minimum(bulk, cheap)

    token_sum = _Integral(grid, alone)
    longest, longest_index, gpu_s = 0.0, 0, 0.0
    tokens = context_sum = 0.0
    computed: set[int] = set()
    for index, (state, item) in enumerate(zip(work, turns, strict=True)):
        seconds = sum(turn.tool_latency_s or 0.0 for turn in state.steps) + options.turn_overhead_s * len(state.steps)
        for number, (context, new, output) in enumerate(item):
            seconds += token_sum(context, context + output)
            own = min(new, context - state.shared) if number == 0 and state.shared < context else new
            seconds += min(_prefill(latency, tp, own, context - own) for tp in degrees)
            gpu_s += min(tp * _prefill(latency, tp, own, context - own) for tp in degrees)
            tokens += output
            context_sum += output * (context + 0.5 * (output - 1))
        if state.shared and state.group not in computed:
            computed.add(state.group)
            gpu_s += min(tp * _prefill(latency, tp, state.shared, 0) for tp in degrees)
        if seconds > longest:
            longest, longest_index = seconds, index
    gpu_s += tokens * _convex_floor(grid, bulk, context_sum / tokens)
    return Bound(longest, gpu_s / gpus, longest_index)


def _prefill(latency: Latency, tp: int, new: int, context: int) -> float:
    """Seconds that a turn's prefill adds to steps, computed as in the engine."""
    return latency.prefill_s(tp, new, context) - latency.prefill_s(tp, 1, context) if new > 1 else 0.0


def _step_times(latency: Latency, tp: int, slots: int, capacity: int | None, grid: Floats, reuse: int) -> tuple[Floats, Floats]:
    """m and u of one degree at each context of the grid, each valid as a lower bound up to the next context; shapes [grid]."""
    batch = np.arange(1, slots + 1, dtype=np.float64)[None, :]
    context = grid[:, None]
    fast = np.asarray(latency.decode_s(tp, batch, context / batch)).min(axis=1)
    cost = tp * np.asarray(latency.decode_s(tp, batch, context)) / batch
    if capacity is not None:
        cost = np.where((batch > 1) & (batch * (context - reuse) > capacity), np.inf, cost)
    return fast, cost.min(axis=1)


class _Integral:
    """Sum of a step function over integer contexts: `grid` ascends from 0, and `values[i]` applies from grid[i] to grid[i + 1]."""

    def __init__(self, grid: Floats, values: Floats) -> None:
        self._grid, self._values = grid, values
        self._sums = np.concatenate([[0.0], np.cumsum(np.diff(grid) * values[:-1])])

    def __call__(self, start: float, end: float) -> float:
        low, high = (self._upto(x) for x in (start, end))
        return high - low

    def _upto(self, x: float) -> float:
        cell = min(int(np.searchsorted(self._grid, x, "right")) - 1, len(self._grid) - 1)
        return float(self._sums[cell] + (x - self._grid[cell]) * self._values[cell])


def _convex_floor(grid: Floats, values: Floats, at: float) -> float:
    """The largest convex function below the step function, at one point: the lower hull of the steps' right ends.

    On a step [grid[i], grid[i+1]) a convex function is largest at an end. The values are non-decreasing, so the hull runs over the points
    (grid[i+1], values[i]) and (grid[0], values[0]).
    """
    points = [(float(grid[0]), float(values[0]))]
    points += [(float(right), float(value)) for right, value in zip(grid[1:], values[:-1], strict=True)]
    hull: list[tuple[float, float]] = []
    for x, y in points:
        while len(hull) > 1 and (hull[-1][1] - hull[-2][1]) * (x - hull[-2][0]) >= (y - hull[-2][1]) * (hull[-1][0] - hull[-2][0]):
            hull.pop()
        hull.append((x, y))
    for (x0, y0), (x1, y1) in pairwise(hull):
        if x0 <= at <= x1:
            return y0 + (y1 - y0) * (at - x0) / (x1 - x0)
    return hull[-1][1]
