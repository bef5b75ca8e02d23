"""A resident and its home: what `residents` keeps of a live trajectory and of a replica, and the orders in which trajectories go."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from heapq import heapify
from math import inf
from typing import Any

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
