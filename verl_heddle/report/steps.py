"""Metrics of a recorded training step: what `compare` and `explain` start from."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

from verl_heddle.report.attribution import step_metrics
from verl_heddle.trajectory import Trajectory

WARM_UP_STEPS = 1
"""The first step pays for compilation and cold caches in every run; with only one step it has to do."""


def metrics_of(trajectories: Sequence[Trajectory], replicas: Sequence[str] = ()) -> dict[str, float]:
    """`step_metrics`, and the mean reward of what was trained on as `reward` (nan where none was recorded)."""
    rewards = [item.reward for item in trajectories if item.reward is not None and item.meta.get("kept", True)]
    return step_metrics(trajectories, replicas) | {"reward": mean(rewards) if rewards else float("nan")}
