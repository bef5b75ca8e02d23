"""The base of baselines that admit whole programs: it tracks programs, the contexts that each replica keeps, and the turns that wait.

A program is the peers' term for a trajectory. A program with a `home` counts on that replica, during turns and tools. A turn whose program
is placed runs; any other turn waits until the law places it. A law is a subclass that overrides the hooks `asked`, `returned`, `over` and
`admit`, and, if it works by the clock, `period_s` and `check`.

Invariants: `Home.busy_tokens` and `Home.idle_tokens` are sums over its programs; a waiting turn is placed once or withdrawn. A law must
admit any program to an empty replica; otherwise a program larger than the law allows would wait forever.
Cost: O(1) per event, plus the cost of the law.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from math import inf
from typing import Any, cast

from verl_heddle.fleet import Replica
from verl_heddle.simulate.baselines.base import PeerReason
from verl_heddle.trajectory import Decision, Reason, TrajectoryEnd, TurnEnd, TurnStart


@dataclass(slots=True, eq=False)
class Program:
    """A live trajectory, its context and its replica."""

    key: str
    group: str
    """The uid of its prompt in this step."""
    number: int
    """Position of its first turn in the order of arrival."""
    context: int = 0
    """Context length after its last event, tokens."""
    claim: int = 0
    """Tokens that the law reserves for it on its home, beyond its context."""
    served: int = 0
    """Generated tokens."""
    turns: int = 0
    """Completed turns."""
    home: str | None = None
    """The replica it counts on; None: paused or not admitted yet."""
    last: str | None = None
    """The previous replica it counted on."""
    request: str | None = None
    """Name of its open turn; None in a tool."""
    running: bool = False
    """True while its open turn is in the engine of its home."""
    since_s: float = 0.0
    """When its open turn was requested; in a tool: when the previous turn ended."""


@dataclass(slots=True)
class Home:
    """The programs of one replica, and their sums."""

    replica: Replica
    capacity: float
    """KV capacity, tokens."""
    programs: dict[str, Program] = field(default_factory=dict)
    busy: int = 0
    """Turns in its engine."""
    busy_tokens: int = 0
    """Context tokens of programs in a turn."""
    idle_tokens: int = 0
    """Context tokens of programs in a tool, or waiting."""
    claims: int = 0
    """Tokens reserved for its programs."""

    @property
    def used(self) -> int:
        """Context tokens of all its programs."""
        return self.busy_tokens + self.idle_tokens

    @property
    def name(self) -> str:
        """The replica's name."""
        return self.replica.name


class Programs:
    """A policy over programs. These laws use no randomness; `seed` is accepted because every baseline takes one."""

    period_s = inf
    """Seconds between `check` calls while there are live programs; inf: no calls."""

    def __init__(self, seed: int = 0) -> None:
        self.homes: dict[str, Home] = {}
        self.live: dict[str, Program] = {}
        self.waiting: dict[str, Program] = {}
        """Programs whose turn waits, in order of request."""
        self.counts: Counter[str] = Counter()
        """Decisions by reason, and the law's own counters."""
        self._admitted: dict[str, str] = {}
        self._dropped: list[tuple[str, str]] = []
        self._number = 0
        self._check_s = inf

    # --- hooks of a law ---------------------------------------------------------------------------------------------------

    def asked(self, program: Program, now: float) -> None:
        """Its turn is in `waiting`: place it now or later. Default: a program with a home continues there."""
        if program.home is not None:
            self.place(program, program.home, now)
        else:
            self.admit(now)

    def returned(self, program: Program, now: float) -> None:
        """Its turn ended, completed or not; its tool, if any, begins."""
        self.admit(now)

    def over(self, program: Program, now: float) -> None:
        """The program ended; it no longer counts on any replica."""
        self.admit(now)

    def admit(self, now: float) -> None:
        """Place the waiting programs that fit."""

    def check(self, now: float) -> None:
        """Called every `period_s`, and at the time given to `check_at`."""

    def priority(self, program: Program) -> int:
        """vLLM priority of its turns; lower runs first."""
        return 0

    # --- operations for a law ---------------------------------------------------------------------------------------------

    def place(self, program: Program, name: str, now: float) -> None:
        """Assign the program to this replica, and submit its waiting turn there."""
        if program.home != name:
            self.leave(program)
            self.homes[name].programs[program.key] = program
            program.home = name
            self._book(program, 1)
        if self.waiting.pop(program.key, None) is not None and program.request is not None:
            self._book(program, -1)
            program.running = True
            self._book(program, 1)
            self._admitted[program.request] = name

    def leave(self, program: Program, drop: bool = False) -> None:
        """Remove the program from its replica. `drop`: the engine evicts its context before others."""
        if program.home is None:
            return
        self._book(program, -1)
        home = self.homes[program.home]
        del home.programs[program.key]
        if drop:
            self._dropped.append((program.key, home.name))
        program.last, program.home, program.running = home.name, None, False

    def check_at(self, now: float) -> None:
        """Schedule a call of `check` at this time; if that is now, after all other events of the instant."""
        self._check_s = min(self._check_s, now)

    def claim(self, program: Program, tokens: float) -> None:
        """Reserve this many tokens for the program on its current or next home."""
        if program.home is not None:
            self._book(program, -1)
        program.claim = round(tokens)
        if program.home is not None:
            self._book(program, 1)

    def fewest(self, key: Callable[[Home], Any]) -> Home:
        """The replica with the smallest key; among equals, the first in fleet order."""
        return min(self.homes.values(), key=key)

    # --- events -----------------------------------------------------------------------------------------------------------

    def replicas_added(self, replicas: Iterable[Replica]) -> None:
        """Replicas joined, empty."""
        for replica in replicas:
            self.homes[replica.name] = Home(replica, inf if replica.kv_tokens is None else replica.kv_tokens)

    def replicas_removed(self, names: Iterable[str]) -> None:
        """Replicas left; their programs lose their home."""
        for name in names:
            for program in list(self.homes[name].programs.values()):
                self.leave(program)
                program.last = None
            del self.homes[name]

    def turn_started(self, turn: TurnStart, now: float) -> Decision:
        """Submit the turn to the replica that the law chooses, or hold it."""
        key = turn.trajectory.key
        program = self.live.get(key)
        if program is None:
            if not self.live:
                self._check_s = now + self.period_s
            program = self.live[key] = Program(key, turn.trajectory.uid, self._number)
            self._number += 1
        if program.home is not None:
            self._book(program, -1)
        program.context, program.request, program.since_s = turn.context_tokens, turn.request, now
        if program.home is not None:
            self._book(program, 1)
        before, self.waiting[key] = program.home, program
        self.asked(program, now)
        name = self._admitted.pop(turn.request, "")
        reason = Reason.STICKY if name and name == before else PeerReason.ADMITTED
        self.counts[reason] += 1
        return Decision(name, self.priority(program), cast(Reason, reason), held=not name)

    def turn_finished(self, turn: TurnEnd, now: float) -> None:
        """Add the generated tokens to the program's context."""
        program = self.live.get(turn.trajectory.key)
        if program is None:
            return
        self._admitted.pop(turn.request, None)
        self.waiting.pop(program.key, None)
        if program.home is not None:
            self._book(program, -1)
        program.context += turn.output_tokens
        program.served += turn.output_tokens
        program.turns += turn.completed
        program.request, program.running, program.since_s = None, False, now
        if program.home is not None:
            self._book(program, 1)
        self.returned(program, now)

    def trajectory_ended(self, end: TrajectoryEnd, now: float) -> None:
        """Forget the program."""
        program = self.live.pop(end.trajectory.key, None)
        if program is not None:
            self.waiting.pop(program.key, None)
            self.leave(program)
            self.over(program, now)

    def admitted(self, now: float) -> list[tuple[str, str]]:
        """(turn, replica) of the turns placed since the last call."""
        result, self._admitted = list(self._admitted.items()), {}
        return result

    def released(self, now: float) -> list[tuple[str, str]]:
        """(trajectory, replica) of the contexts to evict first, since the last call."""
        result, self._dropped = [(key, name) for key, name in self._dropped if name in self.homes], []
        return result

    def tick(self, now: float) -> None:
        """Call `check` if its time has come."""
        if self.live and now >= self._check_s:
            self._check_s = now + self.period_s
            self.check(now)

    def due_s(self, now: float) -> float:
        """Time of the next `check`, seconds; inf: none."""
        return self._check_s if self.live else inf

    def _book(self, program: Program, sign: int) -> None:
        """Add a program to the sums of its home (`sign` 1) or subtract it (-1). Subtract before a change of the program and add after."""
        home = self.homes[cast(str, program.home)]
        home.claims += sign * program.claim
        if program.running:
            home.busy += sign
            home.busy_tokens += sign * program.context
        else:
            home.idle_tokens += sign * program.context
