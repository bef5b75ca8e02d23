"""The resident set (`schedule.residents`) as a policy, for the simulator's tables; the plugin does not hold trajectories this way yet.

Law: a replica's residents are held through tools for t* = C / r, where C is its KV capacity and r the rate at which it reads a prompt alone
(`READ_TOKENS` at once), both from the latency model. A turn's vLLM priority is the number of its trajectory's first turn, which matters
only where slots are short. Source: issue 16; cost: as `schedule.residents`.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import inf

from verl_heddle.fleet import Replica
from verl_heddle.schedule.residents import ORDERS, Residents
from verl_heddle.simulate.baselines.base import PeerReason
from verl_heddle.simulate.policy import Latency
from verl_heddle.trajectory import Decision, TrajectoryEnd, TurnEnd, TurnStart

READ_TOKENS = 8192
"""verl's token budget of an engine step: an engine that reads contexts again reads that much at once."""


class Resident:
    """A `Policy`. `order`: a name in `schedule.residents.ORDERS`."""

    def __init__(self, order: str = "least_served") -> None:
        self.residents = Residents(ORDERS[order])
        self._latency: Latency | None = None

    def latency_known(self, latency: Latency) -> None:
        """Reading times, for t*."""
        self._latency = latency

    def replicas_added(self, replicas: Iterable[Replica]) -> None:
        """Replicas joined, empty."""
        for replica in replicas:
            hold_s = inf
            if self._latency is not None and replica.kv_tokens is not None:
                hold_s = replica.kv_tokens / READ_TOKENS * float(self._latency.prefill_s(replica.tp, READ_TOKENS))
            self.residents.add(replica, hold_s)

    def replicas_removed(self, names: Iterable[str]) -> None:
        """Replicas left."""
        for name in names:
            self.residents.remove(name)

    def turn_started(self, turn: TurnStart, now: float) -> Decision:
        """In at once if the trajectory is resident or there is room; else held, without a replica."""
        replica = self.residents.turn_started(turn, now)
        number = self.residents.number_of(turn.trajectory.key)
        return Decision(replica or "", number, PeerReason.ADMITTED, held=replica is None)  # type: ignore[arg-type]

    def turn_finished(self, turn: TurnEnd, now: float) -> None:
        """The turn is over; the trajectory stays resident."""
        self.residents.turn_finished(turn, now)

    def trajectory_ended(self, end: TrajectoryEnd, now: float) -> None:
        """The trajectory is over."""
        self.residents.trajectory_ended(end, now)

    def admitted(self, now: float) -> list[tuple[str, str]]:
        """(turn, replica) of those let in."""
        return self.residents.admitted()

    def released(self, now: float) -> list[tuple[str, str]]:
        """(trajectory, replica) of contexts to be dropped first."""
        return self.residents.released()

    def tick(self, now: float) -> None:
        """Rents may have run out."""
        self.residents.tick(now)

    def due_s(self, now: float) -> float:
        """When the next rent runs out."""
        return self.residents.due_s()
