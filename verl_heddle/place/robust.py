"""Places trajectories with uncertain lengths: the search of `exact.py` with the expected staircase of `outlook.py` as a group's cost.

Law: order the trajectories by predicted median, never by anything sampled (choosing among samples finds the lucky ones: the optimizer's
curse). Groups are contiguous in this order; a group costs its expected drain time; bisect on the makespan with F[g] as in `exact.py`.
A replica with a short mean but a heavy tail is charged for the tail, so groups stay small if lengths are uncertain.
With lengths known (scale near 0) this is the staircase plan; with nothing known (all alike) it splits evenly, which is stock's rule.

The bisection probes a table of expected drain times for selected first ranks (`starts`) and sizes: every start and size near the head,
where a single trajectory matters, and even ratios beyond it. Between entries the log of the seconds is linear
in the log of the size, and the log of the size that a makespan allows in the start. After each search the table is refined around the
sizes that its makespan allows, and at the starts of its groups. The cheapest answer of all searches, priced exactly, is returned.

Invariants: every trajectory in exactly one group; taking a member out of a group never raises its cost, and later members drain no slower
where scales are alike, so the furthest reach is the best to continue from. `forecast_s` is computed, not interpolated. Compared with
pricing every probed group: within 1 % in 159 of 160 random cases, 3 % in one (tests/unit/layout asks for 5 %).
Source: own. Cost: about 5,000 entries of O(len(GRID)), however many trajectories there are, and O(gpus * degrees) look-ups per probe:
30 ms for 6,400 trajectories on 64 GPUs, 0.3 s for 100,000 on 1,024 (bench/layout).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import exp, inf
from typing import NamedTuple

import numpy as np

from verl_heddle.place.cost import Floats, Ints, Reach
from verl_heddle.place.exact import Cut, cover_free, cover_layout
from verl_heddle.place.outlook import drain_s
from verl_heddle.place.pace import Tempo

TOLERANCE = 1e-3
"""Relative, of the last search; the expectation itself is known to 2 %."""

FIRST = 0.1
"""Tolerance of all searches but the last, as a share of the refinement that follows."""

STRIDE = 1.05
"""Bracket of a repeated search, whose answer changes by a few percent."""

HEAD_STARTS, START_RATIO = 12, 1.3
"""First ranks tabulated one by one, and the ratio between later ones."""

BACK_PART = 64
"""The same ratio backwards from the last rank, starting at this fraction of all ranks: groups near the end are large."""

HEAD_SIZES, SIZE_RATIO = 4, 1.5
"""The same for the sizes of groups."""

AROUND, LOOKS = (0.3, 0.1, 0.1, 0.05), 9
"""Refinement after each search but the last: relative width around the sizes found, and number of sizes. A coarse table misses the kinks
where KV caches start to overflow."""

NONE = 0.5
"""Size of a group that takes too long with one member; below 1, with a finite logarithm."""

ROWS = 4096
"""Groups priced at once: bounds memory."""


@dataclass(frozen=True, slots=True)
class RobustPlan:
    """`groups[i]`: trajectories of replica i, most tokens first; `layout[i]`: its degree; `forecast_s`: expected drain of the slowest."""

    groups: tuple[tuple[int, ...], ...]
    layout: tuple[int, ...]
    forecast_s: float


class Ranked(NamedTuple):
    """Trajectories in the order from which groups are cut; reusable across plans."""

    order: Ints
    """Trajectory at each rank, [n]."""
    sums: Floats
    """Sums of the curves before each rank, [n + 1, 2, len(GRID)]."""


def ranked(medians: Floats, rows: Floats) -> Ranked:
    """By predicted tokens, most first; arguments as in `plan`."""
    order = np.argsort(-medians, kind="stable")
    sums = np.zeros((len(rows) + 1, *rows.shape[1:]))
    np.cumsum(rows[order], axis=0, out=sums[1:])
    return Ranked(order, sums)


def plan(
    medians: Floats,
    rows: Floats,
    tempos: Mapping[int, Tempo],
    *,
    gpus: int | None = None,
    layout: Sequence[int] = (),
    ranks: Ranked | None = None,
) -> RobustPlan:
    """Groups for every replica of `layout`, or of the best layout of `gpus` GPUs.

    Args:
        medians: predicted tokens, [n]; they give the order.
        rows: `outlook.curves` of the same trajectories, [n, 2, len(GRID)].
        tempos: seconds per token by degree, on `outlook.GRID`; they include slots and KV, so any number fits at a cost.
        ranks: `ranked` of the same trajectories, if already computed.

    Raises:
        ValueError: nothing to place, neither or both of `gpus` and `layout`, or a degree without times.
    """
    if not len(medians) or (gpus is None) == (not layout):
        raise ValueError("a plan needs trajectories, and either gpus or a layout")
    sizes = sorted(tp for tp in tempos if (tp in layout if layout else tp <= (gpus or 0)))
    if not sizes or (layout and set(sizes) != set(layout)):
        raise ValueError(f"no times for the degrees of {list(layout) or gpus}")
    order, sums = ranked(medians, rows) if ranks is None else ranks
    table = _Table(sums, [tempos[tp] for tp in sizes])
    counts = [sum(tp == size for tp in layout) for size in sizes]

    def cover(makespan_s: float) -> list[Cut] | None:
        reaches = table.within(makespan_s)
        return cover_layout(reaches, counts, len(order)) if layout else cover_free(reaches, sizes, gpus or 0, len(order))

    best, forecast_s = [], inf
    low, high = table.range_s
    for around in (*AROUND, None):
        cuts, makespan_s = _search(cover, low, high, TOLERANCE if around is None else FIRST * around)
        seconds = table.seconds(cuts)
        if seconds.max() < forecast_s:
            best, forecast_s = cuts, float(seconds.max())
        if around is not None:
            table.look_closer(makespan_s, [start for _, start, _ in cuts], around)
        low, high = makespan_s / STRIDE, makespan_s * STRIDE
    return _answer(best, order.tolist(), sizes, list(layout), gpus, forecast_s)


def _search(cover: Callable[[float], list[Cut] | None], low: float, high: float, tolerance: float) -> tuple[list[Cut], float]:
    """Cuts of the least makespan, and that makespan: widen the given range to a bracket, then bisect it geometrically."""
    while (best := cover(high)) is None:
        low, high = high, high * STRIDE
    while (cuts := cover(low)) is not None:
        best, low, high = cuts, low / STRIDE, low
    while high > low * (1 + tolerance):
        middle = (low * high) ** 0.5
        cuts = cover(middle)
        if cuts is None:
            low = middle
        else:
            best, high = cuts, middle
    return best, high


class _Table:
    """Log expected seconds of groups by degree, start and size. `sums` as in `Ranked`."""

    def __init__(self, sums: Floats, tempos: Sequence[Tempo]) -> None:
        count = len(sums) - 1
        self._count, self._sums, self._tempos = count, sums, tempos
        self._last = sums[-1] - sums[-2]
        half, least = (count + 1) // 2, max(1, count // BACK_PART)
        behind = count - least * _places(half // least, 1, START_RATIO)
        self._starts = np.unique(np.concatenate([_places(half, HEAD_STARTS, START_RATIO), behind]))
        sizes = _places(count, HEAD_SIZES, SIZE_RATIO)[1:]
        self._sizes = np.broadcast_to(sizes, (len(tempos), len(self._starts), len(sizes)))
        self._logs = self._entries(self._starts, self._sizes)
        self.range_s = float(np.exp(self._logs[:, 0, 0].min())), float(np.exp(self._logs[:, 0, -1].max()))
        """Lower bound of any plan on any GPUs, and the time of one replica for all trajectories."""
        self._closer = False

    def look_closer(self, makespan_s: float, starts: Sequence[int], around: float) -> None:
        """Refine the table near sizes that take `makespan_s`: at all starts the first time, and always at `starts`, which are added."""
        self.within(makespan_s)
        more = np.array(starts)
        kept = np.flatnonzero(~np.isin(self._starts, more)) if self._closer else np.zeros(0, dtype=np.intp)
        fresh = more if self._closer else np.union1d(self._starts, more)
        usual = np.exp(np.array([np.interp(fresh, self._starts, one) for one in self._members]))
        sizes = np.rint(usual[..., None] * np.linspace(1 - around, 1 + around, LOOKS)).astype(np.intp)
        ends = np.broadcast_to(np.array([1, self._count]), (*usual.shape, 2))
        sizes = np.sort(np.concatenate([np.clip(sizes, 1, self._count), ends], axis=-1), axis=-1)
        merged = np.concatenate([self._starts[kept], fresh])
        order = np.argsort(merged)
        self._starts = merged[order]
        logs = self._entries(fresh, sizes)
        if self._closer:
            sizes = np.concatenate([self._sizes[:, kept], sizes], axis=1)
            logs = np.concatenate([self._logs[:, kept], logs], axis=1)
        self._sizes, self._logs, self._closer = sizes[:, order], logs[:, order], True

    def _entries(self, starts: Ints, sizes: Ints) -> Floats:
        """[degrees, starts, sizes]; `sizes` ascend."""
        first = np.repeat(starts, sizes.shape[-1])
        priced = [self._priced(first, (starts[:, None] + one).ravel(), tempo) for one, tempo in zip(sizes, self._tempos, strict=True)]
        entries: Floats = np.maximum.accumulate(np.log(np.maximum(np.stack(priced).reshape(sizes.shape), 1e-9)), axis=-1)
        return entries

    def within(self, makespan_s: float) -> list[Reach]:
        """For each degree, how far a group from a given rank reaches within the makespan."""
        wanted = np.log(makespan_s)
        below = (self._logs <= wanted).sum(axis=-1)
        left, right = np.clip(below - 1, 0, None), np.minimum(below, self._logs.shape[-1] - 1)
        low, high = (np.take_along_axis(self._logs, at[..., None], -1)[..., 0] for at in (left, right))
        share = np.clip(np.where(high > low, (wanted - low) / np.maximum(high - low, 1e-12), 0.0), 0.0, 1.0)
        less, more = (np.log(np.take_along_axis(self._sizes, at[..., None], -1)[..., 0]) for at in (left, right))
        members = np.where(below > 0, np.exp(less + share * (more - less)), 0.0)
        ends = np.maximum.accumulate(self._starts + members, axis=-1)
        self._members = np.log(np.maximum(ends - self._starts, NONE))
        starts = self._starts.tolist()
        return [self._reach(starts, one) for one in self._members.tolist()]

    def seconds(self, cuts: Sequence[Cut]) -> Floats:
        """Expected seconds of these groups, computed exactly, [cuts]."""
        numbers, starts, ends = np.array(cuts).T
        seconds = np.zeros(len(cuts))
        for number in np.unique(numbers):
            mine = numbers == number
            seconds[mine] = self._priced(starts[mine], ends[mine], self._tempos[number])
        return seconds

    def _reach(self, starts: list[int], members: list[float]) -> Reach:
        count, last = self._count, len(starts) - 1

        def reach(start: int) -> int:
            cell = min(bisect_right(starts, start), last) - 1
            share = (start - starts[cell]) / (starts[cell + 1] - starts[cell])
            end = start + int(exp(members[cell] + share * (members[cell + 1] - members[cell])) + 1e-6)
            return end if end < count else count

        return reach

    def _before(self, ranks: Ints) -> Floats:
        """Sums of the curves before each of these ranks, padded past the end with copies of the last trajectory."""
        count = self._count
        beyond = np.maximum(ranks - count, 0)[:, None, None]
        sums: Floats = self._sums[np.minimum(ranks, count)] + beyond * self._last
        return sums

    def _priced(self, starts: Ints, ends: Ints, tempo: Tempo) -> Floats:
        parts = [slice(at, at + ROWS) for at in range(0, len(starts), ROWS)]
        return np.concatenate([drain_s(self._before(ends[part]) - self._sums[starts[part]], tempo) for part in parts])


def _places(most: int, head: int, ratio: float) -> Ints:
    """0, 1, 2, ... up to `head`, then in this ratio, and `most`."""
    behind = head * ratio ** np.arange(1, max(0, int(np.log(max(most, 1) / head) / np.log(ratio))) + 1)
    return np.unique(np.minimum(np.concatenate([np.arange(head + 1), np.rint(behind), [most]]), most).astype(np.intp))


def _answer(
    cuts: Sequence[Cut], order: Sequence[int], sizes: Sequence[int], layout: list[int], gpus: int | None, makespan_s: float
) -> RobustPlan:
    made = [(sizes[number], tuple(order[start:end])) for number, start, end in cuts]
    if not layout:
        made += [(sizes[0], ())] * (((gpus or 0) - sum(tp for tp, _ in made)) // sizes[0])
        return RobustPlan(tuple(group for _, group in made), tuple(tp for tp, _ in made), makespan_s)
    groups = []
    for tp in layout:
        number = next((i for i, (size, _) in enumerate(made) if size == tp), None)
        groups.append(() if number is None else made.pop(number)[1])
    return RobustPlan(tuple(groups), tuple(layout), makespan_s)
