"""A resident and its home: what `residents` keeps of a live trajectory and of a replica, and the orders in which trajectories go.

Which homes have room, where there are many: as `Residents` would find by going through them, but all at once.

While somebody waits the question is asked after every event. A row per home; the caller says which home has changed. Cost: O(1) per change,
one pass over arrays per question: 20 us with 1,000 homes, where going through them takes 400.

For how long a context is held through a tool call while somebody waits for its room.

Law. Holding is renting (ski rental): holding c tokens through a tool call of t seconds costs c * t token-seconds of KV cache; evicting them
costs c / r seconds of an engine with C tokens of KV, which is c * C / r. They are equal at t* = C / r, whatever c is: the time in which the
engine reads its whole KV cache. A context is held for t*, which costs at most twice the best without knowing t; not at all, where by the
last `GAPS` tool calls holding costs `CLEARLY` more than reading again each time.

Source: Karlin et al. 1988 (ski rental); Continuum (arXiv 2511.02230) for a time to live of KV cache. Cost: O(`GAPS`) every few tool calls.

Which replicas' engines a weight update has stopped, whether they are in the fleet or away with the trainer.

Engines go on one by one, and the first would be given everybody who waits: so they wait for the others, for a little. Time comes in by
arguments only. Cost: nothing while no engine is paused, otherwise O(replicas).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from heapq import heapify
from math import inf
from typing import Any

import numpy as np

from verl_heddle.fleet import Replica


@dataclass(slots=True, eq=False)
class Live:
    """What is known of a live trajectory; a policy's order reads it."""

    key: str
    prompt: str
    number: int
    """Order of its first turn."""
    prompt_tokens: int
    context: int
    """Tokens after its last event."""
    served: int = 0
    """Tokens generated."""
    home: str | None = None
    """Where it is resident."""
    last: str | None = None
    """Where it was resident last."""
    running: set[str] = field(default_factory=set)
    """Turns in the engine of its home."""
    waiting: list[str] = field(default_factory=list)
    """Turns that wait for admission."""
    since_s: float = 0.0
    """Since when it waits."""
    batch: float = 0.0
    """The training step that asked for it; validation: before all of them."""
    idle: bool = False
    """Resident without a turn."""
    ended_s: float = inf
    """When its last turn ended, while it has none."""
    entry: int = 0
    """Identifies its newest entry in a heap."""
    own: float = 0.0
    """Tokens counted against its home for it alone."""


Order = Callable[[Live], float]
"""The lowest goes first; ties by number of the first turn. Within a batch: those of an earlier one go before."""


@dataclass(slots=True)
class Home:
    """A replica, and whom it keeps."""

    replica: Replica
    capacity: float
    most: float
    """Residents at most: with a turn each they fill what its server takes."""
    hold_s: float
    """Its t*."""
    used: float = 0.0
    running: int = 0
    residents: dict[str, Live] = field(default_factory=dict)
    prompts: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Of each prompt, how many residents share it and its tokens."""
    idle: list[tuple[float, float, int, int, Live]] = field(default_factory=list)
    """Heap: last in the order first."""


def current(item: tuple[Any, ...]) -> bool:
    """Whether an idle resident's entry in a heap, which ends in (`Live.entry`, the resident), is not outdated."""
    entry, live = item[-2:]
    return bool(live.idle) and live.entry == entry


def tidy(heap: list[Any], valid: int) -> None:
    """Drop the outdated entries of idle residents where they are more than the `valid`: nobody may ask for them for a whole run. Cost: O(1)
    for each entry ever made."""
    if len(heap) > 2 * valid + 64:
        heap[:] = filter(current, heap)
        heapify(heap)


def by_arrival(live: Live) -> float:
    """In the order of first turns."""
    return 0.0


def least_served(live: Live) -> float:
    """Who has generated least goes first (PLAS, Autellix): the long reveal themselves early, and no prediction is needed."""
    return float(live.served)


ORDERS: Mapping[str, Order] = {"by_arrival": by_arrival, "least_served": least_served}
"""Those that need no prediction, by name."""


USED, RUNNING, RESIDENTS = range(3)


class Rooms:
    """Of these homes, in their order, until one joins or leaves. `admit`: share of its KV cache up to which a home has room."""

    def __init__(self, homes: Iterable[Home], admit: float) -> None:
        self._homes = list(homes)
        self._row = {home.replica.name: row for row, home in enumerate(self._homes)}
        self._room = np.array([home.capacity * admit for home in self._homes])
        self._most = np.array([home.most for home in self._homes])
        self._table = np.zeros((3, len(self._homes)))
        self._sharers: dict[str, dict[int, None]] = {}
        """Rows of the homes that a prompt is counted at."""
        for row, home in enumerate(self._homes):
            self.changed(home)
            for prompt in home.prompts:
                self._sharers.setdefault(prompt, {})[row] = None

    def changed(self, home: Home, prompt: str | None = None) -> None:
        """Its tokens, turns or residents are others; `prompt`: that is counted there from now on, or no more."""
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

    def find(self, own: float, prompt: str, prompt_tokens: int, closed: Iterable[str], first: str | None) -> list[Home]:
        """Homes with room for a trajectory of so many tokens beside its prompt: `first`, if it has, or those with the fewest turns. Not the
        `closed`."""
        used, running, residents = self._table
        need = np.full(len(used), float(own + prompt_tokens))
        sharers = self._sharers.get(prompt)
        if sharers:
            need[list(sharers)] = own
        room = (used + need <= self._room) & (residents < self._most) | (residents == 0)
        for name in closed:
            if name in self._row:
                room[self._row[name]] = False
        row = None if first is None else self._row.get(first)
        if row is not None and room[row]:
            return [self._homes[row]]
        found = room.nonzero()[0]
        if not len(found):
            return []
        turns = running[found]
        return [self._homes[row] for row in found[turns == turns.min()]]


GAPS, FEW = 256, 32
"""Tool calls that are looked back on, and how many there must be."""

CLEARLY = 1.5
"""A held trajectory goes on without waiting, which no price of KV tells: at 1.0, tools about as long as t* lose 1 to 3 %."""


class Rent:
    """What recent tool calls say about holding."""

    def __init__(self) -> None:
        self._gaps: deque[float] = deque(maxlen=GAPS)
        self._measured = 0
        self._futile: dict[float, bool] = {}
        """By t*, asked and not outdated."""

    def measured(self, gap_s: float) -> None:
        """A tool call has taken so long, from the end of a turn to the start of the next."""
        self._gaps.append(gap_s)
        self._measured += 1
        if self._measured % (FEW // 2) == 0:
            self._futile.clear()

    def hold_s(self, rent_s: float) -> float:
        """How long to hold a context whose t* is `rent_s`."""
        if rent_s not in self._futile:
            self._futile[rent_s] = self._measured >= FEW and futile(self._gaps, rent_s)
        return 0.0 if self._futile[rent_s] else rent_s


def futile(gaps: Collection[float], hold_s: float) -> bool:
    """Whether, through tool calls of these lengths, to hold for t* costs clearly more than it saves: per token and call min(t, t*), against
    t* where the tool returns in time."""
    cost = sum(min(gap, hold_s) for gap in gaps)
    return cost > CLEARLY * hold_s * sum(gap <= hold_s for gap in gaps)


LONGEST_PAUSE_S = 3600.0
"""A pause that lasts longer is not believed."""

SETTLE_S = 5.0
"""How long replicas that go on after a weight update wait for the others."""


class Pauses:
    """Pauses by replica name."""

    def __init__(self) -> None:
        self._since_s: dict[str, float] = {}
        self._settled_s = inf
        """When those that go on do not wait any longer; inf: they need not."""

    def __contains__(self, name: str) -> bool:
        return name in self._since_s

    def __iter__(self) -> Iterator[str]:
        return iter(self._since_s)

    def begin(self, name: str, now: float) -> None:
        """This engine takes no requests."""
        self._since_s[name] = now

    def end(self, name: str, now: float) -> bool:
        """It goes on; False if it did already."""
        if self._since_s.pop(name, None) is None:
            return False
        self._settled_s = min(self._settled_s, now + SETTLE_S)
        return True

    def tick(self, now: float) -> bool:
        """Time has passed: those that are paused are not waited for any longer, and a pause of which nobody has heard the end is over;
        returns whether one is."""
        over = [name for name, since_s in self._since_s.items() if since_s + LONGEST_PAUSE_S <= now]
        for name in over:
            self.end(name, now)
        if self._settled_s <= now:
            self._settled_s = inf
        return bool(over)

    def all(self, fleet: Collection[str]) -> bool:
        """Whether no engine of the fleet is at work."""
        return bool(self._since_s) and all(name in self._since_s for name in fleet)

    def settling(self, fleet: Collection[str]) -> bool:
        """Whether those of the fleet that go on wait for others of it."""
        return self._settled_s < inf and any(name in self._since_s for name in fleet)

    def due_s(self, fleet: Collection[str]) -> float:
        """When `tick` has something to do for this fleet; inf: never."""
        ends = [since_s + LONGEST_PAUSE_S for name, since_s in self._since_s.items() if name in fleet]
        return min([self._settled_s, *ends]) if ends else inf
