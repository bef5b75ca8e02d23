"""Small planning problems and their answers by trying everything; shared by the tests of this folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np

from verl_heddle.latency import LatencyModel, Memory
from verl_heddle.layout.price import Coming, Site
from verl_heddle.place.cost import Floats
from verl_heddle.place.outlook import drain_s
from verl_heddle.place.pace import Habit, Tempo

GB = 10**9
HABIT = Habit(1000.0, 1.0, 500.0, 0.0)
DENSE = LatencyModel.affine(0.01, 0.0005, prefill_per_token_s=1e-5, tps=(1, 2, 4, 8), speedup={2: 1.7, 4: 2.8, 8: 4.0}, weight_load_s=2.0)
SPARSE = LatencyModel.affine(0.004, 0.0001, tps=(1, 2, 4, 8), speedup={2: 1.05, 4: 1.1, 8: 1.15}, weight_load_s=2.0)


def sized(weight_gb: int) -> LatencyModel:
    """A model whose weights are shared out: a GPU of 80 GB holds `weight_gb / tp`."""
    engines = {}
    for tp, engine in DENSE.engines.items():
        memory = Memory(80 * GB, weight_gb * GB // tp, 100_000, 2 * GB)
        engines[tp] = LatencyModel.affine(0.01, memory=memory).engines[1].__class__(engine.decode, engine.prefill, memory, 2.0)
    return LatencyModel("sized", engines)


def site(latency: LatencyModel = DENSE, gpus: int = 4, gpus_per_node: int = 8, **more) -> Site:
    return Site(latency, gpus, gpus_per_node, **more)


def tempos(latency: LatencyModel, tps: Sequence[int], most: int) -> dict[int, Tempo]:
    return {tp: site(latency).tempo(tp, most, HABIT) for tp in tps}


def best_cut(step: Coming, layout: Sequence[int], times: Mapping[int, Tempo]) -> float:
    """The least expected drain of the slowest, over every order of the layout and every cut of the trajectories by median, most first."""
    order = np.argsort(-step.medians, kind="stable")
    sums: Floats = np.concatenate([np.zeros((1, *step.rows.shape[1:])), np.cumsum(step.rows[order], axis=0)])
    count = len(order)

    @cache
    def cost(tp: int, start: int, end: int) -> float:
        return float(drain_s(sums[end] - sums[start], times[tp]))

    @cache
    def rest(left: tuple[int, ...], start: int) -> float:
        if start == count:
            return 0.0
        if not left:
            return float("inf")
        return min(
            max(cost(tp, start, end), rest(left[:number] + left[number + 1 :], end))
            for number, tp in enumerate(left)
            if tp not in left[:number]
            for end in range(start, count + 1)
        )

    return rest(tuple(layout), 0)
