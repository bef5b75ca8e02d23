"""The turns under way: the one table of who has a turn, where it is and how urgent, and with `verl's rule` the count of them by replica.

A caller in whose call a policy has raised goes on here, by verl's rule and without the policy: `start_by_rule`, `admit_by_rule`, `close`,
and then `recount`, since the policy may have counted the turn or not. Cost: O(1) per turn; `recount` O(turns).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from verl_heddle.place.sticky import StickyLeastInflight
from verl_heddle.trajectory import TrajectoryId, TurnStart


@dataclass(slots=True)
class Life:
    """A trajectory from its first turn's start to its end."""

    who: TrajectoryId
    turns: int = 0
    """Turns started, a turn that starts again counted once."""
    tool_s: float = 0.0
    homes: dict[str, str] = field(default_factory=dict)
    """Replica of the last turn of each conversation."""
    open: set[str] = field(default_factory=set)
    """Requests of its turns under way."""
    plain: bool = False
    """Whether verl's own rule places its turns, since resident sets rested when it began."""


@dataclass(slots=True)
class OpenTurn:
    """A turn between its start and its end."""

    turn: TurnStart
    replica: str
    """Empty while it waits for admission to any."""
    priority: int
    life: Life | None
    """None: the request belongs to no trajectory."""


class OpenTurns:
    """By request, and by group. `rule` counts those that have a replica, each once."""

    def __init__(self, rule: StickyLeastInflight) -> None:
        self.rule = rule
        self.groups: dict[str, dict[str, None]] = {}
        """Requests by `uid`, in the order in which they came."""
        self._turns: dict[str, OpenTurn] = {}

    def __len__(self) -> int:
        return len(self._turns)

    def __contains__(self, request: str) -> bool:
        return request in self._turns

    def __iter__(self) -> Iterator[OpenTurn]:
        return iter(list(self._turns.values()))

    def get(self, request: str) -> OpenTurn | None:
        """The turn; None: it is not under way."""
        return self._turns.get(request)

    def add(self, opened: OpenTurn) -> None:
        """A turn starts; its caller has counted it."""
        self._turns[opened.turn.request] = opened
        self.groups.setdefault(opened.turn.trajectory.uid, {})[opened.turn.request] = None

    def close(self, request: str) -> OpenTurn | None:
        """The turn is over, and its caller uncounts it; None: it was over before."""
        opened = self._turns.pop(request, None)
        if opened is not None:
            group = self.groups[opened.turn.trajectory.uid]
            del group[request]
            if not group:
                del self.groups[opened.turn.trajectory.uid]
        return opened

    def start_by_rule(self, turn: TurnStart, at: str | None = None) -> str:
        """Place a turn and count it; returns the replica. `at`: one of the fleet that it is on its way to already.

        Raises:
            RuntimeError: the fleet is empty.
        """
        replica, _ = self.rule.acquire(turn.conversation, at)
        self.add(OpenTurn(turn, replica, 0, None))
        return replica

    def admit_by_rule(self, request: str) -> str | None:
        """Where a held turn goes, counted there; None: it is over, or no replica is left."""
        opened = self._turns.get(request)
        if opened is not None and not opened.replica and self.rule.inflight:
            opened.replica, _ = self.rule.acquire(opened.turn.conversation)
        return None if opened is None else opened.replica or None

    def recount(self, others: Mapping[str, int]) -> None:
        """Count anew: these turns, and `others` by replica, of callers that know no turns."""
        placed = Counter(opened.replica for opened in self._turns.values())
        for name in self.rule.inflight:
            self.rule.inflight[name] = placed[name] + others.get(name, 0)
