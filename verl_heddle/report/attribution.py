"""Where the seconds of a step went: pure arithmetic over recorded trajectories, shared by W&B, `explain` and `compare`.

The makespan of a step runs from its first trajectory's start to its last one's end. It is explained by the trajectory that ended
last, because nothing else made the step longer.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from verl_heddle.trajectory import Trajectory, Turn


@dataclass(frozen=True, slots=True)
class Split:
    """Seconds of one trajectory's life by what it was doing."""

    queue_s: float
    generate_s: float
    tool_s: float
    other_s: float
    """Set-up, routing, transport, parsing between turns, reward and hand-over."""

    @property
    def total_s(self) -> float:
        return self.queue_s + self.generate_s + self.tool_s + self.other_s


def split(trajectory: Trajectory) -> Split:
    """The measured intervals of a recorded trajectory; what was not measured is not in it."""
    turns, meta = trajectory.steps, trajectory.meta
    overhead = sum((t.route_s or 0.0) + (t.transport_s or 0.0) + (t.between_s or 0.0) for t in turns)
    return Split(
        queue_s=sum(t.queue_s or 0.0 for t in turns),
        generate_s=sum(t.gen_s or 0.0 for t in turns),
        tool_s=trajectory.tool_s,
        other_s=meta.get("setup_s", 0.0) + overhead + meta.get("score_s", 0.0),
    )


def wall_s(trajectory: Trajectory) -> float:
    """Seconds from start to end on the wall clock."""
    return trajectory.meta["end_s"] - trajectory.meta["start_s"]


def accounted(trajectory: Trajectory) -> float:
    """Share of the trajectory's wall time that its measured intervals cover, in [0, about 1]."""
    wall = wall_s(trajectory)
    return split(trajectory).total_s / wall if wall > 0 else 1.0


def busy_s(turns: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals (start, end), seconds."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(turns):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def engine_interval(trajectory: Trajectory, turn: Turn) -> tuple[float, float]:
    """When the turn occupied its replica, unix seconds: from leaving the queue to the last token."""
    begin = trajectory.meta["start_s"] + (turn.start_s or 0.0) + (turn.route_s or 0.0) + (turn.queue_s or 0.0)
    return begin, begin + (turn.gen_s or 0.0)


def with_batch_wait(trajectories: Sequence[Trajectory]) -> list[Trajectory]:
    """Write into each trajectory's meta how long it waited, finished, for the last of its step (`wait_s`)."""
    last: dict[tuple[int, bool], float] = defaultdict(float)
    for item in trajectories:
        key = (item.meta["step"], item.meta["validate"])
        last[key] = max(last[key], item.meta["end_s"])
    for item in trajectories:
        item.meta["wait_s"] = last[item.meta["step"], item.meta["validate"]] - item.meta["end_s"]
    return list(trajectories)


def step_metrics(trajectories: Sequence[Trajectory], replicas: Sequence[str] = ()) -> dict[str, float]:
    """Numbers for one training step, W&B names without the `heddle/` prefix.

    Args:
        trajectories: recorded trajectories of the step, at least one.
        replicas: names of all replicas, so that one that served nothing counts as idle all along.
    """
    begin = min(item.meta["start_s"] for item in trajectories)
    longest = max(trajectories, key=lambda item: item.meta["end_s"])
    makespan = max(longest.meta["end_s"] - begin, 1e-9)
    lengths = [item.output_tokens for item in trajectories]
    durations = [wall_s(item) for item in trajectories]
    last = split(longest)
    turns = [turn for item in trajectories for turn in item.steps]
    metrics = {
        "makespan_s": makespan,
        "last/queue_s": last.queue_s,
        "last/generate_s": last.generate_s,
        "last/tool_s": last.tool_s,
        "last/other_s": last.other_s,
        "last/late_start_s": longest.meta["start_s"] - begin,
        "tokens_per_s": sum(lengths) / makespan,
        "tail_ratio_tokens": max(lengths) / max(1.0, median(lengths)),
        "tail_ratio_time": max(durations) / max(1e-9, median(durations)),
        "trajectories": len(trajectories),
        "turns": len(turns),
        "tokens": sum(lengths),
        "queue_share": sum(split(item).queue_s for item in trajectories) / max(1e-9, sum(durations)),
        "wait_share": sum(item.meta.get("wait_s", 0.0) for item in trajectories) / (makespan * len(trajectories)),
        "accounted_share_worst": min((accounted(item) for item in trajectories if item.meta["outcome"] == "finished"), default=1.0),
        "preemptions": sum(turn.preemptions or 0 for turn in turns),
        "moves": moves(trajectories),
    }
    served: dict[str, list[tuple[float, float]]] = {name: [] for name in replicas}
    for item in trajectories:
        for turn in item.steps:
            if turn.replica is not None:
                served.setdefault(turn.replica, []).append(engine_interval(item, turn))
    idle = [1.0 - min(1.0, busy_s(spans) / makespan) for _, spans in sorted(served.items())]
    metrics |= {f"idle_share/replica_{i}": share for i, share in enumerate(idle)}
    if idle:
        metrics["idle_share/mean"] = sum(idle) / len(idle)
    for reason, count in Counter(turn.reason for turn in turns if turn.reason).items():
        metrics[f"decisions/{reason}"] = count
    for outcome, count in Counter(str(item.meta["outcome"]) for item in trajectories).items():
        metrics[f"outcomes/{outcome}"] = count
    return metrics


def moves(trajectories: Iterable[Trajectory]) -> int:
    """Turns that ran on another replica than the turn before."""
    count = 0
    for item in trajectories:
        homes = [turn.replica for turn in item.steps]
        count += sum(a != b for a, b in pairwise(homes))
    return count
