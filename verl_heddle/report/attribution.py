"""Attribute the seconds of a recorded training step: pure arithmetic over its trajectories, shared by W&B, `explain` and `compare`.

The makespan of a step runs from the start of its first trajectory to the end of its last. The trajectory that ended last explains it,
because nothing else made the step longer.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import ne
from statistics import mean
from typing import Any

import numpy as np

from verl_heddle.traces.columns import Columns, Floats, as_columns
from verl_heddle.trajectory import Trajectory, Turn


@dataclass(frozen=True, slots=True)
class Split:
    """Seconds of one trajectory by activity."""

    queue_s: float
    generate_s: float
    tool_s: float
    other_s: float
    """Set-up, routing, transport, parsing between turns, reward and hand-over."""
    paused_s: float = 0.0
    """Waiting for weight updates that interrupted the trajectory."""

    @property
    def total_s(self) -> float:
        return self.queue_s + self.generate_s + self.tool_s + self.other_s + self.paused_s


def split(trajectory: Trajectory) -> Split:
    """Sum the measured intervals of a recorded trajectory; intervals without a measurement count as 0."""
    turns, meta = trajectory.steps, trajectory.meta
    overhead = sum((t.route_s or 0.0) + (t.transport_s or 0.0) + (t.between_s or 0.0) for t in turns)
    return Split(
        queue_s=sum(t.queue_s or 0.0 for t in turns),
        generate_s=sum(t.gen_s or 0.0 for t in turns),
        tool_s=trajectory.tool_s,
        other_s=meta.get("setup_s", 0.0) + overhead + meta.get("score_s", 0.0),
        paused_s=sum(t.paused_s or 0.0 for t in turns),
    )


def wall_s(trajectory: Trajectory) -> float:
    """Seconds from start to end on the wall clock."""
    return trajectory.meta["end_s"] - trajectory.meta["start_s"]


def accounted(trajectory: Trajectory) -> float:
    """Share of the trajectory's wall time covered by measured intervals, in [0, about 1]."""
    wall = wall_s(trajectory)
    return split(trajectory).total_s / wall if wall > 0 else 1.0


def busy_s(turns: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals (start, end), seconds."""
    spans = np.array(list(turns), dtype=np.float64).reshape(-1, 2)
    return _union_s(spans[:, 0], spans[:, 1])


def engine_interval(trajectory: Trajectory, turn: Turn) -> tuple[float, float]:
    """When the turn occupied its replica, from leaving the queue to the last token; Unix seconds."""
    begin = trajectory.meta["start_s"] + (turn.start_s or 0.0) + (turn.route_s or 0.0) + (turn.queue_s or 0.0)
    return begin, begin + (turn.gen_s or 0.0)


def with_batch_wait(trajectories: Sequence[Trajectory]) -> list[Trajectory]:
    """Write to each trajectory's meta how long it waited, once finished, for the last trajectory of its step (`wait_s`)."""
    write_batch_wait([item.meta for item in trajectories])
    return list(trajectories)


def write_batch_wait(metas: Sequence[dict[str, Any]]) -> None:
    """`with_batch_wait` on the metas alone."""
    last: dict[tuple[int, bool], float] = defaultdict(float)
    for meta in metas:
        key = (meta["step"], meta["validate"])
        last[key] = max(last[key], meta["end_s"])
    for meta in metas:
        meta["wait_s"] = last[meta["step"], meta["validate"]] - meta["end_s"]


def step_metrics(trajectories: Columns | Sequence[Trajectory], replicas: Sequence[str] = ()) -> dict[str, float]:
    """Metrics of one training step under W&B names without the `heddle/` prefix. Cost: about 1 microsecond a turn; GPUs wait for it.

    Args:
        trajectories: recorded trajectories of the step, at least one.
        replicas: names of all replicas, so that a replica that served nothing counts as idle throughout.
    """
    table = as_columns(trajectories)
    metas, spent = table.metas, _Spent.of(table)
    begin, longest = float(spent.starts.min()), int(spent.ends.argmax())
    makespan = max(float(spent.ends[longest]) - begin, 1e-9)
    lengths = table.per_trajectory(table.numbers("output_tokens"))
    metrics = {
        "makespan_s": makespan,
        "last/queue_s": float(spent.queue[longest]),
        "last/generate_s": float(spent.generate[longest]),
        "last/tool_s": float(spent.tool[longest]),
        "last/other_s": float(spent.other[longest]),
        "last/late_start_s": float(spent.starts[longest]) - begin,
        "tokens_per_s": float(lengths.sum()) / makespan,
        "tail_ratio_time": float(spent.durations.max()) / max(1e-9, float(np.median(spent.durations))),
        "wait_share": sum(meta.get("wait_s", 0.0) for meta in metas) / (makespan * len(table)),
        **_common(table, spent, lengths),
    }
    names = table.turns["replica"]
    code = {name: number for number, name in enumerate(sorted({name for name in names if name is not None} | set(replicas)))}
    where = np.array([-1 if name is None else code[name] for name in names], dtype=np.int64)
    times = {name: np.nan_to_num(table.numbers(name)) for name in ("start_s", "route_s", "queue_s", "gen_s")}
    froms = np.repeat(spent.starts, table.counts) + times["start_s"] + times["route_s"] + times["queue_s"]
    untils = froms + times["gen_s"]
    idle = [1.0 - min(1.0, _union_s(froms[where == number], untils[where == number]) / makespan) for number in code.values()]
    metrics |= {f"idle_share/replica_{i}": share for i, share in enumerate(idle)}
    if idle:
        metrics["idle_share/mean"] = sum(idle) / len(idle)
    return metrics


def window_metrics(trajectories: Columns | Sequence[Trajectory], seconds: float, step: int) -> dict[str, float]:
    """Metrics of the window between two batches of an asynchronous trainer, W&B names without the `heddle/` prefix. There is no makespan,
    because trajectories outlive batches.

    Args:
        trajectories: those that ended in the window, at least one.
        seconds: length of the window.
        step: the training step whose batch ends the window.
    """
    table = as_columns(trajectories)
    spent = _Spent.of(table)
    lengths = table.per_trajectory(table.numbers("output_tokens"))
    total = max(1e-9, float(spent.durations.sum()))
    legs = np.nan_to_num(table.numbers("legs"))
    ages = step - np.array([meta["step"] for meta in table.metas], dtype=np.float64)
    return {
        "window_s": seconds,
        "tokens_per_s": float(lengths.sum()) / max(seconds, 1e-9),
        "generate_share": float(spent.generate.sum()) / total,
        "tool_share": float(spent.tool.sum()) / total,
        "paused_share": float(spent.paused.sum()) / total,
        "interrupted_share": float((legs > 1).mean()) if len(legs) else 0.0,
        "interrupted_reread_tokens": float(np.nansum(table.numbers("reread_tokens"))),
        "age_steps/mean": float(ages.mean()),
        "age_steps/max": float(ages.max()),
        **_common(table, spent, lengths),
    }


@dataclass(frozen=True, slots=True)
class _Spent:
    """Seconds by activity, one value per trajectory."""

    starts: Floats
    ends: Floats
    queue: Floats
    generate: Floats
    tool: Floats
    paused: Floats
    other: Floats

    @classmethod
    def of(cls, table: Columns) -> _Spent:
        metas = table.metas
        starts, ends = (np.array([meta[name] for meta in metas], dtype=np.float64) for name in ("start_s", "end_s"))
        names = ("queue_s", "gen_s", "tool_latency_s", "paused_s", "route_s", "transport_s", "between_s")
        queue, generate, tool, paused, route, transport, between = (table.per_trajectory(table.numbers(name)) for name in names)
        around = np.array([meta.get("setup_s", 0.0) + meta.get("score_s", 0.0) for meta in metas])
        return cls(starts, ends, queue, generate, tool, paused, route + transport + between + around)

    @property
    def durations(self) -> Floats:
        return self.ends - self.starts


def _common(table: Columns, spent: _Spent, lengths: Floats) -> dict[str, float]:
    """Metrics shared by synchronous and asynchronous trainers."""
    metas, durations = table.metas, spent.durations
    finished = np.array([meta["outcome"] == "finished" for meta in metas])
    known = spent.queue + spent.generate + spent.tool + spent.paused + spent.other
    covered = np.divide(known, durations, out=np.ones_like(durations), where=durations > 0)
    metrics = {
        "tail_ratio_tokens": float(lengths.max()) / max(1.0, float(np.median(lengths))),
        "trajectories": len(table),
        "turns": int(table.counts.sum()),
        "tokens": int(lengths.sum()),
        "queue_share": float(spent.queue.sum()) / max(1e-9, float(durations.sum())),
        "accounted_share_worst": float(covered[finished].min()) if finished.any() else 1.0,
        "preemptions": int(np.nansum(table.numbers("preemptions"))),
        "moves": _moves(table),
        **_reading(table),
    }
    for reason, count in Counter(filter(None, table.turns["reason"])).items():
        metrics[f"decisions/{reason}"] = count
    for outcome, count in Counter(str(meta["outcome"]) for meta in metas).items():
        metrics[f"outcomes/{outcome}"] = count
    return metrics


def _reading(table: Columns) -> dict[str, float]:
    """`prefill_tokens`: context tokens that missed the prefix cache. `read_again_tokens` and their share `read_again_share`: those of them
    that the trajectory's previous turn had left in whole cache blocks, so recomputed. Empty if engines do not report cache hits."""
    context, cached, made = (table.numbers(name) for name in ("ctx_tokens", "cached_tokens", "output_tokens"))
    if not np.isfinite(cached + context).any():
        return {}
    left = np.roll(context + made, 1)  # by the previous turn
    first = np.cumsum(table.counts) - table.counts
    left[first[first < len(left)]] = 0.0
    block = max(1, int(np.gcd.reduce(cached[np.isfinite(cached)].astype(np.int64))))  # hits are whole blocks
    read = float(np.nansum(np.maximum(0.0, context - cached)))
    again = float(np.nansum(np.maximum(0.0, np.minimum(left, context) // block * block - cached)))
    return {"prefill_tokens": read, "read_again_tokens": again, "read_again_share": again / max(1.0, read)}


def _moves(table: Columns) -> int:
    """Turns that ran on a different replica than the previous turn."""
    count, first = 0, 0
    names = table.turns["replica"]
    for head in table.heads:
        replicas = names[first : first + head.turns]
        first += head.turns
        count += sum(map(ne, replicas, replicas[1:]))
    return count


def _union_s(froms: Floats, untils: Floats) -> float:
    """`busy_s` on arrays."""
    order = np.argsort(froms, kind="stable")
    froms, untils = froms[order], untils[order]
    reached = np.concatenate([[-np.inf], np.maximum.accumulate(untils)[:-1]]) if len(untils) else untils
    return float(np.maximum(0.0, untils - np.maximum(froms, reached)).sum())


WARM_UP_STEPS = 1
"""Steps skipped at the start of a run, which pay for compilation and cold caches; a run of one step is not skipped."""


def metrics_of(trajectories: Sequence[Trajectory], replicas: Sequence[str] = ()) -> dict[str, float]:
    """`step_metrics` plus `reward`: the mean reward of the trajectories trained on (nan if none was recorded)."""
    rewards = [item.reward for item in trajectories if item.reward is not None and item.meta.get("kept", True)]
    return step_metrics(trajectories, replicas) | {"reward": mean(rewards) if rewards else float("nan")}
