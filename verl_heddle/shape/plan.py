"""Plan of a step: samples per prompt, and the rule that closes each group.

Law, in this order:
1. Budget and allocation (`budget`) for groups that end with their n-th sample; if `spare` is set, that budget, optionally uniform.
2. Bounds on the expected length bias are enforced in advance: no prompt gets more samples than keep its kept ones within `prompt_bias` of
   the samples they represent (`allowed`), and the path ends where the mean over the step's prompts reaches `length_bias`. So selection may
   be strong for the few prompts that the step waits for, and hardly affects the many others.
3. Prompts that got the bound of 2n are shortest-only (not in corrected mode, which cannot correct such groups). The others have their long
   slots and wait for them `patience` times the tokens at which the step's last group is expected to be full. If `patience` is unset, it is
   the longest of `WAITS` that lengthens the forecast by at most `FREE`: a long sample that ends before the step would have ended anyway
   costs nothing.
4. Prompts never visited get nothing from a forecast budget unless `unseen` is set. A prompt without spare samples is sampled plainly: n
   samples, none stopped.
Invariant: n <= samples <= most * n. Source: DARTS section 4 and its tail pruning; 2 and the patience are ours.
Cost: several calls of `shape.outlook.live`; about a second for 512 prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf, log

import numpy as np

from verl_heddle.options import Shape
from verl_heddle.place.cost import Floats, Ints
from verl_heddle.shape.budget import Budget, Fleet, Objective, allocate, costs, forecast_s, path, total
from verl_heddle.shape.censored import Law
from verl_heddle.shape.honesty import expected_bias
from verl_heddle.shape.outlook import deadline, live
from verl_heddle.shape.select import Rule
from verl_heddle.shape.settings import ShapeReason

WAITS = (1.0, 0.75, 0.5, 0.25)
"""Shares of the deadline tried as patience. Below a quarter, a long slot is hardly longer than the short ones."""

FREE = 0.01
"""Share of the step that long slots may cost by the forecast, which is no more precise than this."""


@dataclass(frozen=True, slots=True)
class Share:
    """A prompt's samples, selection rule, and the reason."""

    samples: int
    rule: Rule
    reason: ShapeReason


@dataclass(frozen=True, slots=True)
class StepPlan:
    """`shares` in prompt order; `budget` is None if nothing was forecast; times in seconds."""

    shares: tuple[Share, ...]
    budget: Budget | None = None
    patience_tokens: float = inf
    counts: dict[str, int] = field(default_factory=dict)


def plain(size: int, cap_tokens: int | None, reason: ShapeReason) -> Share:
    """A share of n samples, all kept, none stopped."""
    return Share(size, Rule(size, size, inf, cap_tokens), reason)


def plan(
    laws: Sequence[Law],
    size: int,
    settings: Shape,
    fleet: Fleet | None,
    cap_tokens: int | None = None,
    unseen: Sequence[bool] = (),
) -> StepPlan:
    """Samples and rules for prompts with these laws.

    Args:
        unseen: which laws are the pool's because the prompt was never visited; empty: none.
        fleet: the replicas; None: no forecast, and only a fixed `spare` gives spare samples.
    """
    most = int(settings.most * size)
    if not laws or most == size or (fleet is None and not settings.spare):
        return _counted([plain(size, cap_tokens, ShapeReason.NO_FORECAST) for _ in laws])
    cap = inf if cap_tokens is None else float(cap_tokens)
    rows = live(laws, size, most, 0.0, cap)
    table = costs(laws, rows, size, Objective(settings.objective))
    room = np.array([allowed(law, size, most, settings) - size for law in laws])
    unvisited = np.zeros(len(laws), dtype=bool)
    if len(unseen) and settings.spare is None and not settings.unseen:
        unvisited = np.asarray(unseen, dtype=bool)
        room[unvisited] = 0
    table = np.where(np.arange(table.shape[1]) <= room[:, None], table, np.take_along_axis(table, room[:, None], axis=1))
    bound = within_bias(laws, path(table), size, settings.length_bias)
    budget = None
    if settings.spare is None:
        assert fleet is not None
        budget = total(table, rows, fleet, settings.price, bound)
        spare = np.minimum(budget.spare, room)
    elif settings.uniform:
        spare = np.minimum(int(settings.spare), room)
    else:
        spare = np.minimum(allocate(table, min(bound, round(settings.spare * len(laws)))), room)
    patience = _patience(laws, rows, spare, size, settings, fleet, cap)
    shares = []
    for law_room, extra, first_visit in zip(room.tolist(), spare.tolist(), unvisited.tolist(), strict=True):
        if extra and extra == most - size and not settings.uniform and not settings.corrected:
            shares.append(Share(size + extra, Rule(size, 0, 0.0, cap_tokens), ShapeReason.SATURATED))
        elif extra:
            shares.append(Share(size + extra, Rule(size, settings.longest, patience, cap_tokens), ShapeReason.SHAPED))
        else:
            reason = ShapeReason.NO_SPARES if spare.any() else ShapeReason.NO_GAIN
            reason = ShapeReason.UNSEEN if first_visit else reason if law_room else ShapeReason.LENGTH_BIAS
            shares.append(plain(size, cap_tokens, reason))
    return _counted(shares, budget, patience)


def allowed(law: Law, size: int, most: int, settings: Shape) -> int:
    """The most samples for which the expected bias of the kept stays within `prompt_bias`, ignoring long slots."""
    if settings.prompt_bias >= 1:
        return most
    bound = log(1 - settings.prompt_bias)
    samples = size
    while samples < most and law.spread * expected_bias(size, samples + 1) >= bound:
        samples += 1
    return samples


def within_bias(laws: Sequence[Law], order: Sequence[int], size: int, bound: float) -> int:
    """Length of the path prefix that keeps the mean bias over the prompts within the bound, ignoring long slots."""
    if bound >= 1:
        return len(order)
    left = -log(1 - bound) * len(laws)
    samples = [size] * len(laws)
    for number, prompt in enumerate(order):
        samples[prompt] += 1
        left += laws[prompt].spread * (expected_bias(size, samples[prompt]) - expected_bias(size, samples[prompt] - 1))
        if left < 0:
            return number
    return len(order)


def _patience(laws: Sequence[Law], rows: Floats, spare: Ints, size: int, settings: Shape, fleet: Fleet | None, cap: float) -> float:
    """Tokens that groups wait for their long slots; one value for all prompts, because they share the step's end."""
    if not settings.longest or settings.patience == 0 or not spare.any():
        return 0.0
    prompts = np.arange(len(laws))
    chosen = rows[prompts, spare]
    last = deadline(chosen[:, 1])
    if settings.patience is not None:
        return last * settings.patience if settings.patience < inf else inf
    if fleet is None:
        return last
    saturated = (spare == rows.shape[1] - 1) & (not settings.corrected)
    budget_s = (1 + FREE) * forecast_s(chosen.sum(axis=0), fleet)
    for share in WAITS:
        waiting = live(laws, size, size + rows.shape[1] - 1, share * last, cap)[prompts, spare]
        waiting[saturated] = chosen[saturated]
        if forecast_s(waiting.sum(axis=0), fleet) <= budget_s:
            return share * last
    return 0.0


def _counted(shares: list[Share], budget: Budget | None = None, patience: float = inf) -> StepPlan:
    counts: dict[str, int] = {}
    for share in shares:
        counts[share.reason] = counts.get(share.reason, 0) + 1
    return StepPlan(tuple(shares), budget, patience, counts)
