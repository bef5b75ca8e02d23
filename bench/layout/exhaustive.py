"""The planner's layout against every layout of 8 GPUs, lengths known: what its choice costs over the best one."""

from __future__ import annotations

from itertools import combinations_with_replacement
from typing import Any

import numpy as np

from bench.layout.world import HABIT, MODELS, World, drawn
from verl_heddle.layout.planner import choose
from verl_heddle.place.cost import Cost, work
from verl_heddle.place.exact import solve_layout

GPUS, MOST = 8, 1600
FIRST_SEED = 5000
"""The planner was made with lower ones in view."""
TOLERANCE = 1e-3
"""Of each exhaustive placement."""


def layouts(tps: tuple[int, ...], gpus: int) -> list[tuple[int, ...]]:
    """Every multiset of degrees that takes exactly the GPUs: 10 for 8 GPUs and powers of two."""
    found = [one for size in range(1, gpus + 1) for one in combinations_with_replacement(tps[::-1], size)]
    return [one for one in found if sum(one) == gpus]


def against_all(samples: int) -> list[dict[str, Any]]:
    """A row per model: excess of the planner's layout over the best, both with the best contiguous placement on true lengths."""
    rows = []
    for model in MODELS:
        world = World(model, GPUS, MOST, kv=False)
        tps = world.site.degrees()
        excess, kinds = [], []
        for seed in range(FIRST_SEED, FIRST_SEED + samples):
            rng = np.random.default_rng(1000 + seed)
            count, sigma = int(np.exp(rng.uniform(np.log(8), np.log(MOST)))), float(rng.choice([0.5, 0.9, 1.3]))
            truth, step = drawn(count, 1.0, sigma, seed)
            chosen = choose(step, world.site, HABIT, (tps[0],) * (GPUS // tps[0]), reshard_s=0.0, margin=0.0).layout
            items = work(truth)
            seconds = {
                one: solve_layout(items, [world.degrees[tp] for tp in sorted(set(one))], one, Cost.STAIRCASE, TOLERANCE).makespan_s
                for one in layouts(tps, GPUS)
            }
            best = min(seconds, key=lambda one: seconds[one])
            excess.append(seconds[tuple(sorted(chosen, reverse=True))] / seconds[best] - 1)
            kinds.append(len(set(best)) > 1)
        found = np.array(excess)
        rows.append(
            {
                "model": model,
                "samples": samples,
                "median": float(np.median(found)),
                "p95": float(np.quantile(found, 0.95)),
                "worst": float(found.max()),
                "over_3_percent": int((found > 0.03).sum()),
                "best_is_mixed": float(np.mean(kinds)),
            }
        )
    return rows
