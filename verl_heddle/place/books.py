"""Tracks the residents and expected drain time of each replica, and finds the replica that would drain first.

Law: a replica's expected drain time is `outlook.drain_s` of the sum of its residents' curves, at the seconds per token of `pace`.
A trajectory is resident from the start of its first turn to its end, tool calls included, on the replica of its last turn.
Values derived from a replica's sums are cached until the sums change. The clock of sampled times is kept while it fits.
Search: adding a trajectory never shortens a drain time (the expected staircase of `outlook` grows with every chance added, for any
non-decreasing tau). A replica's drain time without it plus the prefill of its context there is therefore a lower bound; a replica whose
bound exceeds the best candidate's time is skipped, and the result is exact. Ties go to the replica that joined first.

Invariants: a key is on at most one replica; the sums of a replica without residents are exactly 0; cached values equal recomputed ones
(tests/unit/place/test_replan.py).
Cost: O(len(GRID)) to put or take a trajectory, and for every replica the search prices: all when they are equal, few when they are not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import inf

import numpy as np

from verl_heddle.fleet import Replica
from verl_heddle.place.cost import Floats, Ints
from verl_heddle.place.outlook import GRID, TIMES, clock, drain_s, late_s, laws, log_ended
from verl_heddle.place.pace import Habit, Latency, Tempo

CLOCK = (1.1, 1.6)
"""A clock is kept while its end is between these multiples of the latest drain; a new one ends at 1.25 times."""


@dataclass(slots=True)
class Resident:
    """A live trajectory."""

    replica: str
    rows: Floats
    group: str
    """Its prompt's visit; trajectories of one group share a prefix."""


class Books:
    """See the module. `names` are the replicas, in the order of every array that is returned."""

    def __init__(self, latency: Latency) -> None:
        self._latency = latency
        self.names: list[str] = []
        self.fleet: dict[str, Replica] = {}
        self.residents: dict[str, Resident] = {}
        self.on: dict[str, dict[str, Resident]] = {}
        """Residents by replica."""
        self._groups: dict[tuple[str, str], int] = {}
        self._at: dict[str, int] = {}
        self._sums: Floats = np.zeros((0, 2, len(GRID)))
        self._tables: list[tuple[Ints, Tempo]] = []
        self.degrees: list[tuple[int, Ints]] = []
        """Tensor-parallel degrees, and which replicas have them."""
        self._most, self._habit = 2.0, Habit()
        self._drains: Floats = np.zeros(0)
        self._late: Floats = np.zeros(0)
        self._logs: Floats = np.zeros((0, TIMES))
        """Log of the chance to have drained, [replicas, TIMES], at `_times`."""
        self._times: Floats = np.zeros(TIMES)
        self._old_drains: set[int] = set()
        """Replicas with a stale drain time; below, with stale chances."""
        self._old_logs: set[int] = set()

    def add(self, replica: Replica) -> None:
        """A replica joins, empty; a known replica is reset."""
        if replica.name in self.fleet:
            self.remove(replica.name)
        self.fleet[replica.name] = replica
        self.on[replica.name] = {}
        self._index(np.concatenate([self._sums, np.zeros((1, 2, len(GRID)))]))

    def remove(self, name: str) -> None:
        """A replica leaves, and with it its residents; unknown names are ignored."""
        if name not in self.fleet:
            return
        for key in list(self.on[name]):
            self.take(key)
        kept = np.delete(self._sums, self._at[name], axis=0)
        del self.fleet[name], self.on[name]
        self._index(kept)

    def put(self, key: str, replica: str, rows: Floats, group: str = "") -> None:
        """Assign the trajectory to this replica with these curves, and take it from its previous replica."""
        before = self.take(key)
        one = self.residents[key] = self.on[replica][key] = Resident(replica, rows, group or (before.group if before else ""))
        self._sums[self._at[replica]] += rows
        self._changed(self._at[replica])
        place = (one.group, replica)
        self._groups[place] = self._groups.get(place, 0) + 1

    def take(self, key: str) -> Resident | None:
        """Remove the trajectory; None if it was unknown."""
        one = self.residents.pop(key, None)
        if one is None:
            return None
        row = self._at[one.replica]
        del self.on[one.replica][key]
        self._changed(row)
        if self.on[one.replica]:
            self._sums[row] -= one.rows
        else:
            self._sums[row] = 0.0
        place = (one.group, one.replica)
        self._groups[place] -= 1
        if not self._groups[place]:
            del self._groups[place]
        return one

    def tune(self, most: float, habit: Habit) -> None:
        """Recompute seconds per token for trajectories of this habit, up to `most` of them together."""
        self._most, self._habit = most, habit
        self._retable()

    def makespan_of(self, sums: Floats, delays: Floats) -> float:
        """Expected makespan of the fleet with other residents: sums of their curves, [replicas, 2, len(GRID)].

        Args:
            delays: seconds after which each replica begins, [replicas].
        """
        reached, ended = self._laws(sums)
        reached = reached + delays[:, None]
        times = clock(float(late_s(reached, ended).max()))
        total = sum(log_ended(times, one, other) for one, other in zip(reached, ended, strict=True))
        return float(-np.expm1(total).sum() * times[1])

    def makespans_moved(self, key: str, delays: Floats, targets: Ints) -> tuple[float, Floats]:
        """Expected makespan now, and after moving this resident to each target.

        Args:
            delays: seconds the move takes by replica, [replicas]; they delay every resident of the target.
        """
        self._look()
        one, times, logs = self.residents[key], self._times, self._logs
        home = self._at[one.replica]
        concerned = [home, *targets.tolist()]
        sums = self._sums[concerned]
        sums[0] -= one.rows
        sums[1:] += one.rows
        reached, ended = self._laws(sums, concerned)
        total = logs.sum(axis=0)
        rest = total - logs[home] + log_ended(times, reached[0], ended[0])
        after = [rest - logs[r] + log_ended(times - delays[r], reached[i], ended[i]) for i, r in enumerate(concerned) if i]
        return float(-np.expm1(total).sum() * times[1]), -np.expm1(np.array(after)).sum(axis=1) * times[1]

    def tempos(self) -> dict[int, Tempo] | None:
        """Seconds per token by degree; None if replicas of one degree differ."""
        by_tp = {self.fleet[self.names[rows[0]]].tp: tempo for rows, tempo in self._tables}
        return by_tp if len(by_tp) == len(self._tables) else None

    def drains(self) -> Floats:
        """Expected seconds until each replica is empty, [replicas]."""
        if self._old_drains:
            rows = sorted(self._old_drains)
            self._drains[rows] = self.drains_of(self._sums[rows], rows)
            self._old_drains.clear()
        return self._drains.copy()

    def drains_with(self, rows: Floats, at: Sequence[int]) -> Floats:
        """Drain times of these replicas if each had one more trajectory with these curves; never less than without it."""
        return self.drains_of(self._sums[at] + rows, at)

    def drains_of(self, sums: Floats, at: Sequence[int] | None = None) -> Floats:
        """Drain times from given sums of curves, [n, 2, len(GRID)], on the replicas with these numbers (None: all)."""
        seconds = np.empty(len(sums))
        for rows, tempo in self._kinds(at):
            seconds[rows] = drain_s(sums[rows], tempo)
        return seconds

    def homes_of(self, group: str) -> list[int]:
        """Numbers of the replicas with residents of this group."""
        return [number for number, name in enumerate(self.names) if (group, name) in self._groups]

    def index(self, replica: str) -> int:
        """Its number in the arrays."""
        return self._at[replica]

    def _look(self) -> None:
        """Bring `_logs` up to date."""
        rows = sorted(self._old_logs)
        if not rows:
            return
        reached, ended = self._laws(self._sums[rows], rows)
        self._late[rows] = late_s(reached, ended)
        self._old_logs.clear()
        late = float(self._late.max())
        if not CLOCK[0] * late <= self._times[-1] <= CLOCK[1] * late:
            self._times = clock(late)
            rows = list(range(len(self._sums)))
            reached, ended = self._laws(self._sums)
        for number, one, other in zip(rows, reached, ended, strict=True):
            self._logs[number] = log_ended(self._times, one, other)

    def _laws(self, sums: Floats, at: Sequence[int] | None = None) -> tuple[Floats, Floats]:
        reached, ended = np.empty((2, len(sums), len(GRID)))
        for rows, tempo in self._kinds(at):
            reached[rows], ended[rows] = laws(sums[rows], tempo)
        return reached, ended

    def _kinds(self, at: Sequence[int] | None) -> Iterable[tuple[Ints | slice, Tempo]]:
        """Groups of these replicas with equal tempo: positions in `at`, and the tempo."""
        if len(self._tables) == 1:
            return [(slice(None), self._tables[0][1])]
        if at is None:
            return [*self._tables]
        found = [(np.flatnonzero(np.isin(at, rows)), tempo) for rows, tempo in self._tables]
        return [(rows, tempo) for rows, tempo in found if len(rows)]

    def _changed(self, row: int) -> None:
        self._old_drains.add(row)
        self._old_logs.add(row)

    def _index(self, sums: Floats) -> None:
        self._sums = sums
        self.names = list(self.fleet)
        self._at = {name: number for number, name in enumerate(self.names)}
        tps = np.array([one.tp for one in self.fleet.values()], dtype=np.intp)
        self.degrees = [(int(tp), np.flatnonzero(tps == tp)) for tp in np.unique(tps)]
        self._retable()

    def _retable(self) -> None:
        kinds: dict[tuple[int, int, int | None], list[int]] = {}
        for number, one in enumerate(self.fleet.values()):
            kinds.setdefault((one.tp, one.slots, one.kv_tokens), []).append(number)
        self._tables = []
        for rows in kinds.values():
            replica = self.fleet[self.names[rows[0]]]
            self._tables.append((np.array(rows), Tempo(self._latency, replica, GRID, self._most, self._habit)))
        self._drains, self._late, self._logs = np.zeros(len(self.names)), np.zeros(len(self.names)), np.zeros((len(self.names), TIMES))
        self._old_drains, self._old_logs = set(range(len(self.names))), set(range(len(self.names)))


def reading_s(books: Books, latency: Latency, tokens: int, cached: Sequence[int] = ()) -> Floats:
    """Seconds to prefill `tokens` on each replica, [replicas]; 0 on the replicas in `cached`."""
    seconds = np.empty(len(books.names))
    for tp, rows in books.degrees:
        seconds[rows] = latency.prefill_s(tp, tokens)
    seconds[list(cached)] = 0.0
    return seconds


def soonest(books: Books, rows: Floats, reading: Floats) -> int:
    """Number of the replica that drains first with these curves added, after `reading`, [replicas]."""
    least = books.drains() + reading
    first = int(least.argmin())
    bound = max(
        least[first], books.drains_with(rows, [first])[0] + reading[first]
    )  # rounding can order them either way if almost nothing is added
    could: Ints = np.flatnonzero(least <= bound)
    if len(could) == 1:
        return int(could[0])
    return int(could[(books.drains_with(rows, could.tolist()) + reading[could]).argmin()])


def soon(books: Books, rows: Floats, reading: Floats, home: int, within_s: float) -> Ints:
    """Numbers of the replicas other than `home` that would drain within `within_s`, soonest first."""
    least = books.drains() + reading
    least[home] = inf
    could: Ints = np.flatnonzero(least <= within_s)
    if not len(could):
        return could
    after = books.drains_with(rows, could.tolist()) + reading[could]
    order = np.argsort(after, kind="stable")
    best: Ints = could[order[after[order] <= within_s]]
    return best
