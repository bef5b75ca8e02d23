"""Placement on distributions of lengths: the exact search of `exact.py` with the expected staircase of `outlook.py` as a group's cost.

Law: order the trajectories by predicted median, never by anything sampled (choosing among samples finds the lucky ones: the optimizer's
curse). Groups are contiguous in this order; a group costs its expected drain time; bisect on the makespan with F[g] as in `exact.py`.
A replica that looks short in the mean but hides a tail is charged for the tail, so crowds stay small where little is known.
With lengths known (scale near 0) this is the staircase plan; with nothing known (all alike) it splits evenly, which is stock's rule.

Invariant: taking a member out of a group never raises its cost, and later members drain no slower where scales are alike; so the furthest
reach is the best one to go on from, and the makespan is within `TOLERANCE` of the best contiguous plan. Where scales differ it is near.
Source: own. Cost: O(gpus * degrees) times two or three evaluations per probe, each O(LOOKS * len(GRID)); about 15 probes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from verl_heddle.place.cost import Floats, Reach
from verl_heddle.place.exact import Cut, cover_free, cover_layout
from verl_heddle.place.outlook import drain_s
from verl_heddle.place.pace import Tempo

TOLERANCE = 2e-3
"""Relative; the expectation itself is not known better."""

LOOKS = 4
"""Group ends priced together: costs little more than one."""


@dataclass(frozen=True, slots=True)
class RobustPlan:
    """`groups[i]`: trajectories of replica i, most tokens first; `layout[i]`: its degree; `forecast_s`: expected drain of the slowest."""

    groups: tuple[tuple[int, ...], ...]
    layout: tuple[int, ...]
    forecast_s: float


def plan(medians: Floats, rows: Floats, tempos: Mapping[int, Tempo], *, gpus: int | None = None, layout: Sequence[int] = ()) -> RobustPlan:
    """Groups for every replica of `layout`, or of the best layout of `gpus` GPUs.

    Args:
        medians: predicted tokens, [n]; they give the order.
        rows: `outlook.curves` of the same trajectories, [n, 2, len(GRID)].
        tempos: seconds per token by degree, on `outlook.GRID`; slots and KV are in them, so that any number fits at a price.

    Raises:
        ValueError: nothing to place, neither or both of `gpus` and `layout`, or a degree without times.
    """
    if not len(medians) or (gpus is None) == (not layout):
        raise ValueError("a plan needs trajectories, and either gpus or a layout")
    sizes = sorted(tp for tp in tempos if (tp in layout if layout else tp <= (gpus or 0)))
    if not sizes or (layout and set(sizes) != set(layout)):
        raise ValueError(f"no times for the degrees of {list(layout) or gpus}")
    order = np.argsort(-medians, kind="stable")
    sums = np.concatenate([np.zeros((1, *rows.shape[1:])), np.cumsum(rows[order], axis=0)])
    counts = [sum(tp == size for tp in layout) for size in sizes]

    def cover(makespan_s: float) -> list[Cut] | None:
        reaches = [_reach(sums, tempos[tp], makespan_s) for tp in sizes]
        return cover_layout(reaches, counts, len(order)) if layout else cover_free(reaches, sizes, gpus or 0, len(order))

    low, high = 0.0, 1.0
    while (cuts := cover(high)) is None:
        low, high = high, 2 * high
    best = cuts
    while high - low > TOLERANCE * high:
        middle = 0.5 * (low + high)
        cuts = cover(middle)
        if cuts is None:
            low = middle
        else:
            best, high = cuts, middle
    return _answer(best, order.tolist(), sizes, list(layout), gpus, high)


def _reach(sums: Floats, tempo: Tempo, makespan_s: float) -> Reach:
    """Remembers what it found: with a layout given, many ways of using replicas begin at the same rank."""
    most = len(sums) - 1
    found: dict[int, int] = {most: most}
    usual = 1

    def reach(start: int) -> int:
        nonlocal usual
        if start not in found:
            found[start] = _furthest(sums, tempo, makespan_s, start, usual)
            usual = max(1, found[start] - start)
        return found[start]

    return reach


def _furthest(sums: Floats, tempo: Tempo, makespan_s: float, start: int, guess: int) -> int:
    """The last end whose group fits, by a search of `LOOKS` places at a time, first around the guess: groups in a row are alike."""
    good, bad = start, len(sums)
    step = max(1, guess // 8)
    ends = np.arange(start + guess - (LOOKS // 2 - 1) * step, start + guess + (LOOKS // 2 + 1) * step, step)
    while bad - good > 1:
        ends = ends[(ends > good) & (ends < bad)]
        if len(ends):
            fits = drain_s(sums[ends] - sums[start], tempo) <= makespan_s
            first_bad = len(ends) if fits.all() else int(np.argmin(fits))
            good = int(ends[first_bad - 1]) if first_bad else good
            bad = int(ends[first_bad]) if first_bad < len(ends) else bad
        if bad == len(sums) and good + LOOKS * step < bad:  # all that was looked at fits: on, in longer steps
            step *= 4
            ends = np.arange(good + step, good + (LOOKS + 1) * step, step)
        else:
            ends = np.unique(np.linspace(good, bad, LOOKS + 2)[1:-1].astype(np.intp))
    return good


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
