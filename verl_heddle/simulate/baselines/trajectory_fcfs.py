"""Trajectory-FCFS: inside the replica, the trajectory that arrived first runs first.

Law: priority = position of the trajectory's first turn among all first turns. It never changes, so a trajectory that has begun stays ahead
of all later ones, and its context stays in the KV cache. Placement is verl's own. Under KV pressure vLLM preempts the worst priority, which
is the trajectory that arrived last. It needs neither predictions nor a custom scheduler, so every predictive policy must beat it.
Source: first come, first served over programs instead of calls, the usual baseline of program-level scheduling (Autellix, arXiv 2502.13965;
Continuum, arXiv 2511.02230). Needs `EngineOptions(order="priority")`. Cost: O(1) per turn.
"""

from __future__ import annotations

from dataclasses import replace

from verl_heddle.simulate.baselines.stock import Stock
from verl_heddle.trajectory import Decision, TrajectoryEnd, TurnStart


class TrajectoryFcfs(Stock):
    """First trajectory first, with verl's placement."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self._arrival: dict[str, int] = {}
        self._arrived = 0

    def turn_started(self, turn: TurnStart, now: float) -> Decision:
        """verl's placement, with the arrival number of the trajectory as priority."""
        key = turn.trajectory.key
        if key not in self._arrival:
            self._arrival[key] = self._arrived
            self._arrived += 1
        return replace(super().turn_started(turn, now), priority=self._arrival[key])

    def trajectory_ended(self, end: TrajectoryEnd, now: float) -> None:
        """Forget the arrival number."""
        super().trajectory_ended(end, now)
        self._arrival.pop(end.trajectory.key, None)
