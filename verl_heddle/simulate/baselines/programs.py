"""What the peers that admit whole programs have in common: books of programs, of what each replica keeps, and of the turns that wait.

A program is a trajectory, in the peers' word. A program with a `home` counts there, in a turn or in a tool; a turn whose program has been
placed runs, any other waits until the law places it. A law is a subclass that overrides the hooks `asked`, `returned`, `over` and `admit`,
and, if it works by the clock, `period_s` and `check`.

Invariants: `Home.busy_tokens` and `Home.idle_tokens` are sums over its programs; a waiting turn is placed once or withdrawn. A law must
place on a replica that keeps nothing whoever comes, or nobody would ever end where a program is larger than its law allows.
Cost: O(1) per event, plus the law's.
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
    """A live trajectory."""

    key: str
    group: str
    """The samples of one prompt in one step."""
    number: int
    """Order of its first turn."""
    context: int = 0
    """Tokens after its last event."""
    claim: int = 0
    """Tokens a law keeps free for it beyond its context, on its home."""
    served: int = 0
    """Tokens it has generated."""
    turns: int = 0
    """Turns it has completed."""
    home: str | None = None
    """The replica it counts on."""
    last: str | None = None
    """The replica it counted on last."""
    request: str | None = None
    """Its open turn."""
    running: bool = False
    """Its open turn is in the engine of its home."""
    since_s: float = 0.0
    """When its open turn was asked for; in a tool: when the turn before ended."""


@dataclass(slots=True)
class Home:
    """What a replica keeps."""

    replica: Replica
    capacity: float
    """Tokens of its KV cache."""
    programs: dict[str, Program] = field(default_factory=dict)
    busy: int = 0
    """Turns in its engine."""
    busy_tokens: int = 0
    """Contexts of programs in a turn."""
    idle_tokens: int = 0
    """Contexts of programs in a tool, or waiting."""
    claims: int = 0
    """What is kept free for its programs."""

    @property
    def used(self) -> int:
        """Tokens that count on it."""
        return self.busy_tokens + self.idle_tokens

    @property
    def name(self) -> str:
        """The replica's name."""
        return self.replica.name


class Programs:
    """A policy over programs; see the module. No law here draws at random: `seed` is taken as all baselines take one."""

    period_s = inf
    """Seconds from one `check` to the next while programs live; inf: none."""

    def __init__(self, seed: int = 0) -> None:
        self.homes: dict[str, Home] = {}
        self.live: dict[str, Program] = {}
        self.waiting: dict[str, Program] = {}
        """Programs whose turn waits, in the order in which they asked."""
        self.counts: Counter[str] = Counter()
        """Decisions by reason, and what the law counts."""
        self._admitted: dict[str, str] = {}
        self._dropped: list[tuple[str, str]] = []
        self._number = 0
        self._check_s = inf

    # --- what a law is made of --------------------------------------------------------------------------------------------

    def asked(self, program: Program, now: float) -> None:
        """Its turn is in `waiting`: place it now or later. Here: a program with a home goes on there."""
        if program.home is not None:
            self.place(program, program.home, now)
        else:
            self.admit(now)

    def returned(self, program: Program, now: float) -> None:
        """Its turn is over, completed or not; its tool begins."""
        self.admit(now)

    def over(self, program: Program, now: float) -> None:
        """It has ended and counts nowhere any more."""
        self.admit(now)

    def admit(self, now: float) -> None:
        """Place whom there is room for."""

    def check(self, now: float) -> None:
        """`period_s` are over, or `check_at`."""

    def priority(self, program: Program) -> int:
        """vLLM priority of its turns, lower first."""
        return 0

    # --- what a law may do ------------------------------------------------------------------------------------------------

    def place(self, program: Program, name: str, now: float) -> None:
        """It counts on this replica from now on, and its waiting turn goes there."""
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
        """It counts nowhere. `drop`: the engine throws its context out before others."""
        if program.home is None:
            return
        self._book(program, -1)
        home = self.homes[program.home]
        del home.programs[program.key]
        if drop:
            self._dropped.append((program.key, home.name))
        program.last, program.home, program.running = home.name, None, False

    def check_at(self, now: float) -> None:
        """Have `check` called then; at this instant: after all that happens in it."""
        self._check_s = min(self._check_s, now)

    def claim(self, program: Program, tokens: float) -> None:
        """Keep so much free for it wherever it has its home."""
        if program.home is not None:
            self._book(program, -1)
        program.claim = round(tokens)
        if program.home is not None:
            self._book(program, 1)

    def fewest(self, key: Callable[[Home], Any]) -> Home:
        """The replica with the smallest key, the first of the fleet among equals."""
        return min(self.homes.values(), key=key)

    # --- events -----------------------------------------------------------------------------------------------------------

    def replicas_added(self, replicas: Iterable[Replica]) -> None:
        """Replicas joined, empty."""
        for replica in replicas:
            self.homes[replica.name] = Home(replica, inf if replica.kv_tokens is None else replica.kv_tokens)

    def replicas_removed(self, names: Iterable[str]) -> None:
        """Replicas left: their programs have no home."""
        for name in names:
            for program in list(self.homes[name].programs.values()):
                self.leave(program)
                program.last = None
            del self.homes[name]

    def turn_started(self, turn: TurnStart, now: float) -> Decision:
        """The turn goes where the law places it, or waits."""
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
        """Book what it generated."""
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
        """Forget it."""
        program = self.live.pop(end.trajectory.key, None)
        if program is not None:
            self.waiting.pop(program.key, None)
            self.leave(program)
            self.over(program, now)

    def admitted(self, now: float) -> list[tuple[str, str]]:
        """(turn, replica) of those placed since the last call."""
        result, self._admitted = list(self._admitted.items()), {}
        return result

    def released(self, now: float) -> list[tuple[str, str]]:
        """(trajectory, replica) of contexts to be dropped first, since the last call."""
        result, self._dropped = [(key, name) for key, name in self._dropped if name in self.homes], []
        return result

    def tick(self, now: float) -> None:
        """A timer may have run out."""
        if self.live and now >= self._check_s:
            self._check_s = now + self.period_s
            self.check(now)

    def due_s(self, now: float) -> float:
        """When `tick` is to be called; inf: no need."""
        return self._check_s if self.live else inf

    def _book(self, program: Program, sign: int) -> None:
        """Count a program on its home (1), or no longer (-1); whatever is counted changes between the two."""
        home = self.homes[cast(str, program.home)]
        home.claims += sign * program.claim
        if program.running:
            home.busy += sign
            home.busy_tokens += sign * program.context
        else:
            home.idle_tokens += sign * program.context
