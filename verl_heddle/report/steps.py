"""Training steps of a recorded run, and their metrics: what `compare` and `explain` start from."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from statistics import mean

from verl_heddle.report.attribution import step_metrics
from verl_heddle.traces.io import read
from verl_heddle.trajectory import Trajectory

WARM_UP_STEPS = 1
"""The first step pays for compilation and cold caches in every run; with only one step it has to do."""


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
    """`step_metrics`, and the mean reward of what was trained on as `reward` (nan where none was recorded)."""
    rewards = [item.reward for item in trajectories if item.reward is not None and item.meta.get("kept", True)]
    return step_metrics(trajectories, replicas) | {"reward": mean(rewards) if rewards else float("nan")}
