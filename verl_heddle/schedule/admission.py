"""Admission: how many turns are in flight per replica; the rest wait in the router, where they can still be reordered.

Law. A replica has two bounds.
- A trajectory's first turn is admitted while fewer than `bound` turns are in flight on its replica.
- A later turn is admitted while fewer than `most` are: its context is in the replica's cache, and a new trajectory in its place would evict
  that context.
- Other turns are held. When a turn leaves, held turns are admitted while their bound allows: turns of trajectories that have begun before
  first turns, each kind by (priority, arrival).
- A held turn is admitted regardless of the bounds once it has waited `hold_s` and no turn has completed on its replica for `hold_s`: the
  replica is silent, and turns should not wait for it in the router.
- When a replica leaves, its held turns are admitted; they fail there like any other turn, and come back.

Why. vLLM orders its own waiting queue, but a request in it cannot be moved and costs memory in the server process, and with thousands of
requests enqueueing itself has stalled runs (verl #7587, #6306). Hence `bound`, a multiple of the slots, so that a replica never runs dry
between a turn that leaves and the next. verl's server actor takes a limited number of calls at a time; further calls, control calls
included, wait in Ray's queue, first come, first served. Hence `most`.

Invariants (tests/unit/test_admission.py): in flight <= `most`, overdue turns excepted; every turn is admitted exactly once; no turn is held
that its bound would admit; held turns of a replica are admitted in the order (begun, priority, arrival). Cost: O(log held) per turn.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import takewhile
from math import inf

ROOM = 32
"""Calls of a server actor reserved for other purposes than turns: verl's own margin for control calls, and as many again for priorities,
limits, counts and pre-warms."""

LEAST_ROOM = 16
"""Calls reserved if the calls barely exceed the slots, so that `ROOM` would leave slots empty: verl's own margin."""


def most_turns(slots: int, calls: int | None) -> float:
    """Maximum turns in flight on a server actor, leaving room for control calls. `slots`: requests that decode at once; `calls`: calls that
    the actor takes at a time (None: not limited)."""
    return inf if calls is None else max(calls - ROOM, min(slots, calls - LEAST_ROOM), 1)


Rank = tuple[bool, int, int]
"""Order of held turns: (first turn of its trajectory, priority, arrival number)."""


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
    """When a turn last completed on the replica; -inf: none has."""
    inside: set[str] = field(default_factory=set)
    heap: list[tuple[Rank, str]] = field(default_factory=list)

    def open_to(self, new: bool) -> bool:
        return len(self.inside) < (self.bound if new else self.most)


class Admission:
    """Holds turns until their replica may take them. `hold_s`: seconds after which turns stop waiting for a silent replica. Request names
    must be unique while the request is open."""

    def __init__(self, hold_s: float) -> None:
        self._hold_s = hold_s
        self._gates: dict[str, _Gate] = {}
        self._held: dict[str, _Held] = {}
        """By request, in order of arrival."""
        self._number = 0
        self._admitted: list[str] = []
        self.overdue = 0
        """Turns admitted because their replica was silent."""

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
        """A replica joins with no turns in flight; if it is known already, its held turns are admitted."""
        self.remove(replica)
        self._gates[replica] = _Gate(min(bound, most), most, -inf)

    def remove(self, replica: str) -> None:
        """A replica leaves; its held turns are admitted."""
        self._gates.pop(replica, None)
        for request in [name for name, held in self._held.items() if held.replica == replica]:
            self._enter(request)

    def ask(self, request: str, replica: str, priority: int, now: float, begun: bool = False) -> bool:
        """Whether a turn assigned to `replica` may go at once; otherwise it is held, and `admitted` will name it. `begun`: its trajectory
        has had a turn."""
        gate = self._gates[replica]
        if gate.open_to(not begun):
            gate.inside.add(request)
            return True
        self._number += 1
        held = self._held[request] = _Held(replica, (not begun, priority, self._number), now)
        heappush(gate.heap, (held.rank, request))
        return False

    def left(self, request: str, replica: str, completed_s: float | None = None) -> None:
        """The turn is over, admitted or not. `completed_s`: the time, if its replica completed it."""
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
        """Set new priorities; turns that are not held are skipped."""
        for request, priority in priorities.items():
            held = self._held.get(request)
            if held is not None and held.rank[1] != priority:
                held.rank = (held.rank[0], priority, held.rank[2])
                heappush(self._gates[held.replica].heap, (held.rank, request))

    def admitted(self, now: float) -> list[str]:
        """Held turns that may go now, overdue ones included; each is returned once."""
        late = takewhile(lambda pair: now - pair[1].since_s >= self._hold_s, self._held.items())
        for request, held in list(late):
            gate = self._gates[held.replica]
            if now - gate.completed_s >= self._hold_s:
                self.overdue += 1
                gate.inside.add(request)
                self._enter(request)
        result, self._admitted = self._admitted, []
        return result

    def _enter(self, request: str) -> None:
        del self._held[request]
        self._admitted.append(request)

    def _fill(self, gate: _Gate) -> None:
        while gate.heap and gate.open_to(gate.heap[0][0][0]):
            rank, request = heappop(gate.heap)
            held = self._held.get(request)
            if held is not None and held.rank == rank:  # otherwise it has left, or its priority has changed
                gate.inside.add(request)
                self._enter(request)
