"""How long planning takes: CPU seconds of the joint search, and of the whole choice, by size."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from bench.layout.world import HABIT, World, drawn
from verl_heddle.layout.planner import choose
from verl_heddle.place.robust import plan

SIZES = ((6_400, 64, 0.05), (100_000, 1024, 2.0))
"""Trajectories, GPUs, seconds the search may take. Heddle's annealing takes 5 s for the first (paper)."""

REPEATS = 5


def times(quick: bool) -> list[dict[str, Any]]:
    """Fastest of some runs, predictions of log-correlation 0.71; nothing is kept from one to the next."""
    rows = []
    for count, gpus, target in SIZES[:1] if quick else SIZES:
        world = World("Qwen3-14B", gpus, count)
        _, step = drawn(count, 0.71, 0.9, 0)
        tempos = world.tempos
        search = _cpu_s(lambda: plan(step.medians, step.rows, tempos, gpus=gpus))  # noqa: B023
        whole = _cpu_s(lambda: choose(replace(step), world.site, HABIT, (2,) * (gpus // 2)))  # noqa: B023
        rows.append({"trajectories": count, "gpus": gpus, "search_s": search, "choice_s": whole, "target_s": target})
    return rows


def _cpu_s(job: Callable[[], Any]) -> float:
    best = float("inf")
    for _ in range(REPEATS):
        begun = time.process_time()
        job()
        best = min(best, time.process_time() - begun)
    return best
