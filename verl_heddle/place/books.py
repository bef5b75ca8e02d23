"""Who lives on which replica, and how long each replica is expected to take: the state that placing and moving read.

Law: a replica's expected drain time is `outlook.drain_s` of the sum of its residents' curves, at the seconds per token of `pace`.
A resident is a trajectory from its first turn's start to its end, in tools too, on the replica of its last turn.
Invariants: a key lives on at most one replica; the sums of a replica without residents are exactly 0.
Cost: O(replicas * len(GRID)) to ask what one more trajectory would do everywhere, O(len(GRID)) to put or take one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from verl_heddle.fleet import Replica
from verl_heddle.place.cost import Floats, Ints
from verl_heddle.place.outlook import GRID, clock, drain_s, laws, log_ended
from verl_heddle.place.pace import Habit, Latency, Tempo


@dataclass(slots=True)
class Resident:
    """A trajectory under way."""

    replica: str
    rows: Floats
    group: str
    """Its prompt's visit: who shares it shares a prefix."""


class Books:
    """See the module. `names` are the replicas, in the order of every array that is returned."""

    def __init__(self, latency: Latency) -> None:
        self._latency = latency
        self.names: list[str] = []
        self.fleet: dict[str, Replica] = {}
        self.residents: dict[str, Resident] = {}
        self.count: dict[str, int] = {}
        self._groups: dict[tuple[str, str], int] = {}
        self._at: dict[str, int] = {}
        self._sums: Floats = np.zeros((0, 2, len(GRID)))
        self._tables: list[tuple[Ints, Tempo]] = []
        self._most, self._habit = 2.0, Habit()

    def add(self, replica: Replica) -> None:
        """A replica joins, empty; one that is known is reset."""
        if replica.name in self.fleet:
            self.remove(replica.name)
        self.fleet[replica.name] = replica
        self.count[replica.name] = 0
        self._index(np.concatenate([self._sums, np.zeros((1, 2, len(GRID)))]))

    def remove(self, name: str) -> None:
        """A replica leaves, and with it its residents; unknown names are ignored."""
        if name not in self.fleet:
            return
        for key in [key for key, one in self.residents.items() if one.replica == name]:
            self.take(key)
        kept = np.delete(self._sums, self._at[name], axis=0)
        del self.fleet[name], self.count[name]
        self._index(kept)

    def put(self, key: str, replica: str, rows: Floats, group: str = "") -> None:
        """The trajectory lives on this replica from now on, with these curves; from wherever it lived before it is taken."""
        before = self.take(key)
        self.residents[key] = Resident(replica, rows, group or (before.group if before else ""))
        self._sums[self._at[replica]] += rows
        self.count[replica] += 1
        place = (self.residents[key].group, replica)
        self._groups[place] = self._groups.get(place, 0) + 1

    def take(self, key: str) -> Resident | None:
        """The trajectory is gone; None if it was unknown."""
        one = self.residents.pop(key, None)
        if one is None:
            return None
        row = self._at[one.replica]
        self.count[one.replica] -= 1
        if self.count[one.replica]:
            self._sums[row] -= one.rows
        else:
            self._sums[row] = 0.0
        place = (one.group, one.replica)
        self._groups[place] -= 1
        if not self._groups[place]:
            del self._groups[place]
        return one

    def tune(self, most: float, habit: Habit) -> None:
        """Seconds per token are for trajectories of this habit, up to `most` of them together."""
        self._most, self._habit = most, habit
        self._retable()

    def makespan_of(self, sums: Floats, delays: Floats) -> float:
        """Expected makespan of the fleet with other residents: sums of their curves, [replicas, 2, len(GRID)].

        Args:
            delays: seconds after which each replica begins, [replicas].
        """
        reached, ended = self._laws(sums)
        reached = reached + delays[:, None]
        times = clock(reached, ended)
        total = sum(log_ended(times, one, other) for one, other in zip(reached, ended, strict=True))
        return float(-np.expm1(total).sum() * times[1])

    def makespans_moved(self, key: str, delays: Floats, targets: Ints) -> tuple[float, Floats]:
        """Expected makespan as it is, and if this resident lived on each of these replicas, and it took so many seconds to get there.

        Args:
            delays: seconds by replica, [replicas]; all on the target lose them.
        """
        one = self.residents[key]
        home = self._at[one.replica]
        reached, ended = self._laws(self._sums)
        times = clock(reached, ended)
        logs = np.array([log_ended(times, *pair) for pair in zip(reached, ended, strict=True)])
        moved = self._sums.copy()
        moved[home] -= one.rows
        moved[targets] += one.rows
        reached, ended = self._laws(moved)
        rest = logs.sum(axis=0) - logs[home] + log_ended(times, reached[home], ended[home])
        after = [rest - logs[r] + log_ended(times - delays[r], reached[r], ended[r]) for r in targets]
        return float(-np.expm1(logs.sum(axis=0)).sum() * times[1]), -np.expm1(np.array(after)).sum(axis=1) * times[1]

    def tempos(self) -> dict[int, Tempo] | None:
        """Seconds per token by degree; None if replicas of one degree differ."""
        by_tp = {self.fleet[self.names[rows[0]]].tp: tempo for rows, tempo in self._tables}
        return by_tp if len(by_tp) == len(self._tables) else None

    def drains(self) -> Floats:
        """Expected seconds until each replica is empty, [replicas]."""
        return self.drains_of(self._sums)

    def drains_with(self, rows: Floats) -> Floats:
        """The same if each of them had one more trajectory with these curves."""
        return self.drains_of(self._sums + rows)

    def drains_of(self, sums: Floats) -> Floats:
        """The same for other residents: sums of their curves, [replicas, 2, len(GRID)]."""
        seconds = np.empty(len(sums))
        for rows, tempo in self._tables:
            seconds[rows] = drain_s(sums[rows], tempo)
        return seconds

    def homes_of(self, group: str) -> list[int]:
        """Numbers of the replicas where siblings of this group live."""
        return [number for number, name in enumerate(self.names) if (group, name) in self._groups]

    def index(self, replica: str) -> int:
        """Its number in the arrays."""
        return self._at[replica]

    def _laws(self, sums: Floats) -> tuple[Floats, Floats]:
        reached, ended = np.empty((2, len(sums), len(GRID)))
        for rows, tempo in self._tables:
            reached[rows], ended[rows] = laws(sums[rows], tempo)
        return reached, ended

    def _index(self, sums: Floats) -> None:
        self._sums = sums
        self.names = list(self.fleet)
        self._at = {name: number for number, name in enumerate(self.names)}
        self._retable()

    def _retable(self) -> None:
        kinds: dict[tuple[int, int, int | None], list[int]] = {}
        for number, one in enumerate(self.fleet.values()):
            kinds.setdefault((one.tp, one.slots, one.kv_tokens), []).append(number)
        self._tables = []
        for rows in kinds.values():
            replica = self.fleet[self.names[rows[0]]]
            self._tables.append((np.array(rows), Tempo(self._latency, replica, GRID, self._most, self._habit)))
