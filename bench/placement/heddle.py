"""Heddle's planner as the paper prints it, for comparison: presorted dynamic programme and sort-initialised simulated annealing.

Source: arXiv 2603.28101, eq. (3) and algorithm 2. What the paper leaves open is chosen in its favour: empty workers are allowed; the inner
minimum is found by the crossing of its two monotone sides, vectorised over all i, instead of by trying every k (same optimum, O(n log n)
per worker in place of O(n^2)); the annealing runs 150 evaluations, what its printed times imply (5 s / 36 ms), with moves drawn at random.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import exp
from random import Random

import numpy as np

from verl_heddle.place.cost import Floats

EVALUATIONS = 150
COOLING = 0.96
"""With 150 evaluations the temperature ends at 0.2 % of where it begins."""


def presorted_dp(lengths: Floats, tables: Mapping[int, Floats], layout: Sequence[int]) -> float:
    """Makespan of eq. (3) with workers in this order; `lengths` descending, `tables[tp][k - 1]` seconds per token with k together."""
    count = len(lengths)
    heads = np.append(lengths, 0.0)
    best = np.where(np.arange(count + 1) == 0, 0.0, np.inf)
    for tp in layout:
        tau = np.append(0.0, tables[tp])
        slots = len(tau) - 1
        ends = np.arange(count + 1)
        low, high = np.maximum(0, ends - slots), ends.copy()  # the first k at which best[k] >= heads[k] * tau[i - k] lies in [low, high]
        while True:
            open_ = low < high
            if not open_.any():
                break
            middle = (low + high) // 2
            crossed = best[middle] >= heads[middle] * tau[ends - middle]
            high = np.where(open_ & crossed, middle, high)
            low = np.where(open_ & ~crossed, middle + 1, low)
        before = np.maximum(low - 1, np.maximum(0, ends - slots))
        best = np.minimum(np.maximum(best[low], heads[low] * tau[ends - low]), np.maximum(best[before], heads[before] * tau[ends - before]))
    return float(best[count])


def anneal(
    lengths: Floats, tables: Mapping[int, Floats], gpus: int, rng: Random, evaluations: int = EVALUATIONS
) -> tuple[float, tuple[int, ...]]:
    """Best makespan found and its layout."""
    sizes = sorted(tp for tp in tables if tp <= gpus)
    layout = _draw(sizes, gpus, rng)
    cost = temperature = presorted_dp(lengths, tables, layout)
    best = (cost, layout)
    for _ in range(evaluations - 1):
        other = _perturbed(layout, sizes, rng)
        price = presorted_dp(lengths, tables, other)
        if price < cost or rng.random() < exp(-(price - cost) / max(temperature, 1e-12)):
            layout, cost = other, price
        best = min(best, (cost, layout))
        temperature *= COOLING
    return best


def _draw(sizes: Sequence[int], gpus: int, rng: Random) -> tuple[int, ...]:
    layout: list[int] = []
    while (left := gpus - sum(layout)) >= sizes[0]:
        layout.append(rng.choice([size for size in sizes if size <= left]))
    return tuple(sorted(layout, reverse=True))


def _perturbed(layout: tuple[int, ...], sizes: Sequence[int], rng: Random) -> tuple[int, ...]:
    """Split a worker, merge two equal ones, or both (redistribution); unchanged where the move drawn is not possible."""
    workers = list(layout)
    kind = rng.choice(("split", "merge", "redistribute"))
    if kind in ("split", "redistribute"):
        able = [tp for tp in workers if tp % 2 == 0 and tp // 2 in sizes]
        if able:
            tp = rng.choice(able)
            workers.remove(tp)
            workers += [tp // 2, tp // 2]
    if kind in ("merge", "redistribute"):
        able = [tp for tp in set(workers) if workers.count(tp) >= 2 and 2 * tp in sizes]
        if able:
            tp = rng.choice(sorted(able))
            workers.remove(tp)
            workers.remove(tp)
            workers.append(2 * tp)
    return tuple(sorted(workers, reverse=True))
