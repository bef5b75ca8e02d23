"""Preemption on arrival: when a waiting turn takes the slot of a running one. `verl_plugin.vllm_scheduler` applies it in vLLM's steps.

Law. vLLM starts waiting turns in the order (aged priority, arrival), lower first. Take the first `STARTS` of them in that order.
- A turn that finds a free slot and its KV blocks starts without the rule.
- A turn that finds no slot is a *winner*, paired with the first running turn that has no objection to being its *victim*, tried from the
  worst aged priority; then the next waiting turn is tried.
- The first turn without a victim ends the walk, because vLLM would let no turn overtake it.
- So does a turn that finds a slot and lacks only KV blocks (KV_SHORT). If KV cache is short, an exchange frees nothing and contexts are
  recomputed: 0.84x to 0.93x of stock's speed in three simulated steps that run at 1.02x to 1.09x without it.

Objections of a victim, in this order:
1. MARGIN: its own priority, or its aged one, is not worse than the winner's by at least `margin`;
2. CAPPED: it has lost its slot to this rule `max_preemptions` times already;
3. YOUNG: it has run fewer than `min_steps` steps since it (re)started;
4. NO_ROOM: the free blocks and its own are fewer than the winner needs (a winner gets one victim, never two);
5. COST: (priority difference) * `tokens_per_unit` <= (tokens to recompute) / `tokens_per_step`.

Cost is in decode steps, because a step spent on recomputing delays the whole batch. With the prefix cache a victim finds all its full
blocks again: it recomputes the tokens after the last full one, and the blocks that the winner evicts. Freed blocks are evicted last, so the
winner evicts what it needs beyond the blocks that were free before. Without the cache the victim recomputes everything. Gain is in the same
unit: the predicted difference of the remaining tokens, the most that starting the longer of two jobs first can take off the makespan.

Ageing. aged = priority + ageing_per_s * arrival. A turn improves by `ageing_per_s` for every second since its arrival; all improve at the
same rate, so their order never changes while they wait (no re-sorting, no clock). Ageing decides which turn starts next and protects old
turns; it cannot take a slot alone, because MARGIN also compares the priorities without it. Bound: a turn that arrives D / ageing_per_s
seconds later overtakes no turn whose priority is worse by D or less, so every turn waits for a finite number of others.

Invariants (tests/unit/test_preempt.py checks each by brute force)
- a winner could not start without its pair: no slot is free;
- a victim's own priority is strictly worse than its winner's: equal ones never preempt, and no pair is ever the reverse of an earlier one;
- every turn is in at most one pair; a turn loses its slot at most `max_preemptions` times, so exchanges end;
- the winners, and the turns that start without the rule, are the first of the waiting order;
- after all pairs the block count is not negative.

Source: Heddle section 4, Algorithm 1, preempts whenever the order says so; margin, cap, run length, ageing, cost and the bounds are ours.
Cost of a decision: at worst O(STARTS * running) comparisons and the blocks of `WEIGHED` victims per winner; nothing while no turn waits.
The walk over victims ends at the first one within the margin, so the usual refusal looks at one. vLLM asks again only when something has
changed, or after `REFUSAL_STEPS` (`verl_plugin.vllm_scheduler`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from enum import StrEnum
from itertools import chain, islice
from typing import Any, NamedTuple

MARGIN = 4
"""Priority units. Rounding alone can put two equal predictions one unit apart, and four units of 64 tokens are within the error of any
predictor, so an exchange for less acts on noise."""

MAX_PREEMPTIONS = 3
"""Per turn, by this rule. Each sends the turn back to the queue; a turn wrongly predicted to be short is safe after three."""

MIN_STEPS = 8
"""Steps for which a turn keeps its slot, so that it pays back its prefill before it can be preempted."""

AGEING_PER_S = 0.1
"""Units per second. A turn with 2000 predicted tokens fewer (31 units of 64) is overtaken by turns that arrive within five minutes of it,
and by none later: longer than a queue usually lasts, shorter than a starved step."""

TOKENS_PER_UNIT = 64
"""Tokens per priority unit: `heddle.priority.quantum_tokens`."""

TOKENS_PER_STEP = 100
"""Tokens recomputed in the time of one decode step. The shipped H200 tables give 190 (32B, batch 8) to 4000 (8B, batch 256). This is about
half of the lowest, because an overestimated cost only leaves a slot where it is."""

STARTS = 8
"""Waiting turns tried in one step, and so the maximum of victims. Eight contexts of 1,000 tokens fill vLLM's token budget of a step (8,192
on GPUs): more winners could not start, and their victims' slots would stay empty."""

WEIGHED = 64
"""Victims per winner whose blocks are counted, 5 us each. They come worst first, so later ones gain less."""

REFUSAL_STEPS = 8
"""Engine steps for which a refusal holds while no turn arrives, leaves or changes priority. Meanwhile running turns only get older and
longer. Steps take 5 to 50 ms, so a winner loses half a second at most."""


class Objection(StrEnum):
    """Why the best waiting turn did not get a running turn's slot."""

    MARGIN = "margin"
    CAPPED = "capped"
    YOUNG = "young"
    NO_ROOM = "no_room"
    COST = "cost"
    KV_SHORT = "kv_short"


@dataclass(frozen=True, slots=True)
class Rule:
    """Settings of the rule; see the constants for units and reasons.

    Raises:
        ValueError: a number is out of range.
    """

    margin: int = MARGIN
    max_preemptions: int = MAX_PREEMPTIONS
    min_steps: int = MIN_STEPS
    ageing_per_s: float = AGEING_PER_S
    tokens_per_unit: float = TOKENS_PER_UNIT
    tokens_per_step: float = TOKENS_PER_STEP

    def __post_init__(self) -> None:
        if self.margin < 1:
            raise ValueError(f"margin must be at least 1, or equal priorities would preempt each other, got {self.margin}")
        if self.max_preemptions < 0 or self.min_steps < 0 or not 0 <= self.ageing_per_s < float("inf"):
            raise ValueError(f"max_preemptions, min_steps and ageing_per_s must not be negative, got {self}")
        if not (self.tokens_per_unit > 0 and self.tokens_per_step > 0):
            raise ValueError(f"tokens_per_unit and tokens_per_step must be positive, got {self}")

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Rule:
        """The rule with some settings given by name.

        Raises:
            ValueError: a name is unknown, or a value is not a number or out of range.
        """
        known = {item.name: type(item.default) for item in fields(cls)}
        for name, value in settings.items():
            if name not in known:
                raise ValueError(f"unknown setting {name!r}; known settings: {', '.join(known)}")
            if isinstance(value, bool) or not isinstance(value, (int, float)) or (known[name] is int and value != int(value)):
                raise ValueError(f"{name} must be {'a whole' if known[name] is int else 'a'} number, got {value!r}")
        return cls(**settings)


class Waiting(NamedTuple):
    """A turn that is ready to start. `blocks`: KV blocks it needs, cached ones included (they count as free)."""

    key: str
    priority: int
    arrival_s: float
    blocks: int


class Running(NamedTuple):
    """A turn in a slot. `steps`: since it (re)started; `preemptions`: by this rule so far; `tokens`: with KV; `blocks()`: freed if it
    leaves, counted only when needed."""

    key: str
    priority: int
    arrival_s: float
    steps: int
    preemptions: int
    tokens: int
    blocks: Callable[[], int]


@dataclass(frozen=True, slots=True)
class Room:
    """Free `slots` of the engine, and free KV `blocks` of `block_tokens` each; `cached`: the prefix cache keeps freed blocks."""

    slots: int
    blocks: int
    block_tokens: int
    cached: bool = True


@dataclass(frozen=True, slots=True)
class Plan:
    """`pairs` of (victim, winner) to exchange now; `refused`: the worst victim's objection to the next winner, None if there is neither."""

    pairs: tuple[tuple[Running, Waiting], ...] = ()
    refused: Objection | None = None


def aged(priority: float, arrival_s: float, per_s: float) -> float:
    """Priority after ageing, up to a term shared by all turns; lower runs first."""
    return priority + per_s * arrival_s


def order(turn: Waiting | Running, rule: Rule) -> tuple[float, float]:
    """Sort key: best first."""
    return aged(turn.priority, turn.arrival_s, rule.ageing_per_s), turn.arrival_s


def recompute_tokens(victim: Running, winner: Waiting, spare_blocks: int, room: Room) -> int:
    """Tokens to recompute if `winner` takes the slot of `victim`; `spare_blocks`: free blocks without useful content."""
    if not room.cached:
        return victim.tokens
    return victim.tokens % room.block_tokens + room.block_tokens * max(0, winner.blocks - spare_blocks)


def objection(victim: Running, winner: Waiting, free_blocks: int, spare_blocks: int, room: Room, rule: Rule) -> Objection | None:
    """Why `victim` keeps its slot; None: `winner` gets it."""
    gain = victim.priority - winner.priority
    if gain < rule.margin or order(victim, rule)[0] - order(winner, rule)[0] < rule.margin:
        return Objection.MARGIN
    if victim.preemptions >= rule.max_preemptions:
        return Objection.CAPPED
    if victim.steps < rule.min_steps:
        return Objection.YOUNG
    if winner.blocks > free_blocks + victim.blocks():
        return Objection.NO_ROOM
    lost = recompute_tokens(victim, winner, spare_blocks, room)
    return Objection.COST if gain * rule.tokens_per_unit <= lost / rule.tokens_per_step else None


def worst_first(running: Iterable[Running], rule: Rule) -> list[Running]:
    """Running turns in the order in which they are tried as victims."""
    return sorted(running, key=lambda turn: order(turn, rule), reverse=True)


def preemptions(running: Iterable[Running], waiting: Iterable[Waiting], room: Room, rule: Rule) -> Plan:
    """The exchanges of this step.

    Args:
        running: worst first (`worst_first`); read as far as needed, and only if a turn cannot start.
        waiting: in the engine's order, best first (`order`); read as far as needed.
    """
    slots, free, spare = room.slots, room.blocks, room.blocks
    pairs: list[tuple[Running, Waiting]] = []
    stay: list[Running] = []
    more = iter(running)
    for winner in islice(waiting, STARTS):
        if slots > 0 and winner.blocks <= free:
            slots, free, spare = slots - 1, free - winner.blocks, max(0, spare - winner.blocks)
            continue
        if slots > 0:
            return Plan(tuple(pairs), Objection.KV_SHORT)
        victim, refused = _find_victim(chain(tuple(stay), _kept(more, stay)), winner, free, spare, room, rule)
        if victim is None:
            return Plan(tuple(pairs), refused)
        stay.remove(victim)
        pairs.append((victim, winner))
        free, spare = free + victim.blocks() - winner.blocks, max(0, spare - winner.blocks)
    return Plan(tuple(pairs))


def _kept(turns: Iterator[Running], kept: list[Running]) -> Iterator[Running]:
    """Yield turns, and keep them in `kept` for the next winner."""
    for turn in turns:
        kept.append(turn)
        yield turn


def _find_victim(
    victims: Iterable[Running], winner: Waiting, free: int, spare: int, room: Room, rule: Rule
) -> tuple[Running | None, Objection | None]:
    """The first victim, worst first, without an objection; or None and the objection of the worst."""
    first, weighed, good = None, 0, order(winner, rule)[0] + rule.margin
    for victim in victims:
        why = objection(victim, winner, free, spare, room, rule)
        if why is None:
            return victim, None
        first = first or why
        weighed += why in (Objection.NO_ROOM, Objection.COST)
        if weighed == WEIGHED or order(victim, rule)[0] < good:  # later ones are better still
            break
    return None, first
