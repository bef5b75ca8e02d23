"""The planner between steps: choose the tensor-parallel layout of the next steps, and change it only if the gain pays for the reshard.

Law: three candidates are priced (`price.py`) on the predicted trajectories, as distributions: the current layout, the best uniform degree,
and the best layout overall (`place.robust`). A different layout is chosen only if

    current - forecast > margin * current                the ratio of two forecasts is no more precise than the margin
    horizon * (current - forecast) > cost                the gain over the horizon pays for one reshard

and mixed degrees only if they beat the best uniform degree by `SIMPLER`. A current layout that is infeasible or cannot hold the model is
always replaced by the best one.
Invariants: a returned layout sums to the GPUs, packs into the nodes in its order, and holds the model at each degree. The same trajectories
never make the planner oscillate: a price depends only on the layout (`price.py`; if the free search finds the current layout, the lower of
its two prices counts), and every change lowers it.
If a single trajectory runs about as fast at every degree, as with small-active mixtures of experts, mixing gains little. The prices reflect
this, and the layout stays at the best degree for the crowd, with `LayoutReason.DEGREES_ALIKE`.

Forecast (`again`): the next step's prompts are not known yet, so trajectories are assumed to resemble those of the finished step. Each
recurs with the length predicted at its start, corrected for that step's median error and with the uncertainty the predictions turned out to
have. With e = log(length / predicted), medians are predicted * exp(median of e), and the log-logistic scale matches the quartiles of e:
(q3 - q1) / (2 log 3). True lengths would promise an isolation of the longest trajectories that no placement can achieve. A missing
prediction is replaced by the median length.

Source: derived here; Heddle (arXiv 2603.28101, section 7) chooses by simulated annealing on predicted means.
Cost: one `robust.plan` over free degrees and one per uniform degree priced: 0.05 s for 6,400 trajectories on 64 GPUs (bench/layout).
`again` is O(n log n).
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
"""Steps over which a gain may count: a policy's lengths drift over tens of training steps."""

MARGIN = 0.05
"""Share of the current forecast. Ratios of two forecasts are accurate to a few percent (bench/layout)."""

SIMPLER = 0.01
"""Relative gain that mixed degrees need over a uniform degree. A smaller gain is within the search's own error."""

NEAR = 1.15
"""Uniform degrees whose even split is within this factor of the best one are also priced with placement, which gains up to this much."""

ALIKE = 1.3
"""Degrees count as alike if a single trajectory's speed differs by at most this factor among them: Qwen3-30B-A3B on H200 has 1.2, dense
models of 8B to 32B have 2.3 to 3.6."""


class LayoutReason(StrEnum):
    """Why this layout was chosen; each reason is a metric."""

    NOTHING_COMING = "nothing_coming"
    """Stay: no trajectories to plan for."""
    NO_BETTER = "no_better"
    """Stay: no other layout is forecast to be faster."""
    BELOW_MARGIN = "below_margin"
    """Stay: a different layout is forecast to be faster, but by less than the margin."""
    BELOW_COST = "below_cost"
    """Stay: the gain over the horizon does not pay for the reshard."""
    DEGREES_ALIKE = "degrees_alike"
    """Stay: higher degrees hardly speed up this model."""
    UNIFORM = "uniform"
    """Change: one degree for all."""
    MIXED = "mixed"
    """Change: mixed degrees."""
    MUST_LEAVE = "must_leave"
    """Change: the current layout is infeasible or does not hold the model."""


@dataclass(frozen=True, slots=True)
class LayoutChoice:
    """The chosen `layout`, in an order that packs into nodes. Times are seconds per step, except the one-off `cost_s`.

    `forecast_s` is for the returned layout, `current_s` for the current one (inf: infeasible). `offered` is the best candidate and
    `gain_s` its saving, which may be negative; both are set even if it is not chosen.
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
        """Whether the layout changes, that is, whether a reshard is needed."""
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
    """The layout for the next steps.

    Args:
        current: degrees of the current replicas, in order.
        reshard_s: measured seconds; None: assume the time to load the largest shard's weights from host memory.
        horizon: steps over which the gain may count.
        margin: share of the current forecast that the gain must exceed.

    Raises:
        ValueError: no layout holds the model on these GPUs, or a number is out of range.
    """
    if horizon < 0 or margin < 0 or (reshard_s is not None and reshard_s < 0):
        raise ValueError(f"horizon, margin and reshard seconds must not be negative, got {horizon:g}, {margin:g}, {reshard_s}")
    usable = site.degrees()
    sizes = [tp for tp in usable if site.gpus % tp == 0]
    if not sizes:
        raise ValueError(
            f"{site.latency.name}: no tensor-parallel degree holds the model within {site.utilization:g} of the memory, fits a node "
            f"of {site.gpus_per_node} GPUs, and divides the {site.gpus} GPUs"
        )
    present = tuple(current)
    feasible = set(present) <= set(site.latency.tps) and not problems(present, site.gpus, site.gpus_per_node, site.heads, site.kv_heads)
    feasible = feasible and all(site.latency.fits(tp, site.utilization) for tp in set(present))
    count = len(step.medians)
    if not count:
        layout = present if feasible else (sizes[0],) * (site.gpus // sizes[0])
        reason = LayoutReason.NOTHING_COMING if feasible else LayoutReason.MUST_LEAVE
        return LayoutChoice(layout, reason, 0.0, 0.0, 0.0, 0.0, layout)
    tempos = {tp: site.tempo(tp, count, habit) for tp in sorted({*usable, *(present if feasible else ())})}
    offers, limit_s = _offers(step, site.gpus, sizes, {tp: tempos[tp] for tp in usable})
    best = offers[-1] if offers[-1].seconds < (1 - SIMPLER) * offers[0].seconds else offers[0]
    if not feasible:
        return _changed(best, site, LayoutReason.MUST_LEAVE, float("inf"), reshard_s)
    same = [offer.seconds for offer in offers if sorted(offer.layout) == sorted(present)]
    even = even_s(step, present[0], len(present), tempos) if len(set(present)) == 1 else 0.0
    current_s = min([even if even > limit_s else priced(step, present, tempos).seconds, *same])
    gain_s = current_s - best.seconds
    cost_s = _cost(site, best.layout, reshard_s)
    if sorted(best.layout) == sorted(present) or gain_s <= 0:
        reason = LayoutReason.NO_BETTER
    elif gain_s <= margin * current_s:
        reason = LayoutReason.BELOW_MARGIN
    elif horizon * gain_s <= cost_s:
        reason = LayoutReason.BELOW_COST
    else:
        return _changed(best, site, None, current_s, reshard_s)
    if reason is not LayoutReason.BELOW_COST and _alike(site, usable):
        reason = LayoutReason.DEGREES_ALIKE
    return LayoutChoice(present, reason, current_s, current_s, gain_s, cost_s, packed(best.layout, site.gpus_per_node))


def _offers(step: Coming, gpus: int, sizes: Sequence[int], tempos: Mapping[int, Tempo]) -> tuple[list[Priced], float]:
    """The best uniform layout, plus the best overall if it mixes degrees; and the even-split seconds above which a degree is ruled out."""
    even = {tp: even_s(step, tp, gpus // tp, tempos) for tp in sizes}
    limit_s = NEAR * min(even.values())
    near = {tp for tp in sizes if even[tp] <= limit_s}
    found = free(step, gpus, tempos)
    mixed = len(set(found.layout)) > 1 and sum(found.layout) == gpus
    if not mixed and gpus % found.layout[0] == 0:
        near.add(found.layout[0])
    best = min((priced(step, (tp,) * (gpus // tp), tempos) for tp in sorted(near)), key=lambda offer: offer.seconds)
    return ([best, found] if mixed else [best]), limit_s


def _changed(best: Priced, site: Site, reason: LayoutReason | None, current_s: float, reshard_s: float | None) -> LayoutChoice:
    layout = packed(best.layout, site.gpus_per_node)
    why = reason or (LayoutReason.UNIFORM if len(set(layout)) == 1 else LayoutReason.MIXED)
    return LayoutChoice(layout, why, best.seconds, current_s, current_s - best.seconds, _cost(site, layout, reshard_s), layout)


def _cost(site: Site, layout: Sequence[int], reshard_s: float | None) -> float:
    return max(site.latency.weight_load_s(tp) for tp in set(layout)) if reshard_s is None else reshard_s


def _alike(site: Site, usable: Sequence[int]) -> bool:
    alone = [float(site.latency.decode_s(tp, 1, 1000)) for tp in usable]
    return len(alone) > 1 and max(alone) <= ALIKE * min(alone)


def again(records: Sequence[Trajectory], cap_tokens: float = inf) -> Coming | None:
    """Forecast of the next step from the finished one; None if nothing was generated.

    Args:
        records: complete recorded trajectories; stopped ones would bias lengths low.
        cap_tokens: maximum tokens that a trajectory may generate.
    """
    generated = [record for record in records if record.output_tokens > 0]
    if not generated:
        return None
    lengths = np.array([record.output_tokens for record in generated], dtype=np.float64)
    at_start = np.array([record.steps[0].predicted_remaining or 0.0 for record in generated])
    predicted = np.where(at_start > 0, at_start, np.median(lengths))
    low, middle, high = np.quantile(np.log(lengths / predicted), (0.25, 0.5, 0.75))
    return coming(predicted * np.exp(middle), (high - low) / (2 * log(3)), cap_tokens)
