"""Random placement problems, and their answer by trying everything; shared by the tests of this folder."""

from __future__ import annotations

from itertools import combinations_with_replacement

import numpy as np

from verl_heddle.place.cost import Cost, Degree, Work, price, work


def degrees_of(rng: np.random.Generator, tps: tuple[int, ...], slots: int, kv: bool = False) -> list[Degree]:
    """Unrelated tables: any non-decreasing curve per degree."""
    return [
        Degree(
            tp,
            np.maximum.accumulate(np.exp(rng.normal(0, 0.8, slots)) if rng.random() < 0.5 else rng.random() + np.cumsum(rng.random(slots))),
            float(rng.uniform(3, 9)) if kv else np.inf,
        )
        for tp in tps
    ]


def random_case(seed: int, tools: bool = False, kv: bool = False) -> tuple[Work, list[Degree], int]:
    """At most 7 trajectories, at most 4 GPUs, degrees among 1, 2, 4 (not always 1); slots sometimes scarce."""
    rng = np.random.default_rng(seed)
    count, gpus = int(rng.integers(1, 8)), int(rng.integers(1, 5))
    tps = tuple(tp for tp in (1, 2, 3, 4) if tp <= gpus and rng.random() < 0.7) or (1,)
    slots = int(rng.integers(2, 8)) if rng.random() < 0.3 else 7
    tokens = np.round(np.exp(rng.normal(2, 1, count)), 1)
    if rng.random() < 0.2:
        tokens = np.round(tokens)  # ties
    tool_s = np.where(rng.random(count) < 0.7, np.exp(rng.normal(2, 1, count)), 0.0) if tools else 0.0
    return work(tokens, tool_s, 1.0 if kv else 0.0), degrees_of(rng, tps, slots, kv), gpus


def layouts(tps: list[int], gpus: int) -> list[tuple[int, ...]]:
    """Every multiset of degrees that fits."""
    found = []
    for size in range(1, gpus + 1):
        found += [one for one in combinations_with_replacement(sorted(tps), size) if sum(one) <= gpus]
    return found


def everything(items: Work, degrees: list[Degree], layout: tuple[int, ...], cost: Cost) -> float:
    """The least makespan over all assignments to the layout's replicas; inf if there is none. 3^n per replica."""
    count = len(items)
    full = 1 << count
    masks = np.arange(full)
    members = [[i for i in range(count) if mask >> i & 1] for mask in range(full)]
    prices = {degree.tp: np.array([price(items, one, degree, cost) for one in members]) for degree in degrees if degree.tp in layout}
    best = prices[layout[0]]
    for tp in layout[1:]:
        after = np.empty(full)
        for mask in range(full):
            inside = masks[(masks & ~mask) == 0]
            after[mask] = np.maximum(prices[tp][inside], best[mask ^ inside]).min()
        best = after
    return float(best[full - 1])


def contiguous(items: Work, degrees: list[Degree], layout: tuple[int, ...], cost: Cost) -> float:
    """The least makespan over all orders of the layout and all cuts of the trajectories by tokens, most first."""
    by_tp = {degree.tp: degree for degree in degrees}
    order = np.argsort(-items.tokens, kind="stable")
    count = len(items)
    best: dict[tuple[tuple[int, ...], int], float] = {}

    def rest(left: tuple[int, ...], start: int) -> float:
        if start == count:
            return 0.0
        if not left:
            return np.inf
        if (left, start) not in best:
            best[left, start] = min(
                max(price(items, order[start:end], by_tp[tp], cost), rest(left[:number] + left[number + 1 :], end))
                for number, tp in enumerate(left)
                for end in range(start, count + 1)
            )
        return best[left, start]

    return rest(tuple(sorted(layout)), 0)
