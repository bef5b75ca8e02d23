"""The turns in flight: their trajectories, replicas and priorities, the number of them per replica, and which need a new priority.

If a policy raises, its caller goes on without it, by verl's rule: `start_by_rule`, `admit_by_rule`, `close`, and then `recount`, since the
policy may or may not have counted the turn. Cost: O(1) per turn; `recount` O(turns).
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from math import inf

from verl_heddle.place.sticky import StickyLeastInflight
from verl_heddle.trajectory import TrajectoryId, TurnEnd, TurnStart


@dataclass(slots=True)
class Life:
    """A trajectory from its first turn's start to its end."""

    identity: TrajectoryId
    turns: int = 0
    """Turns started; a restarted turn counts once."""
    tool_s: float = 0.0
    homes: dict[str, str] = field(default_factory=dict)
    """By conversation: replica of its last turn."""
    open: set[str] = field(default_factory=set)
    """Requests of its turns in flight."""
    plain: bool = False
    """Whether verl's own rule places its turns, because resident sets rested when it began."""


class Lives(dict[str, Life]):
    """Live trajectories by key."""

    def started(self, turn: TurnStart, plain: bool) -> Life:
        """The turn's trajectory, updated by its start; `plain` is for a new one."""
        life = self.get(turn.trajectory.key)
        if life is None:
            life = self[turn.trajectory.key] = Life(turn.trajectory, plain=plain)
        if turn.turn >= life.turns:  # otherwise its replica was lost, and it restarts
            life.turns = turn.turn + 1
            life.tool_s += turn.tool_s or 0.0
        return life


@dataclass(slots=True)
class OpenTurn:
    """A turn between its start and its end."""

    turn: TurnStart
    replica: str
    """Empty while it is held without a replica."""
    priority: int
    life: Life | None
    """None: the request belongs to no trajectory."""

    def withdrawn(self) -> TurnEnd:
        """Its end without a result."""
        turn = self.turn
        return TurnEnd(turn.trajectory, turn.conversation, self.replica, turn.turn, 0, False, leg=turn.leg)


class OpenTurns:
    """Turns in flight by request and by group. `rule` counts those that have a replica, each once."""

    def __init__(self, rule: StickyLeastInflight) -> None:
        self.rule = rule
        self.groups: dict[str, dict[str, None]] = {}
        """By `uid`: requests in order of arrival."""
        self._turns: dict[str, OpenTurn] = {}

    def __len__(self) -> int:
        return len(self._turns)

    def __contains__(self, request: str) -> bool:
        return request in self._turns

    def __iter__(self) -> Iterator[OpenTurn]:
        return iter(list(self._turns.values()))

    def get(self, request: str) -> OpenTurn | None:
        """The turn; None: it is not in flight."""
        return self._turns.get(request)

    def add(self, opened: OpenTurn) -> None:
        """A turn starts; the caller has counted it."""
        self._turns[opened.turn.request] = opened
        self.groups.setdefault(opened.turn.trajectory.uid, {})[opened.turn.request] = None

    def close(self, request: str) -> OpenTurn | None:
        """Remove a turn, which the caller uncounts; None: it is not in flight."""
        opened = self._turns.pop(request, None)
        if opened is not None:
            group = self.groups[opened.turn.trajectory.uid]
            del group[request]
            if not group:
                del self.groups[opened.turn.trajectory.uid]
        return opened

    def start_by_rule(self, turn: TurnStart, at: str | None = None) -> str:
        """Place a turn by verl's rule and count it; returns the replica. `at`: the replica it is already on its way to.

        Raises:
            RuntimeError: the fleet is empty.
        """
        replica, _ = self.rule.acquire(turn.conversation, at)
        self.add(OpenTurn(turn, replica, 0, None))
        return replica

    def admit_by_rule(self, request: str) -> str | None:
        """Place a held turn by verl's rule and count it; returns the replica. None: the turn is over, or no replica is left."""
        opened = self._turns.get(request)
        if opened is not None and not opened.replica and self.rule.inflight:
            opened.replica, _ = self.rule.acquire(opened.turn.conversation)
        return None if opened is None else opened.replica or None

    def recount(self, others: Mapping[str, int]) -> None:
        """Set the counts per replica to these turns plus `others`, requests from callers that do not report turns."""
        placed = Counter(opened.replica for opened in self._turns.values())
        for name in self.rule.inflight:
            self.rule.inflight[name] = placed[name] + others.get(name, 0)


class Refresh:
    """Turns in flight that need a new priority because a trajectory of their group has ended, refreshed at most every `every_s` seconds."""

    def __init__(self, turns: OpenTurns, every_s: float) -> None:
        self._turns, self._every_s = turns, every_s
        self.changed: dict[str, None] = {}
        """Groups with turns in flight of which a trajectory has ended since the last refresh."""
        self._requests: deque[str] = deque()
        """Requests that the current refresh has not reached yet."""
        self._began_s = -inf

    def trajectory_ended(self, uid: str) -> None:
        """A trajectory of the group has ended."""
        if uid in self._turns.groups:
            self.changed[uid] = None

    def turn_closed(self, uid: str) -> None:
        """A turn of the group is over."""
        if uid not in self._turns.groups:
            self.changed.pop(uid, None)

    @property
    def due_s(self) -> float | None:
        """When `take` has something to return, possibly a time in the past; None: not before another trajectory ends."""
        if self._requests:
            return self._began_s
        return self._began_s + self._every_s if self.changed else None

    def take(self, now: float, most: int, known: Callable[[str], bool]) -> list[OpenTurn]:
        """The next turns to refresh, `most` at a time, if due; those of trajectories that are not `known` are skipped."""
        due = self.due_s
        if due is None or now < due:
            return []
        if not self._requests:
            self._began_s = now
            self._requests.extend(request for group in self.changed for request in self._turns.groups[group])
            self.changed.clear()
        turns: list[OpenTurn] = []
        while self._requests and len(turns) < most:
            turn = self._turns.get(self._requests.popleft())
            if turn is not None and turn.life is not None and known(turn.life.identity.key):
                turns.append(turn)
        return turns
