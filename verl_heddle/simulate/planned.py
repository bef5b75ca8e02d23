"""A policy that only places turns, with the planner of `Orchestrator` (`Replanner`), to measure placement alone.

All priorities are 0, as in stock verl.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from verl_heddle.fleet import Replica
from verl_heddle.place.decisions import LAST_PRIORITY, Expected
from verl_heddle.place.replan import Replanner
from verl_heddle.predict.quantities import Estimate
from verl_heddle.trajectory import Decision, Prewarm, Trajectory, TrajectoryEnd, TrajectoryId, TurnEnd, TurnStart


class Predicts(Protocol):
    """`predict.predictor.Predictor` or `simulate.foresight.Foresight`."""

    def turn_started(self, turn: TurnStart) -> Any: ...
    def turn_finished(self, turn: TurnEnd) -> Any: ...
    def trajectory_ended(self, end: TrajectoryEnd) -> Any: ...
    def predict(self, key: str) -> Estimate | None: ...


class Planned:
    """A `Policy` that places turns as `planner` decides on the predictions of `predictor`."""

    def __init__(self, planner: Replanner, predictor: Predicts, prewarm: bool = True) -> None:
        self.planner, self.predictor = planner, predictor
        self.counts: Counter[str] = Counter()
        """Decisions by reason."""
        self._prewarm = prewarm

    def announce(self, batch: Sequence[Trajectory], step: int = 0) -> None:
        """Announce the step's trajectories to the planner, with the ids that the simulator assigns. Call `replicas_added` first."""
        expected = []
        for item in batch:
            identity = TrajectoryId(item.prompt_id, f"{step}:{item.prompt_id}", item.trial, step)
            prompt = item.prompt_tokens or 0
            self.predictor.turn_started(TurnStart(identity, identity.key, 0, prompt, 0))
            expected.append(Expected(identity, prompt, self.predictor.predict(identity.key)))
        self.planner.expect(expected)

    def replicas_added(self, replicas: Iterable[Replica]) -> None:
        """Replicas joined. Known ones keep their state, because the same policy may run several steps."""
        for replica in replicas:
            if replica.name not in self.planner.inflight:
                self.planner.add(replica)

    def replicas_removed(self, names: Iterable[str]) -> None:
        """Replicas left."""
        for name in names:
            self.planner.remove(name)

    def turn_started(self, turn: TurnStart, now: float) -> Decision:
        """Predict what remains, and place the turn."""
        self.predictor.turn_started(turn)
        estimate = self.predictor.predict(turn.trajectory.key)
        replica, reason = self.planner.acquire(turn, estimate)
        self.counts[reason] += 1
        return Decision(replica, 0, reason, None if estimate is None else estimate.median_tokens)

    def turn_finished(self, turn: TurnEnd, now: float) -> list[Prewarm]:
        """Update the prediction; pre-warm the target if the planner moves the trajectory."""
        self.predictor.turn_finished(turn)
        move = self.planner.release(turn, self.predictor.predict(turn.trajectory.key))
        return [Prewarm(move.trajectory, move.replica, LAST_PRIORITY)] if move is not None and self._prewarm else []

    def trajectory_ended(self, end: TrajectoryEnd, now: float) -> None:
        """Remove the trajectory from the predictor and the planner."""
        self.predictor.trajectory_ended(end)
        self.planner.ended(end)
