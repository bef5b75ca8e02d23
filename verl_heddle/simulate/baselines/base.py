"""The base of baselines that only place turns: `Loads` counts requests in flight, `Peer` tracks conversations and breaks ties at random.

A rule is a subclass of `Peer` with one method, `place`. `PeerReason` has the reasons that only baselines use, because
`verl_heddle.trajectory.Reason` lists the plugin's own.

Law of `Loads`: replicas are in one bucket per load. Loads change by one, so the lowest and highest non-empty buckets move by at most one.
Invariant: every replica is in the bucket of its load, at index `_at`. Cost: O(1) per change and per query, where verl's own table costs
O(replicas); the simulator makes a million queries.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from enum import StrEnum
from random import Random
from typing import cast

from verl_heddle.fleet import Replica
from verl_heddle.trajectory import Decision, Reason, TrajectoryEnd, TurnEnd, TurnStart


class Loads:
    """Requests in flight by replica name, never below 0."""

    def __init__(self) -> None:
        self._load: dict[str, int] = {}
        self._buckets: list[list[str]] = [[]]
        self._at: dict[str, int] = {}
        self._fewest = self._most = 0

    @property
    def fewest(self) -> int:
        """The smallest load; 0 if there are no replicas."""
        while self._fewest < self._most and not self._buckets[self._fewest]:
            self._fewest += 1
        return self._fewest

    @property
    def most(self) -> int:
        """The largest load; 0 if there are no replicas."""
        while self._most and not self._buckets[self._most]:
            self._most -= 1
        return self._most

    def least(self, rng: Random) -> str:
        """A replica with the smallest load; ties are broken at random.

        Raises:
            IndexError: there is no replica.
        """
        return rng.choice(self._buckets[self.fewest])

    def add(self, name: str) -> None:
        """Add a replica with load 0; a known one is reset to 0."""
        self.remove(name)
        self._put(name, 0)

    def remove(self, name: str) -> None:
        """Remove a replica; unknown names are ignored."""
        if name in self._load:
            self._take(name)

    def change(self, name: str, by: int) -> None:
        """Add `by` to the replica's load, with a minimum of 0; unknown names are ignored."""
        if name in self._load:
            self._put(name, max(0, self._take(name) + by))

    def __getitem__(self, name: str) -> int:
        return self._load[name]

    def __contains__(self, name: object) -> bool:
        return name in self._load

    def __iter__(self) -> Iterator[str]:
        return iter(self._load)

    def __len__(self) -> int:
        return len(self._load)

    def _put(self, name: str, load: int) -> None:
        while len(self._buckets) <= load:
            self._buckets.append([])
        self._load[name] = load
        self._at[name] = len(self._buckets[load])
        self._buckets[load].append(name)
        self._fewest, self._most = min(self._fewest, load), max(self._most, load)

    def _take(self, name: str) -> int:
        load, place = self._load.pop(name), self._at.pop(name)
        bucket = self._buckets[load]
        last = bucket.pop()
        if last != name:
            bucket[place] = last
            self._at[last] = place
        return load


class PeerReason(StrEnum):
    """Why a baseline placed a turn on its replica."""

    ROUND_ROBIN = "round_robin"
    REBALANCED = "rebalanced"
    """Moved off its replica because of the load."""
    ADMITTED = "admitted"
    """A program was admitted or readmitted, at once or after waiting."""
    ORACLE = "oracle"
    """Planned with true lengths."""


class Peer:
    """A baseline policy; subclasses implement `place`. Invariant: all `loads` are zero after the last turn."""

    def __init__(self, seed: int = 0) -> None:
        self.loads = Loads()
        """Requests in flight by replica."""
        self.home: dict[str, str] = {}
        """Replica of each conversation's last turn; no size limit (verl's limit of 10,000 is in `stock.py`)."""
        self.counts: Counter[str] = Counter()
        """Decisions by reason."""
        self._rng = Random(seed)

    def place(self, turn: TurnStart) -> tuple[str, Reason | PeerReason]:
        """The replica of the turn, and the reason. `loads` does not include the turn yet."""
        raise NotImplementedError

    def priority(self, turn: TurnStart) -> int:
        """vLLM priority of the turn; lower runs first."""
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
        """Place the turn and count it as in flight."""
        replica, reason = self.place(turn)
        self.loads.change(replica, 1)
        self.home[turn.conversation] = replica
        self.counts[reason] += 1
        return Decision(replica, self.priority(turn), cast(Reason, reason))

    def turn_finished(self, turn: TurnEnd, now: float) -> None:
        """Subtract the turn from its replica's load."""
        self.loads.change(turn.replica, -1)

    def trajectory_ended(self, end: TrajectoryEnd, now: float) -> None:
        """Forget the trajectory's replica."""
        self.home.pop(end.trajectory.key, None)

    def least_loaded(self) -> str:
        """A replica with the fewest requests in flight; ties are broken at random."""
        return self.loads.least(self._rng)

    def home_of(self, turn: TurnStart) -> str | None:
        """The replica of the conversation's last turn if it is still in the fleet, else None."""
        home = self.home.get(turn.conversation)
        return home if home in self.loads else None
