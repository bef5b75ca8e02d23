"""Stock verl 0.9.1: a conversation stays on its replica, a new one goes to the replica with the fewest requests in flight; no priorities.

Law and source: `GlobalRequestLoadBalancer` of verl 0.9.1, through `verl_heddle.place.sticky`, which reproduces every choice. Inside the
replica: first come, first served (`EngineOptions(order="fcfs")`, the default).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from random import Random

from verl_heddle.fleet import Replica
from verl_heddle.place.sticky import StickyLeastInflight
from verl_heddle.trajectory import Decision, TrajectoryEnd, TurnEnd, TurnStart


class Stock:
    """verl's own router as a policy. Not a `Peer`: it uses the plugin's fallback rule, which counts requests itself."""

    def __init__(self, seed: int = 0) -> None:
        self._rule = StickyLeastInflight(Random(seed))
        self.counts: Counter[str] = Counter()
        """Decisions by reason."""

    @property
    def inflight(self) -> dict[str, int]:
        """Requests in flight by replica."""
        return self._rule.inflight

    def replicas_added(self, replicas: Iterable[Replica]) -> None:
        """Replicas joined, empty."""
        for replica in replicas:
            self._rule.add(replica.name)

    def replicas_removed(self, names: Iterable[str]) -> None:
        """Replicas left."""
        for name in names:
            self._rule.remove(name)

    def turn_started(self, turn: TurnStart, now: float) -> Decision:
        """Stay on the conversation's replica, or choose the least loaded one."""
        replica, reason = self._rule.acquire(turn.conversation)
        self.counts[reason] += 1
        return Decision(replica, 0, reason)

    def turn_finished(self, turn: TurnEnd, now: float) -> None:
        """Subtract the turn from its replica's load."""
        self._rule.release(turn.replica)

    def trajectory_ended(self, end: TrajectoryEnd, now: float) -> None:
        """No action: verl's router is not notified of the end."""
