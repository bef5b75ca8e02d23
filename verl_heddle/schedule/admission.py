"""Admission: how many turns a replica is given; the rest wait in the router, where they can still be put in order.

Law. A replica has two bounds. A trajectory's first turn goes in while fewer than `bound` turns are in flight there. A turn of a trajectory
that has begun goes in at once, up to `most`: its context is in the replica's cache, and a new trajectory that took its place would push it
out. Others are held. Whenever a turn leaves, those held go in while their bound allows: trajectories that have begun before new ones, each
kind in the order of (priority, arrival). A held turn goes in whatever the bounds once it has waited `hold_s` and no turn has completed on
its replica for `hold_s`: such a replica is silent, and nothing is to wait for it in the router. A replica that leaves lets all its held
turns in: they fail there like any other, and come back.

Why. vLLM orders its own waiting queue, but a request in it cannot be moved, costs memory in the server process, and with thousands of them
enqueueing itself has stalled runs (verl #7587, #6306): hence `bound`, a multiple of the slots, so that a replica never runs dry between a
turn that leaves and the next. verl's server actor takes a limited number of calls at a time, and what is beyond waits in Ray's queue, first
come, first served, control calls too: hence `most`.

Invariants (tests/unit/test_admission.py): in flight <= `most` but for overdue turns; a turn is let in exactly once; no turn is held that
its bound would let in; among the held of a replica the order is that of (begun, priority, arrival). Cost: O(log held) per turn.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import takewhile
from math import inf

ROOM = 32
"""Calls of a server actor left to others than turns: verl's own margin for control calls, and as many for priorities, limits, counts and
pre-warms."""

LEAST_ROOM = 16
"""Left to them where the slots come so close to the calls that `ROOM` would leave slots empty: verl's own margin."""


def most_turns(slots: int, calls: int | None) -> float:
    """Turns that a server actor takes beside control calls: `slots` requests decode at once, `calls` is what the actor takes at a time
    (None: not limited)."""
    return inf if calls is None else max(calls - ROOM, min(slots, calls - LEAST_ROOM), 1)


Rank = tuple[bool, int, int]
"""Order of the held: new trajectory, priority, number of arrival."""


@dataclass(slots=True)
class _Held:
    replica: str
    rank: Rank
    since_s: float


@dataclass(slots=True)
class _Gate:
    bound: float
    most: float
    completed_s: float
    """When a turn last completed there; -inf: none has."""
    inside: set[str] = field(default_factory=set)
    heap: list[tuple[Rank, str]] = field(default_factory=list)

    def open_to(self, new: bool) -> bool:
        return len(self.inside) < (self.bound if new else self.most)


class Admission:
    """Who may go to its replica. `hold_s`: seconds after which a silent replica is not waited for. The caller names requests, uniquely
    while they are open."""

    def __init__(self, hold_s: float) -> None:
        self._hold_s = hold_s
        self._gates: dict[str, _Gate] = {}
        self._held: dict[str, _Held] = {}
        """By request, in the order of arrival."""
        self._number = 0
        self._let_in: list[str] = []
        self.overdue = 0
        """Turns let in because their replica was silent."""

    def __len__(self) -> int:
        """Turns held."""
        return len(self._held)

    def __contains__(self, request: str) -> bool:
        """Whether the turn is held."""
        return request in self._held

    def inside(self, replica: str) -> int:
        """Turns in flight on a replica."""
        return len(self._gates[replica].inside)

    def add(self, replica: str, bound: int, most: float = inf) -> None:
        """A replica joins, empty; of one that is known, those held there go in."""
        self.remove(replica)
        self._gates[replica] = _Gate(min(bound, most), most, -inf)

    def remove(self, replica: str) -> None:
        """A replica leaves."""
        self._gates.pop(replica, None)
        for request in [name for name, held in self._held.items() if held.replica == replica]:
            self._enter(request)

    def ask(self, request: str, replica: str, priority: int, now: float, begun: bool = False) -> bool:
        """A turn was placed: may it go at once? If not it is held, and `admitted` will name it. `begun`: its trajectory has had a turn."""
        gate = self._gates[replica]
        if gate.open_to(not begun):
            gate.inside.add(request)
            return True
        self._number += 1
        held = self._held[request] = _Held(replica, (not begun, priority, self._number), now)
        heappush(gate.heap, (held.rank, request))
        return False

    def left(self, request: str, replica: str, completed_s: float | None = None) -> None:
        """The turn is over, whether it had been let in or gave up waiting. `completed_s`: the time, if its replica completed it."""
        if self._held.pop(request, None) is not None:
            return
        gate = self._gates.get(replica)
        if gate is None:
            return
        if completed_s is not None:
            gate.completed_s = completed_s
        gate.inside.discard(request)
        self._fill(gate)

    def reprioritise(self, priorities: Mapping[str, int]) -> None:
        """New priorities; turns that are not held are passed over."""
        for request, priority in priorities.items():
            held = self._held.get(request)
            if held is not None and held.rank[1] != priority:
                held.rank = (held.rank[0], priority, held.rank[2])
                heappush(self._gates[held.replica].heap, (held.rank, request))

    def admitted(self, now: float) -> list[str]:
        """Held turns that may go, the overdue included; each is named once."""
        late = takewhile(lambda pair: now - pair[1].since_s >= self._hold_s, self._held.items())
        for request, held in list(late):
            gate = self._gates[held.replica]
            if now - gate.completed_s >= self._hold_s:
                self.overdue += 1
                gate.inside.add(request)
                self._enter(request)
        result, self._let_in = self._let_in, []
        return result

    def _enter(self, request: str) -> None:
        del self._held[request]
        self._let_in.append(request)

    def _fill(self, gate: _Gate) -> None:
        while gate.heap and gate.open_to(gate.heap[0][0][0]):
            rank, request = heappop(gate.heap)
            held = self._held.get(request)
            if held is not None and held.rank == rank:  # otherwise it left, or has another priority by now
                gate.inside.add(request)
                self._enter(request)
