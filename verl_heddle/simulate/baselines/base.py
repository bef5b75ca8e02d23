"""What the peers' rules have in common: requests in flight, homes of conversations, least loaded with random ties.

A rule is a class with one method, `place`; `Peer` keeps the books around it. Reasons that only peers have are here, since
`verl_heddle.trajectory.Reason` lists what the plugin itself may do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from enum import StrEnum
from random import Random
from typing import cast

from verl_heddle.fleet import Replica
from verl_heddle.simulate.baselines.loads import Loads
from verl_heddle.trajectory import Decision, Reason, TrajectoryEnd, TurnEnd, TurnStart


class PeerReason(StrEnum):
    """Why a baseline put a turn where it went."""

    ROUND_ROBIN = "round_robin"
    REBALANCED = "rebalanced"
    """Moved off its home because of the load."""
    ADMITTED = "admitted"
    """A program starts or comes back, at once or when its law lets it."""
    ORACLE = "oracle"
    """Planned with true lengths."""


class Peer:
    """A baseline policy. Subclasses implement `place`; invariant: `loads` returns to zero with the last turn."""

    def __init__(self, seed: int = 0) -> None:
        self.loads = Loads()
        """Requests in flight by replica."""
        self.home: dict[str, str] = {}
        """Replica of the last turn by conversation; never forgotten (verl's table of 10,000 is in `stock.py`)."""
        self.counts: Counter[str] = Counter()
        """Decisions by reason."""
        self._rng = Random(seed)

    def place(self, turn: TurnStart) -> tuple[str, Reason | PeerReason]:
        """Where the turn goes, and why. `loads` does not count it yet."""
        raise NotImplementedError

    def priority(self, turn: TurnStart) -> int:
        """vLLM priority of the turn, lower first."""
        return 0

    def replicas_added(self, replicas: Iterable[Replica]) -> None:
        """Replicas joined, empty."""
        for replica in replicas:
            self.loads.add(replica.name)

    def replicas_removed(self, names: Iterable[str]) -> None:
        """Replicas left."""
        for name in names:
            self.loads.remove(name)

    def turn_started(self, turn: TurnStart, now: float) -> Decision:
        """Apply the rule and count the turn in flight."""
        replica, reason = self.place(turn)
        self.loads.change(replica, 1)
        self.home[turn.conversation] = replica
        self.counts[reason] += 1
        return Decision(replica, self.priority(turn), cast(Reason, reason))

    def turn_finished(self, turn: TurnEnd, now: float) -> None:
        """Count it out."""
        self.loads.change(turn.replica, -1)

    def trajectory_ended(self, end: TrajectoryEnd, now: float) -> None:
        """Forget its home."""
        self.home.pop(end.trajectory.key, None)

    def least_loaded(self) -> str:
        """A replica with the fewest requests in flight, at random among equals."""
        return self.loads.least(self._rng)

    def home_of(self, turn: TurnStart) -> str | None:
        """The replica of the conversation's last turn, if it has one that is still in the fleet."""
        home = self.home.get(turn.conversation)
        return home if home in self.loads else None
