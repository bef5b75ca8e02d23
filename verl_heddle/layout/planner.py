"""Which tensor-parallel degrees for the coming steps, and whether it is worth leaving the ones there are: the planner between steps.

Law: three candidates are priced (`price.py`) for the trajectories that are predicted to come, as distributions: staying, the best uniform
degree, and the best layout of all (`place.robust`). Another layout is taken only if

    current - forecast > margin * current                the forecasts' own ratio is not known better
    horizon * (current - forecast) > cost                as many steps as the gain may count for pay for one reshard

and mixed degrees only where they beat the best uniform degree by `SIMPLER`. A current layout that cannot hold the model, or that cannot be,
is left for the best one without asking.

Invariants: a layout that is returned sums to the GPUs, packs into the nodes in its order, and holds the model at each degree. The same
trajectories never make it go back and forth: a price depends on the layout alone (`price.py`; where the free search comes upon the layout
there is, the lower of both prices counts), and every change lowers it.
Where a trajectory alone is hardly faster at any degree than at another, small-active mixtures of experts for one, there is little to gain
from mixing, which is what the numbers say: they stay at the best degree for the crowd, with `LayoutReason.DEGREES_ALIKE`.
Source: own; Heddle (arXiv 2603.28101, section 7) chooses by simulated annealing on predicted means. Cost: a `robust.plan` of free degrees
and one of each uniform degree that is priced: 0.05 s for 6,400 trajectories on 64 GPUs (bench/layout).

What a coming step will be like, before its prompts are known: trajectories like those of the step that is over.

Law: each trajectory comes again with the length that was predicted at its start, made right in the middle and as uncertain as the
predictions of that step turned out: with e = log(length / predicted), medians are predicted * exp(median of e), and the scale of the
log-logistic is that whose quartiles are those of e, (q3 - q1) / (2 log 3). True lengths would promise an isolation of the longest that no
placement can give. Where nothing was predicted, the middle of all lengths stands for each prediction.
Source: own. Cost: O(n log n).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from math import inf, log

import numpy as np

from verl_heddle.layout.feasible import packed, problems
from verl_heddle.layout.price import Coming, Priced, Site, coming, even_s, free, priced
from verl_heddle.place.pace import Habit, Tempo
from verl_heddle.trajectory import Trajectory

HORIZON = 8
"""Steps that the gain may count for: lengths of a policy in training drift over tens of steps."""

MARGIN = 0.05
"""Share of the current forecast. Ratios of two forecasts are right within a few percent (bench/layout)."""

SIMPLER = 0.01
"""Mixed degrees have to be so much better than one degree: below it the search's own error decides."""

NEAR = 1.15
"""Uniform degrees whose even split takes at most so many times the best one's are priced with placement as well: it gains up to so much."""

ALIKE = 1.3
"""A trajectory alone is at most so many times faster at one degree than at any other: Qwen3-30B-A3B on H200 has 1.2, dense models of 8B to
32B have 2.3 to 3.6."""


class LayoutReason(StrEnum):
    """Why this layout; each is a metric."""

    NOTHING_COMING = "nothing_coming"
    """Stay: there is nothing to plan for."""
    NO_BETTER = "no_better"
    """Stay: no other layout is forecast to be faster."""
    BELOW_MARGIN = "below_margin"
    """Stay: another is, but by less than forecasts are good for."""
    BELOW_COST = "below_cost"
    """Stay: the gain over the horizon does not pay for the reshard."""
    DEGREES_ALIKE = "degrees_alike"
    """Stay: higher degrees are hardly faster with this model."""
    UNIFORM = "uniform"
    """Change: one degree for all."""
    MIXED = "mixed"
    """Change: mixed degrees."""
    MUST_LEAVE = "must_leave"
    """Change: the layout there is cannot be, or does not hold the model."""


@dataclass(frozen=True, slots=True)
class LayoutChoice:
    """`layout` in an order that packs into nodes. Seconds per step, but `cost_s`, once.

    `forecast_s`: of the layout returned; `current_s`: of the one there is (inf: it cannot be). `offered`: the best other layout, with
    `gain_s` what it would save, which may be negative; both also where it is not taken.
    """

    layout: tuple[int, ...]
    reason: LayoutReason
    forecast_s: float
    current_s: float
    gain_s: float
    cost_s: float
    offered: tuple[int, ...]

    @property
    def changes(self) -> bool:
        """Whether there is something to reshard."""
        return self.reason in (LayoutReason.UNIFORM, LayoutReason.MIXED, LayoutReason.MUST_LEAVE)


def choose(
    step: Coming,
    site: Site,
    habit: Habit,
    current: Sequence[int],
    *,
    reshard_s: float | None = None,
    horizon: float = HORIZON,
    margin: float = MARGIN,
) -> LayoutChoice:
    """The layout for the coming steps.

    Args:
        current: degrees of the replicas there are, in their order.
        reshard_s: measured; None: assumed, loading the weights of the largest shard from host memory.
        horizon: steps that the gain may count for.
        margin: share of the current forecast that the gain must exceed.

    Raises:
        ValueError: no layout holds the model on these GPUs; a number is out of range.
    """
    if horizon < 0 or margin < 0 or (reshard_s is not None and reshard_s < 0):
        raise ValueError(f"horizon, margin and reshard seconds must not be negative, got {horizon:g}, {margin:g}, {reshard_s}")
    able = site.degrees()
    sizes = [tp for tp in able if site.gpus % tp == 0]
    if not sizes:
        raise ValueError(
            f"{site.latency.name}: no tensor-parallel degree holds the model within {site.utilization:g} of the memory, lies within a node "
            f"of {site.gpus_per_node} GPUs, and divides the {site.gpus} GPUs"
        )
    here = tuple(current)
    stands = set(here) <= set(site.latency.tps) and not problems(here, site.gpus, site.gpus_per_node, site.heads, site.kv_heads)
    stands = stands and all(site.latency.fits(tp, site.utilization) for tp in set(here))
    most = len(step.medians)
    if not most:
        layout = here if stands else (sizes[0],) * (site.gpus // sizes[0])
        reason = LayoutReason.NOTHING_COMING if stands else LayoutReason.MUST_LEAVE
        return LayoutChoice(layout, reason, 0.0, 0.0, 0.0, 0.0, layout)
    tempos = {tp: site.tempo(tp, most, habit) for tp in sorted({*able, *(here if stands else ())})}
    offers, limit_s = _offers(step, site.gpus, sizes, {tp: tempos[tp] for tp in able})
    best = offers[-1] if offers[-1].seconds < (1 - SIMPLER) * offers[0].seconds else offers[0]
    if not stands:
        return _changed(best, site, LayoutReason.MUST_LEAVE, float("inf"), reshard_s)
    same = [offer.seconds for offer in offers if sorted(offer.layout) == sorted(here)]
    even = even_s(step, here[0], len(here), tempos) if len(set(here)) == 1 else 0.0
    current_s = min([even if even > limit_s else priced(step, here, tempos).seconds, *same])
    gain_s = current_s - best.seconds
    cost_s = _cost(site, best.layout, reshard_s)
    if sorted(best.layout) == sorted(here) or gain_s <= 0:
        reason = LayoutReason.NO_BETTER
    elif gain_s <= margin * current_s:
        reason = LayoutReason.BELOW_MARGIN
    elif horizon * gain_s <= cost_s:
        reason = LayoutReason.BELOW_COST
    else:
        return _changed(best, site, None, current_s, reshard_s)
    if reason is not LayoutReason.BELOW_COST and _alike(site, able):
        reason = LayoutReason.DEGREES_ALIKE
    return LayoutChoice(here, reason, current_s, current_s, gain_s, cost_s, packed(best.layout, site.gpus_per_node))


def _offers(step: Coming, gpus: int, sizes: Sequence[int], tempos: Mapping[int, Tempo]) -> tuple[list[Priced], float]:
    """The best uniform degree, and the best layout of all if that mixes degrees; and the even split's seconds that rule a degree out."""
    even = {tp: even_s(step, tp, gpus // tp, tempos) for tp in sizes}
    limit_s = NEAR * min(even.values())
    near = {tp for tp in sizes if even[tp] <= limit_s}
    found = free(step, gpus, tempos)
    mixed = len(set(found.layout)) > 1 and sum(found.layout) == gpus
    if not mixed and gpus % found.layout[0] == 0:
        near.add(found.layout[0])
    best = min((priced(step, (tp,) * (gpus // tp), tempos) for tp in sorted(near)), key=lambda one: one.seconds)
    return ([best, found] if mixed else [best]), limit_s


def _changed(best: Priced, site: Site, reason: LayoutReason | None, current_s: float, reshard_s: float | None) -> LayoutChoice:
    layout = packed(best.layout, site.gpus_per_node)
    why = reason or (LayoutReason.UNIFORM if len(set(layout)) == 1 else LayoutReason.MIXED)
    return LayoutChoice(layout, why, best.seconds, current_s, current_s - best.seconds, _cost(site, layout, reshard_s), layout)


def _cost(site: Site, layout: Sequence[int], reshard_s: float | None) -> float:
    return max(site.latency.weight_load_s(tp) for tp in set(layout)) if reshard_s is None else reshard_s


def _alike(site: Site, able: Sequence[int]) -> bool:
    alone = [float(site.latency.decode_s(tp, 1, 1000)) for tp in able]
    return len(alone) > 1 and max(alone) <= ALIKE * min(alone)


def again(records: Sequence[Trajectory], cap_tokens: float = inf) -> Coming | None:
    """The coming step; None if nothing was generated.

    Args:
        records: whole trajectories, as recorded; those that were stopped tell a length that is too short.
        cap_tokens: most tokens that a trajectory may generate.
    """
    some = [record for record in records if record.output_tokens > 0]
    if not some:
        return None
    lengths = np.array([record.output_tokens for record in some], dtype=np.float64)
    told = np.array([record.steps[0].predicted_remaining or 0.0 for record in some])
    predicted = np.where(told > 0, told, np.median(lengths))
    low, middle, high = np.quantile(np.log(lengths / predicted), (0.25, 0.5, 0.75))
    return coming(predicted * np.exp(middle), (high - low) / (2 * log(3)), cap_tokens)
