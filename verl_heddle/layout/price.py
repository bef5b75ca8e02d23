"""Price of a layout: the expected makespan of its fleet on the trajectories of the next step.

Law: trajectories are placed evenly, as stock's rule places a batch, or by `place.robust`, whichever is expected to be faster. An even split
makes no sense with mixed degrees and is not considered there. A fleet is priced at the expected finish of its slowest replica, not at the
slowest expected finish (`place.outlook`), so a layout gets no credit for isolating trajectories of unknown length. With known lengths the
two are equal, but curves cannot represent that and would make them differ, so the placement's own forecast is used. An even split of n
trajectories over r replicas gives each replica 1/r of all curves.
Invariant: the price depends on the degrees of a layout, not on their order. Source: derived here.
Cost: one `robust.plan` per layout plus O(replicas * (len(GRID) + TIMES)).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import inf
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from verl_heddle.fleet import Replica
from verl_heddle.latency.model import LatencyModel
from verl_heddle.layout.feasible import degrees
from verl_heddle.place.cost import Floats
from verl_heddle.place.outlook import GRID, LEAST_SCALE, clock, curves, late_s, laws, log_ended
from verl_heddle.place.pace import Habit, Tempo
from verl_heddle.place.robust import Ranked, RobustPlan, plan, ranked


@dataclass(frozen=True)
class Coming:
    """n trajectories about to start."""

    medians: Floats
    """Predicted tokens, [n]."""
    rows: Floats
    """Their `outlook.curves`, [n, 2, len(GRID)]."""
    known: bool = False
    """Lengths are known to within the resolution of the curves."""

    @cached_property
    def ranks(self) -> Ranked:
        """The trajectories in the order from which groups are cut."""
        return ranked(self.medians, self.rows)

    @cached_property
    def total(self) -> Floats:
        """Sum of all curves, [2, len(GRID)]."""
        return self.ranks.sums[-1]

    def plan(self, tempos: Mapping[int, Tempo], *, gpus: int | None = None, layout: Sequence[int] = ()) -> RobustPlan:
        """`robust.plan` for these trajectories."""
        return plan(self.medians, self.rows, tempos, gpus=gpus, layout=layout, ranks=self.ranks)


def coming(medians: ArrayLike, scales: ArrayLike, at_most: ArrayLike = inf) -> Coming:
    """Build from predicted tokens, scales of their logarithms, and each trajectory's token limit; the last two broadcast.

    Raises:
        ValueError: a median or a scale is negative or not finite.
    """
    middle = np.atleast_1d(np.asarray(medians, dtype=np.float64))
    spread = np.broadcast_to(np.asarray(scales, dtype=np.float64), middle.shape)
    if not (np.all(np.isfinite(middle)) and np.all(np.isfinite(spread)) and np.all(middle >= 0) and np.all(spread >= 0)):
        raise ValueError("predicted tokens and their scales must be finite and not negative")
    return Coming(middle, curves(middle, spread, at_most), bool(len(spread)) and bool(spread.max() <= LEAST_SCALE))


class Site(NamedTuple):
    """The GPUs, and the configuration of a replica on them."""

    latency: LatencyModel
    gpus: int
    gpus_per_node: int
    slots: int = 256
    """vLLM `max_num_seqs`."""
    utilization: float = 0.5
    """vLLM `gpu_memory_utilization`; verl's default."""
    kv_tokens: Mapping[int, int | None] | None = None
    """By degree, as reported by running engines; missing degrees are estimated."""
    heads: int | None = None
    kv_heads: int | None = None
    longest_context: int = 0
    """Tokens that a replica's KV must hold for its degree to be used."""

    def held(self, tp: int) -> int | None:
        """KV tokens of a replica; None: unlimited."""
        known = self.kv_tokens or {}
        return known[tp] if tp in known else self.latency.kv_tokens(tp, self.utilization)

    def degrees(self) -> tuple[int, ...]:
        """Usable degrees: they hold the model and the longest context, and any mix of them packs into the nodes."""
        node = min(self.gpus_per_node, self.gpus)
        able = degrees(node, self.heads, self.kv_heads, self.latency, self.utilization)
        several = self.gpus > self.gpus_per_node
        return tuple(tp for tp in able if not (several and node % tp) and ((held := self.held(tp)) is None or held >= self.longest_context))

    def tempo(self, tp: int, most: int, habit: Habit) -> Tempo:
        """Seconds per token of a replica of this degree with up to `most` trajectories."""
        return Tempo(self.latency, Replica(f"tp{tp}", tp, self.slots, self.held(tp)), GRID, float(most), habit)


class Priced(NamedTuple):
    """A layout, its expected makespan, and its groups unless split evenly."""

    layout: tuple[int, ...]
    seconds: float
    groups: tuple[tuple[int, ...], ...] = ()


def even_s(step: Coming, tp: int, replicas: int, tempos: Mapping[int, Tempo]) -> float:
    """Expected makespan of an even split over replicas of one degree."""
    used = min(replicas, len(step.medians))
    return _makespan([(step.total[None] / used, tp, used)], tempos)


def grouped_s(step: Coming, found: RobustPlan, tempos: Mapping[int, Tempo]) -> float:
    """Expected makespan of the plan's groups."""
    if step.known:
        return found.forecast_s
    parts = []
    for tp in sorted(set(found.layout)):
        mine = [list(group) for group, size in zip(found.groups, found.layout, strict=True) if size == tp and group]
        if mine:
            parts.append((np.stack([step.rows[group].sum(axis=0) for group in mine]), tp, 1))
    return _makespan(parts, tempos)


def priced(step: Coming, layout: Sequence[int], tempos: Mapping[int, Tempo]) -> Priced:
    """The price of a layout with the better of the two placements.

    Raises:
        ValueError: no trajectories, or a degree without times.
    """
    found = step.plan(tempos, layout=sorted(layout, reverse=True))
    best = Priced(found.layout, grouped_s(step, found, tempos), found.groups)
    if len(set(layout)) == 1:
        seconds = even_s(step, layout[0], len(layout), tempos)
        if seconds <= best.seconds:
            return Priced(best.layout, seconds)
    return best


def free(step: Coming, gpus: int, tempos: Mapping[int, Tempo]) -> Priced:
    """The best layout of any degrees, by `place.robust`."""
    found = step.plan(tempos, gpus=gpus)
    return Priced(found.layout, grouped_s(step, found, tempos), found.groups)


def _makespan(parts: Sequence[tuple[Floats, int, int]], tempos: Mapping[int, Tempo]) -> float:
    """`parts`: (summed curves of replicas of one degree, [replicas, 2, len(GRID)]; the degree; multiplicity of each replica)."""
    replicas = [(*laws(sums, tempos[tp]), times) for sums, tp, times in parts]
    at = clock(max(float(late_s(reached, ended).max()) for reached, ended, _ in replicas))
    total = np.zeros(len(at))
    for reached, ended, times in replicas:
        for replica_reached, replica_ended in zip(reached, ended, strict=True):
            total += times * log_ended(at, replica_reached, replica_ended)
    return float(-np.expm1(total).sum() * at[1])
