"""The resource manager alone, over stock verl at the user's degree and at its best one; and what regrouping the tail in a step would add.

Static steps (`world.py`). The planner chooses degrees and groups from predictions; nothing moves afterwards, nothing is preempted. `tail`:
at the best moment there is, told by an oracle, all GPUs regroup into replicas of the highest degree, weights are loaded from host memory,
contexts are prefilled, and the rest is dealt longest first by true lengths: more than any real rule could do.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

import numpy as np

from bench.layout.world import HABIT, MODELS, PROMPT, USUAL, Groups, World, drawn
from verl_heddle.layout.planner import choose
from verl_heddle.layout.price import free
from verl_heddle.place.cost import Floats
from verl_heddle.report.words import mixture

SIGMA = 0.9
QUALITIES = (1.0, 0.71)
MOMENTS = 24
"""At which the tail may regroup, evenly over the makespan."""


def cell(model: str, gpus: int, per_gpu: int, seeds: Sequence[int]) -> dict[str, Any]:
    """Ratios of makespans, medians over the seeds."""
    world = World(model, gpus, gpus * per_gpu)
    tps = world.site.degrees()
    usual = USUAL[model] if USUAL[model] in tps else tps[0]
    steps = [{quality: drawn(gpus * per_gpu, quality, SIGMA, seed) for quality in QUALITIES} for seed in seeds]
    stock = {tp: [world.even(one[1.0][0], tp, np.random.default_rng(seed)) for seed, one in zip(seeds, steps, strict=True)] for tp in tps}
    best = min(tps, key=lambda tp: median(stock[tp]))
    row: dict[str, Any] = {"model": model, "gpus": gpus, "per_gpu": per_gpu, "usual_tp": usual, "best_tp": best}
    row["usual_over_best"] = median(u / b for u, b in zip(stock[usual], stock[best], strict=True))
    row["best_bound"] = median(world.bound(one[1.0][0]) / b for one, b in zip(steps, stock[best], strict=True))
    for name, tp in (("tail_over_best", best), ("tail_over_usual", usual)):
        row[name] = median(
            _tail_gain(world, one[1.0][0], (tp,) * (gpus // tp), _even(len(one[1.0][0]), gpus // tp, seed))
            for seed, one in zip(seeds, steps, strict=True)
        )
    for quality in QUALITIES:
        found: dict[str, list[float]] = {"planner": [], "mixed": [], "bound": [], "tail": []}
        layouts = []
        for number, (seed, one) in enumerate(zip(seeds, steps, strict=True)):
            truth, step = one[quality]
            rng = np.random.default_rng(100 + seed)
            chosen = choose(step, world.site, HABIT, (usual,) * (gpus // usual), reshard_s=0.0, margin=0.0)
            layout, groups = world.placed(step, chosen.layout, rng)
            took = world.makespan(truth, layout, groups)
            mix = free(step, gpus, world.tempos)
            found["planner"].append(stock[best][number] / took)
            found["mixed"].append(stock[best][number] / world.makespan(truth, mix.layout, mix.groups))
            found["bound"].append(world.bound(truth) / took)
            found["tail"].append(_tail_gain(world, truth, layout, groups))
            layouts.append(layout)
        told = {name: median(values) for name, values in found.items()}
        told["layout"] = mixture(layouts[0])
        row[f"q{quality:g}"] = told
    return row


def cells(gpus: int, seeds: int) -> list[dict[str, Any]]:
    """Four models, few and many per GPU."""
    return [cell(model, gpus, per_gpu, range(seeds)) for model in MODELS for per_gpu in (25, 100)]


def _even(count: int, replicas: int, seed: int) -> Groups:
    shuffled = np.random.default_rng(seed).permutation(count)
    return [shuffled[number::replicas].tolist() for number in range(replicas)]


def _tail_gain(world: World, truth: Floats, layout: Sequence[int], groups: Groups) -> float:
    """Makespan as it is over the makespan with the tail regrouped at the best moment; at least 1, since it need not be."""
    lives = [(world.degrees[tp].tau, np.sort(truth[list(group)])) for tp, group in zip(layout, groups, strict=True) if len(group)]
    clocks = []
    for tau, rising in lives:
        pieces = np.diff(rising, prepend=0.0) * tau[len(rising) - 1 :: -1][: len(rising)]
        clocks.append(np.concatenate([[0.0], np.cumsum(pieces)]))
    makespan = max(float(one[-1]) for one in clocks)
    best = makespan
    highest = max(world.degrees)
    for at in np.linspace(0.0, makespan, MOMENTS, endpoint=False)[1:]:
        left, contexts = [], []
        for (_, rising), seconds in zip(lives, clocks, strict=True):
            done = float(np.interp(at, seconds, np.concatenate([[0.0], rising])))
            rest = rising[rising > done] - done
            left.append(rest)
            contexts.append(np.full(len(rest), PROMPT + done))
        best = min(best, at + _regrouped(world, np.concatenate(left), np.concatenate(contexts), highest))
    return float(makespan / best)


def _regrouped(world: World, left: Floats, contexts: Floats, tp: int) -> float:
    """Seconds for the rest on replicas of one degree: waking, prefilling, decoding."""
    if not len(left):
        return 0.0
    latency, replicas = world.site.latency, world.gpus // tp
    order = np.argsort(-left, kind="stable")
    reading = np.asarray(latency.prefill_s(tp, contexts, np.zeros_like(contexts)), dtype=np.float64)
    slowest = 0.0
    for number in range(min(replicas, len(left))):
        mine = order[number::replicas]  # dealt in turn, longest first: the loads differ by one trajectory
        steps = np.diff(world.degrees[tp].tau[: len(mine)], prepend=0.0)
        slowest = max(slowest, float(reading[mine].sum() + (left[mine] * steps).sum()))
    return latency.weight_load_s(tp) + slowest
