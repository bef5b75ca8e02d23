"""Finds the layout and placement with the exact minimum makespan, searched jointly.

Problem: cut `gpus` GPUs into replicas of allowed degrees (or take the layout as given) and the trajectories into one group per replica,
minimizing the cost of the most expensive group; costs in `cost.py`.

Law: parametric search. For a makespan T, let reach_tp(s) be the first rank that a group of degree tp beginning at rank s does not cover
within T. F[g] = the furthest rank that g GPUs cover = max(F[g - 1], max over tp of reach_tp(F[g - tp])), from F[0] = 0; T is feasible if
F[gpus] reaches the end. With a given layout the state is how many replicas of each degree are used. Bisect on T, taking after each
feasible probe the makespan its groups really have.

Exact, because reach is monotone in s (a later start has shorter members and covers no less), so the furthest F is best extended,
and every order of degrees is tried. Under `longest` some optimal placement consists of groups contiguous in the order (Heddle,
lemma 5.1: swapping keeps sizes), also with a table per degree, slots, and tools; so the minimum is over all assignments. Under `staircase`,
or if KV demands differ between trajectories, it is over contiguous groups. Degrees that are powers of two always pack into nodes.

Certificate: a probe found `bound_s` infeasible (or it is the longest trajectory alone), so no placement of the above kind is shorter.
Invariants: every trajectory in exactly one group; bound_s <= makespan_s <= bound_s * (1 + tolerance); same input, same answer.
Source: in place of Heddle's presorted DP inside simulated annealing (arXiv 2603.28101, sections 5 and 7, algorithm 2).
Cost: O(gpus * degrees * log slots) per probe under `longest` (and a sort with tools), about 40 probes; bench/placement has the times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from operator import mul

from verl_heddle.place.cost import Cost, Degree, Ints, Ranks, Reach, Work, price

TOLERANCE = 1e-12
"""Relative width at which the search stops: rounding of the times themselves."""

ENDLESS_S = 1e250
"""A makespan so large that only slots or KV tokens can make it infeasible."""

MAX_STATES = 200_000
"""Ways to have used part of a given layout; about 0.2 s a probe. 4, 8 and 32 replicas of three degrees have 1,485."""

Cut = tuple[int, int, int]
"""Degree index, first rank, end rank (exclusive)."""


@dataclass(frozen=True, slots=True)
class Group:
    """One replica's trajectories, as indices into the input, in the order of the ranks; may be empty."""

    tp: int
    members: Ints
    cost_s: float


@dataclass(frozen=True, slots=True)
class Placement:
    """The optimal placement. Groups follow the given layout's order, or else their first rank."""

    groups: tuple[Group, ...]
    makespan_s: float
    bound_s: float
    probes: int

    @property
    def layout(self) -> tuple[int, ...]:
        """Degrees of the replicas, in the order of the groups."""
        return tuple(group.tp for group in self.groups)


def solve(items: Work, degrees: Sequence[Degree], gpus: int, cost: Cost = Cost.LONGEST, tolerance: float = TOLERANCE) -> Placement:
    """The best layout of at most `gpus` GPUs with the best placement on it; GPUs left over become empty replicas of the smallest degree.

    Raises:
        ValueError: nothing to place, no degree fits the GPUs, a degree twice, or the trajectories exceed all slots or KV tokens.
    """
    usable = sorted((degree for degree in degrees if degree.tp <= gpus), key=lambda degree: degree.tp)
    _check(items, usable, f"{gpus} GPUs")
    sizes = [degree.tp for degree in usable]

    def cover(reaches: Sequence[Reach]) -> list[Cut] | None:
        return cover_free(reaches, sizes, gpus, len(items))

    cuts, order, bound_s, probes = _search(items, usable, cost, tolerance, cover)
    spare = (gpus - sum(sizes[number] for number, _, _ in cuts)) // sizes[0]
    cuts += [(0, len(items), len(items))] * spare
    return _placement(items, usable, cost, cuts, order, bound_s, probes)


def solve_layout(
    items: Work, degrees: Sequence[Degree], layout: Sequence[int], cost: Cost = Cost.LONGEST, tolerance: float = TOLERANCE
) -> Placement:
    """The best placement on replicas of these degrees, one group per entry of `layout` and in its order.

    Raises:
        ValueError: as `solve`; a degree of the layout is not among `degrees`; the layout mixes so many that the search would take minutes.
    """
    known = {degree.tp: degree for degree in degrees}
    missing = sorted(set(layout) - set(known))
    if missing or not layout:
        raise ValueError(f"the layout {list(layout)} needs times for tp={missing or 'at least one replica'}")
    usable = [known[tp] for tp in sorted(set(layout))]
    _check(items, usable, f"the layout {list(layout)}")
    counts = [sum(tp == degree.tp for tp in layout) for degree in usable]
    states = prod(count + 1 for count in counts)
    if states > MAX_STATES:
        raise ValueError(
            f"a layout with {counts} replicas of tp={[item.tp for item in usable]} has {states:,} states, at most {MAX_STATES:,}"
        )

    def cover(reaches: Sequence[Reach]) -> list[Cut] | None:
        return cover_layout(reaches, counts, len(items))

    cuts, order, bound_s, probes = _search(items, usable, cost, tolerance, cover)
    by_degree: dict[int, list[Cut]] = {degree.tp: [] for degree in usable}
    for cut in cuts:
        by_degree[usable[cut[0]].tp].append(cut)
    numbers = {degree.tp: number for number, degree in enumerate(usable)}
    in_order = [(by_degree[tp].pop(0) if by_degree[tp] else (numbers[tp], len(items), len(items))) for tp in layout]
    return _placement(items, usable, cost, in_order, order, bound_s, probes)


def _check(items: Work, degrees: Sequence[Degree], where: str) -> None:
    if not len(items):
        raise ValueError("no trajectories to place")
    if not degrees:
        raise ValueError(f"no tensor-parallel degree fits {where}")
    if len({degree.tp for degree in degrees}) != len(degrees):
        raise ValueError(f"a tensor-parallel degree is given twice: {[degree.tp for degree in degrees]}")


def _search(
    items: Work, degrees: Sequence[Degree], cost: Cost, tolerance: float, cover: Callable[[Sequence[Reach]], list[Cut] | None]
) -> tuple[list[Cut], Ints, float, int]:
    """Cuts, order, bound, probes."""
    ranks = Ranks(items, degrees, cost)
    bound = ranks.floor_s
    high = max(bound, 1e-9)
    probes = 1
    if cover(ranks.within(ENDLESS_S)) is None:
        raise ValueError(f"{len(items)} trajectories exceed the slots or the KV tokens of the replicas")
    while True:
        probes += 1
        cuts = cover(ranks.within(high))
        if cuts is not None:
            break
        bound, high = high, 2 * high
    best, order = cuts, ranks.order
    high = min(high, _makespan(items, degrees, cost, best, order))
    while high - bound > tolerance * high:
        middle = 0.5 * (bound + high)
        if not bound < middle < high:
            break
        probes += 1
        cuts = cover(ranks.within(middle))
        if cuts is None:
            bound = middle
        else:
            best, order = cuts, ranks.order
            high = min(middle, _makespan(items, degrees, cost, best, order))
    return best, order, bound, probes


def _makespan(items: Work, degrees: Sequence[Degree], cost: Cost, cuts: Iterable[Cut], order: Ints) -> float:
    return max(price(items, order[start:end], degrees[number], cost) for number, start, end in cuts)


def _placement(
    items: Work, degrees: Sequence[Degree], cost: Cost, cuts: Sequence[Cut], order: Ints, bound_s: float, probes: int
) -> Placement:
    groups = []
    for number, start, end in cuts:
        members = order[start:end]
        groups.append(Group(degrees[number].tp, members, price(items, members, degrees[number], cost)))
    makespan_s = max(group.cost_s for group in groups)
    return Placement(tuple(groups), makespan_s, min(bound_s, makespan_s), probes)


def cover_free(reaches: Sequence[Reach], sizes: Sequence[int], gpus: int, count: int) -> list[Cut] | None:
    """Groups that cover all ranks with at most `gpus` GPUs; None if infeasible."""
    furthest = [0] * (gpus + 1)
    way = [-1] * (gpus + 1)
    for used in range(1, gpus + 1):
        best, how = furthest[used - 1], -1
        for number, size in enumerate(sizes):
            if size > used:
                break
            end = reaches[number](furthest[used - size])
            if end > best:
                best, how = end, number
        furthest[used], way[used] = best, how
        if best >= count:
            return _walk_back(furthest, way, sizes, used)
    return None


def _walk_back(furthest: Sequence[int], way: Sequence[int], sizes: Sequence[int], used: int) -> list[Cut]:
    cuts = []
    while used:
        number = way[used]
        before = used - (sizes[number] if number >= 0 else 1)
        if number >= 0:
            cuts.append((number, furthest[before], furthest[used]))
        used = before
    return cuts[::-1]


def cover_layout(reaches: Sequence[Reach], counts: Sequence[int], count: int) -> list[Cut] | None:
    """As `cover_free`, with `counts` replicas of each degree. State = mixed-radix number of how many of each are used."""
    strides = [1, *accumulate((size + 1 for size in counts[:-1]), mul)]
    states = strides[-1] * (counts[-1] + 1)
    furthest, way = [0] * states, [-1] * states
    places = list(zip(range(len(counts)), strides, counts, strict=True))
    for state in range(1, states):
        best, how = -1, -1
        for number, stride, size in places:
            if state // stride % (size + 1):
                start = furthest[state - stride]
                end = reaches[number](start) if start < count else count
                if end > best:
                    best, how = end, number
        furthest[state], way[state] = best, how
        if best >= count:
            return _walk_back(furthest, way, strides, state)
    return None
