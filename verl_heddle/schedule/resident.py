"""State and helpers of `Residents`: live trajectories, replicas, orders of admission, the search for room, hold times and pauses.

- Room search. While a trajectory waits, the search runs after every event. `find_room` loops over the replicas; `Rooms` gives the same
  answer from arrays with a row per replica, which the caller keeps up to date. Cost of `Rooms`: O(1) per change and one pass over the
  arrays per search: 20 us with 1,000 replicas, where the loop takes 400.
- Hold time, the law (ski rental). Holding c tokens through a tool call of t seconds costs c * t token-seconds of KV cache. Evicting them
  costs c / r seconds of an engine with C tokens of KV cache that reads r tokens per second, which is c * C / r token-seconds. The costs
  are equal at t* = C / r for every c: the time in which the engine reads its whole KV cache. Holding a context for t* costs at most twice
  the optimum, without knowing t. Nothing is held if, over the last `GAPS` tool calls, holding cost `CLEARLY` more than recomputing every
  time. Cost: O(`GAPS`) every few tool calls.
- Pauses. A weight update pauses engines, whether their replicas are in the fleet or lent to the trainer. Engines resume one by one, and
  the first would get every waiting trajectory; so resumed replicas wait for the others for at most `SETTLE_S`. Cost: none while no engine
  is paused, otherwise O(replicas).

Times are arguments. Source of the hold time: Karlin et al. 1988 (ski rental); Continuum (arXiv 2511.02230) for a time to live of KV cache.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from math import inf
from typing import Any

import numpy as np

from verl_heddle.fleet import Replica
from verl_heddle.trajectory import TurnEnd


@dataclass(slots=True, eq=False)
class Live:
    """A trajectory between its first turn and its end; orders read it."""

    key: str
    prompt: str
    number: int
    """Position of its first turn among all first turns."""
    prompt_tokens: int
    context: int
    """Tokens after its last event."""
    served: int = 0
    """Tokens generated."""
    home: str | None = None
    """The replica on which it is resident."""
    last: str | None = None
    """The replica on which it was last resident."""
    running: set[str] = field(default_factory=set)
    """Its turns in that replica's engine."""
    waiting: list[str] = field(default_factory=list)
    """Turns that wait for admission."""
    since_s: float = 0.0
    """When it began to wait."""
    batch: float = 0.0
    """Training step that asked for it; validation sorts before all of them."""
    idle: bool = False
    """Resident without a turn."""
    ended_s: float = inf
    """When its last turn ended; inf while it has a turn."""
    entry: int = 0
    """Number of its newest entry in a heap; older entries are outdated."""
    own: float = 0.0
    """Tokens counted against its replica, its prompt excluded."""


Order = Callable[[Live], float]
"""Lowest value first; ties by `Live.number`. The order applies within a batch; earlier batches go first."""


@dataclass(slots=True)
class ReplicaState:
    """A replica and its residents."""

    replica: Replica
    capacity: float
    most: float
    """Maximum residents: with one turn each they use all calls that the server takes."""
    hold_s: float
    """Its t*."""
    used: float = 0.0
    running: int = 0
    residents: dict[str, Live] = field(default_factory=dict)
    prompts: dict[str, tuple[int, int]] = field(default_factory=dict)
    """By prompt: residents that share it, and its tokens."""
    idle: list[tuple[float, float, int, int, Live]] = field(default_factory=list)
    """Heap of idle residents, the last in the order first."""

    def add(self, live: Live) -> None:
        """Add a resident and count its prompt; the caller counts `Live.own`."""
        sharing, tokens = self.prompts.get(live.prompt, (0, live.prompt_tokens))
        self.prompts[live.prompt] = (sharing + 1, tokens)
        self.used += 0 if sharing else tokens
        self.residents[live.key] = live

    def remove(self, live: Live) -> None:
        """Remove a resident and its tokens."""
        del self.residents[live.key]
        self.used -= live.own
        sharing, tokens = self.prompts.pop(live.prompt)
        if sharing > 1:
            self.prompts[live.prompt] = (sharing - 1, tokens)
        else:
            self.used -= tokens
        if not self.residents:
            self.used = 0.0  # removes the rounding error

    def push_idle(self, live: Live, order: Order) -> None:
        """A resident became idle and has a new `Live.entry`."""
        heappush(self.idle, (-live.batch, -order(live), -live.number, live.entry, live))
        tidy(self.idle, len(self.residents))

    def pop_idle(self) -> Live | None:
        """The idle resident that is last in the order; None: there is none."""
        while self.idle:
            item = heappop(self.idle)
            if current(item):
                return item[-1]
        return None


def current(item: tuple[Any, ...]) -> bool:
    """Whether a heap entry of an idle resident, which ends in (`Live.entry`, the resident), is not outdated."""
    entry, live = item[-2:]
    return bool(live.idle) and live.entry == entry


def tidy(heap: list[Any], valid: int) -> None:
    """Drop outdated entries of idle residents once they outnumber the `valid` ones; otherwise a heap that is never popped grows for the
    whole run. Cost: O(1) per entry, amortised."""
    if len(heap) > 2 * valid + 64:
        heap[:] = filter(current, heap)
        heapify(heap)


class Queue:
    """Trajectories that wait for admission, in order. Entries of trajectories that no longer wait are skipped."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._heap: list[tuple[float, float, int, int, Live]] = []

    def __len__(self) -> int:
        """Entries, outdated ones included."""
        return len(self._heap)

    def push(self, live: Live) -> None:
        """A trajectory begins to wait and has a new `Live.entry`."""
        heappush(self._heap, (live.batch, self._order(live), live.number, live.entry, live))

    def head(self) -> Live | None:
        """The next to be admitted; None: no trajectory waits."""
        heap = self._heap
        while heap:
            *_, entry, live = heap[0]
            if live.entry == entry and live.waiting and live.home is None:
                return live
            heappop(heap)
        return None

    def pop(self) -> None:
        """Remove the head."""
        heappop(self._heap)


def by_arrival(live: Live) -> float:
    """In the order of first turns."""
    return 0.0


def least_served(live: Live) -> float:
    """Fewest generated tokens first (PLAS, Autellix): long trajectories show early, and no prediction is needed."""
    return float(live.served)


ORDERS: Mapping[str, Order] = {"by_arrival": by_arrival, "least_served": least_served}
"""Orders that need no prediction, by name."""

MEMORY = 1000.0
"""Turns after which the mean growth of a turn forgets by a factor e."""


class Growth:
    """Mean tokens that a turn adds to its context."""

    def __init__(self) -> None:
        self._tokens = self._turns = 0.0

    def turn(self, turn: TurnEnd) -> None:
        """A turn completed."""
        keep = 1 - 1 / MEMORY
        self._tokens, self._turns = self._tokens * keep + turn.before_tokens + turn.output_tokens, self._turns * keep + 1

    def tokens(self) -> float:
        """The mean; 0 before a turn has completed."""
        return self._tokens / self._turns if self._turns else 0.0


def find_room(homes: Mapping[str, ReplicaState], admit: float, own: float, live: Live, closed: Pauses) -> list[ReplicaState]:
    """Replicas with room for a trajectory with `own` tokens beside its prompt: its last replica alone if that has room, otherwise those
    with the fewest turns. `admit`: share of a KV cache up to which there is room; replicas that are `closed` are skipped."""
    fewest, found = inf, list[ReplicaState]()
    for name, home in homes.items():
        need = own + (0 if live.prompt in home.prompts else live.prompt_tokens)
        if name in closed:
            continue
        if home.residents and (home.used + need > home.capacity * admit or len(home.residents) >= home.most):
            continue
        if name == live.last:
            return [home]
        if home.running <= fewest:
            found = [home] if home.running < fewest else [*found, home]
            fewest = home.running
    return found


USED, RUNNING, RESIDENTS = range(3)


class Rooms:
    """`find_room` on arrays, for these replicas in their order; to be rebuilt when one joins or leaves. `admit` as there."""

    def __init__(self, homes: Iterable[ReplicaState], admit: float) -> None:
        self._homes = list(homes)
        self._row = {home.replica.name: row for row, home in enumerate(self._homes)}
        self._room = np.array([home.capacity * admit for home in self._homes])
        self._most = np.array([home.most for home in self._homes])
        self._table = np.zeros((3, len(self._homes)))
        self._sharers: dict[str, dict[int, None]] = {}
        """By prompt: rows of the replicas that count it."""
        for row, home in enumerate(self._homes):
            self.changed(home)
            for prompt in home.prompts:
                self._sharers.setdefault(prompt, {})[row] = None

    def changed(self, home: ReplicaState, prompt: str | None = None) -> None:
        """A replica's tokens, turns or residents have changed; `prompt`: the prompt that it may have started or stopped counting."""
        row, table = self._row[home.replica.name], self._table
        table[USED, row], table[RUNNING, row], table[RESIDENTS, row] = home.used, home.running, len(home.residents)
        if prompt is None:
            return
        sharers = self._sharers.setdefault(prompt, {})
        if prompt in home.prompts:
            sharers[row] = None
        else:
            sharers.pop(row, None)
            if not sharers:
                del self._sharers[prompt]

    def find(self, own: float, live: Live, closed: Pauses) -> list[ReplicaState]:
        """As `find_room`."""
        used, running, residents = self._table
        need = np.full(len(used), float(own + live.prompt_tokens))
        sharers = self._sharers.get(live.prompt)
        if sharers:
            need[list(sharers)] = own
        room = (used + need <= self._room) & (residents < self._most) | (residents == 0)
        for name in closed:
            if name in self._row:
                room[self._row[name]] = False
        row = None if live.last is None else self._row.get(live.last)
        if row is not None and room[row]:
            return [self._homes[row]]
        found = room.nonzero()[0]
        if not len(found):
            return []
        turns = running[found]
        return [self._homes[row] for row in found[turns == turns.min()]]


GAPS, FEW = 256, 32
"""Tool calls to look back on, and the least number to decide from."""

CLEARLY = 1.5
"""A held trajectory goes on without waiting, a benefit that the price of KV cache leaves out: at 1.0, tools about as long as t* lose 1 to
3 %."""


class Rent:
    """How long idle residents are held, by recent tool calls, and until when."""

    def __init__(self) -> None:
        self._ends: list[tuple[float, int, Live]] = []
        """Heap by the end of the hold time; outdated entries are skipped."""
        self._gaps: deque[float] = deque(maxlen=GAPS)
        self._measured = 0
        self._futile: dict[float, bool] = {}
        """Cached answers by t*."""

    def measured(self, gap_s: float) -> None:
        """Record a tool call: seconds from the end of a turn to the start of the next."""
        self._gaps.append(gap_s)
        self._measured += 1
        if self._measured % (FEW // 2) == 0:
            self._futile.clear()

    def hold_s(self, rent_s: float) -> float:
        """How long to hold a context whose t* is `rent_s`."""
        if rent_s not in self._futile:
            self._futile[rent_s] = self._measured >= FEW and futile(self._gaps, rent_s)
        return 0.0 if self._futile[rent_s] else rent_s

    def __len__(self) -> int:
        """Entries, outdated ones included."""
        return len(self._ends)

    def push(self, live: Live, now: float, rent_s: float, idle: int) -> None:
        """Hold a resident that became idle, one of `idle`, and has a new `Live.entry`; `rent_s` is its replica's t*."""
        heappush(self._ends, (now + self.hold_s(rent_s), live.entry, live))
        tidy(self._ends, idle)

    def due_s(self) -> float:
        """When the next hold time ends; inf: there is none."""
        ends = self._ends
        while ends and not current(ends[0]):
            heappop(ends)
        return ends[0][0] if ends else inf

    def pop(self) -> Live:
        """Remove the resident whose hold time ends next, as `due_s` found it."""
        return heappop(self._ends)[-1]


def futile(gaps: Collection[float], hold_s: float) -> bool:
    """Whether holding for t* through tool calls of these lengths clearly costs more than it saves. Per token, a call of t seconds costs
    min(t, t*), and saves t* if the tool returns in time."""
    cost = sum(min(gap, hold_s) for gap in gaps)
    return cost > CLEARLY * hold_s * sum(gap <= hold_s for gap in gaps)


LONGEST_PAUSE_S = 3600.0
"""A pause longer than this is taken to be over."""

SETTLE_S = 5.0
"""How long replicas that resume after a weight update wait for the others."""


class Pauses:
    """Names of replicas whose engines are paused."""

    def __init__(self) -> None:
        self._since_s: dict[str, float] = {}
        self._settled_s = inf
        """When resumed replicas stop waiting for the others; inf: they do not wait."""

    def __contains__(self, name: str) -> bool:
        return name in self._since_s

    def __iter__(self) -> Iterator[str]:
        return iter(self._since_s)

    def begin(self, name: str, now: float) -> None:
        """This engine takes no requests from now on."""
        self._since_s[name] = now

    def end(self, name: str, now: float) -> bool:
        """This engine resumes; returns whether it was paused."""
        if self._since_s.pop(name, None) is None:
            return False
        self._settled_s = min(self._settled_s, now + SETTLE_S)
        return True

    def tick(self, now: float) -> bool:
        """Stop waiting for paused engines after `SETTLE_S`, and end pauses older than `LONGEST_PAUSE_S`; returns whether one ended."""
        over = [name for name, since_s in self._since_s.items() if since_s + LONGEST_PAUSE_S <= now]
        for name in over:
            self.end(name, now)
        if self._settled_s <= now:
            self._settled_s = inf
        return bool(over)

    def all(self, fleet: Collection[str]) -> bool:
        """Whether every engine of the fleet is paused."""
        return bool(self._since_s) and all(name in self._since_s for name in fleet)

    def settling(self, fleet: Collection[str]) -> bool:
        """Whether resumed replicas of the fleet wait for others of it."""
        return self._settled_s < inf and any(name in self._since_s for name in fleet)

    def due_s(self, fleet: Collection[str]) -> float:
        """When `tick` has something to do for this fleet; inf: never."""
        ends = [since_s + LONGEST_PAUSE_S for name, since_s in self._since_s.items() if name in fleet]
        return min([self._settled_s, *ends]) if ends else inf
