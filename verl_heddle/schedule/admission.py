"""Admission: a bounded number of turns in flight per replica, the rest held back in the order of priority.

Law: a turn enters at once while its replica has fewer than its bound in flight. Later ones are held; each that leaves lets in the held
turn with the lowest (priority, arrival). A turn held for longer than the deadline enters whatever the bound, so that nothing waits for a
replica that has gone silent. A replica that leaves lets all its held turns in: they fail there like any other, and come back.

Why: vLLM orders its own waiting queue, but a request in it cannot be moved, costs memory in the server process, and with thousands of them
enqueueing itself has stalled runs (verl #7587, #6306). The bound is a multiple of the slots, so that a replica never runs dry between a
turn that leaves and the next.

Invariants (tests/unit/test_admission.py): in flight <= bound but for overdue turns; a turn is let in exactly once; nothing is held on a
replica below its bound; among the held of a replica the order is that of (priority, arrival). Cost: O(log held) per turn.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from heapq import heappop, heappush


@dataclass(slots=True)
class _Gate:
    bound: int
    inside: int = 0
    heap: list[tuple[int, int, str]] = field(default_factory=list)


class Admission:
    """Who may go to its replica. `hold_s`: longest time a turn is held, seconds. Requests are named by the caller, uniquely while open."""

    def __init__(self, hold_s: float) -> None:
        self._hold_s = hold_s
        self._gates: dict[str, _Gate] = {}
        self._held: dict[str, tuple[str, int, int, float]] = {}
        """Request -> replica, priority, number of arrival, time of arrival; in the order of arrival."""
        self._number = 0
        self._let_in: list[str] = []
        self.overdue = 0
        """Turns let in by the deadline."""

    def __len__(self) -> int:
        """Turns held."""
        return len(self._held)

    def __contains__(self, request: str) -> bool:
        """Whether the turn is held."""
        return request in self._held

    def add(self, replica: str, bound: int) -> None:
        """A replica joins, empty."""
        self._gates[replica] = _Gate(bound)

    def remove(self, replica: str) -> None:
        """A replica leaves."""
        self._gates.pop(replica, None)
        for request in [name for name, held in self._held.items() if held[0] == replica]:
            self._enter(request)

    def ask(self, request: str, replica: str, priority: int, now: float) -> bool:
        """A turn was placed: may it go at once? If not it is held, and `admitted` will name it."""
        gate = self._gates[replica]
        if gate.inside < gate.bound:
            gate.inside += 1
            return True
        self._number += 1
        self._held[request] = (replica, priority, self._number, now)
        heappush(gate.heap, (priority, self._number, request))
        return False

    def left(self, request: str, replica: str) -> None:
        """The turn is over, whether it had been let in or gave up waiting."""
        if self._held.pop(request, None) is not None:
            return
        gate = self._gates.get(replica)
        if gate is None:
            return
        gate.inside = max(0, gate.inside - 1)
        self._fill(gate)

    def reprioritise(self, priorities: Mapping[str, int]) -> None:
        """New priorities; those who are not held are passed over."""
        for request, priority in priorities.items():
            held = self._held.get(request)
            if held is not None and held[1] != priority:
                self._held[request] = (held[0], priority, *held[2:])
                heappush(self._gates[held[0]].heap, (priority, held[2], request))

    def admitted(self, now: float) -> list[str]:
        """Held turns that may go, the overdue included; each is named once."""
        for request, held in list(self._held.items()):
            if now - held[3] < self._hold_s:
                break
            self.overdue += 1
            self._gates[held[0]].inside += 1
            self._enter(request)
        result, self._let_in = self._let_in, []
        return result

    def _enter(self, request: str) -> None:
        del self._held[request]
        self._let_in.append(request)

    def _fill(self, gate: _Gate) -> None:
        while gate.heap and gate.inside < gate.bound:
            priority, number, request = heappop(gate.heap)
            held = self._held.get(request)
            if held is not None and held[1:3] == (priority, number):  # otherwise it left, or has another priority by now
                gate.inside += 1
                self._enter(request)
