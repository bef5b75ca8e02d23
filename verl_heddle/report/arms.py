"""Arms side by side: one recorded trace per arm in, one table out."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, median

from verl_heddle.report.attribution import step_metrics
from verl_heddle.traces.io import read
from verl_heddle.trajectory import Trajectory

WARM_UP_STEPS = 1
"""The first step pays for compilation and cold caches in every arm; with only one step it has to do."""

COLUMNS = (
    ("makespan s", "makespan_s", "{:.2f}"),
    ("tokens/s", "tokens_per_s", "{:.0f}"),
    ("reward", "reward", "{:.3f}"),
    ("tail ratio", "tail_ratio_time", "{:.2f}"),
    ("tail (tokens)", "tail_ratio_tokens", "{:.2f}"),
    ("queue", "last/queue_s", "{:.2f}"),
    ("generate", "last/generate_s", "{:.2f}"),
    ("tool", "last/tool_s", "{:.2f}"),
    ("other", "last/other_s", "{:.2f}"),
)
"""Heading, metric of `step_metrics`, format. The last four split the life of the trajectory that ended last, seconds."""


@dataclass(frozen=True, slots=True)
class Arm:
    """`steps`: metrics of each training step, in order."""

    name: str
    steps: tuple[dict[str, float], ...]

    def median(self, metric: str) -> float:
        """Median over the steps after the warm-up."""
        measured = self.steps[WARM_UP_STEPS:] or self.steps
        return median(step.get(metric, 0.0) for step in measured)


def read_arm(name: str, trace: str | os.PathLike[str]) -> Arm:
    """Metrics of each training step of a recorded run; a step that was recorded again (resumed, repeated) counts as in its latest run.

    Raises:
        TraceError: there is no such trace or it is damaged.
        ValueError: it holds no training trajectory.
    """
    return Arm(name, tuple(metrics_of(trajectories) for trajectories in training_steps(trace).values()))


def training_steps(trace: str | os.PathLike[str]) -> dict[int, list[Trajectory]]:
    """The training trajectories of a recorded run by step, ascending, as recorded in the step's latest run.

    Raises:
        TraceError: there is no such trace or it is damaged.
        ValueError: it holds no training trajectory, or was not recorded by a live run.
    """
    steps: dict[int, dict[str, list[Trajectory]]] = defaultdict(lambda: defaultdict(list))
    for trajectory in read(trace):
        if not trajectory.meta.get("validate"):
            if not {"step", "start_s", "end_s"} <= set(trajectory.meta):
                raise ValueError(f"{trace}: not recorded by a live run (no step, start_s and end_s in meta)")
            steps[trajectory.meta["step"]][trajectory.meta.get("run", "")].append(trajectory)
    if not steps:
        raise ValueError(f"{trace}: no training trajectories")
    return {step: runs[max(runs)] for step, runs in sorted(steps.items())}


def metrics_of(trajectories: Sequence[Trajectory], replicas: Sequence[str] = ()) -> dict[str, float]:
    """`step_metrics`, and the mean reward as `reward` (nan where none was recorded)."""
    rewards = [item.reward for item in trajectories if item.reward is not None]
    return step_metrics(trajectories, replicas) | {"reward": mean(rewards) if rewards else float("nan")}


def table(arms: Mapping[str, Arm]) -> str:
    """Medians per arm as text, and below it the makespan ratio of every arm to the first."""
    rows = [["arm", "steps", *(heading for heading, _, _ in COLUMNS)]]
    for arm in arms.values():
        rows.append([arm.name, str(len(arm.steps)), *(form.format(arm.median(metric)) for _, metric, form in COLUMNS)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    first, *others = arms.values()
    for arm in others:
        ratio = first.median("makespan_s") / arm.median("makespan_s")
        lines.append(f"makespan {first.name} / {arm.name}: {ratio:.2f}x")
    return "\n".join(lines)
