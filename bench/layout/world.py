"""A step without turns or clocks: trajectories, replicas, and the exact time of groups; the planner is measured on it by thousands.

One turn, contexts of constant length, no tools, all submitted at once: a replica's drain time is the staircase of `place.cost`, slots and
KV cache included in its seconds per token (`place.pace`). Predictions are honest and of given quality, the correlation of log predicted and
log true length.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import log, sqrt
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from verl_heddle.fleet import Replica
from verl_heddle.latency import load
from verl_heddle.layout.price import Coming, Site, coming, priced
from verl_heddle.place.cost import Cost, Degree, Floats, price, work
from verl_heddle.place.pace import Habit, Tempo, degree
from verl_heddle.predict.quantities import LOGISTIC

GPU, NODE, SLOTS, UTILIZATION = "H200", 8, 512, 0.8
MODELS = ("Qwen3-8B", "Qwen3-14B", "Qwen3-32B", "Qwen3-30B-A3B")
USUAL = {"Qwen3-8B": 1, "Qwen3-14B": 1, "Qwen3-32B": 2, "Qwen3-30B-A3B": 1}
"""Degree of stock verl as most run it: Heddle's evaluation, and the smallest that holds the model."""

MEDIAN, CAP, PROMPT = 5000.0, 40_960.0, 1000
HABIT = Habit(6000.0, 0.0, 5000.0, 0.0)
"""One turn; the context is constant, so that the staircase is the truth."""

Groups = Sequence[Sequence[int]]


@dataclass(frozen=True)
class World:
    """A model on GPUs, and `most` trajectories at most. `kv`: whether the KV cache limits."""

    model: str
    gpus: int
    most: int
    kv: bool = True

    @cached_property
    def site(self) -> Site:
        """For the planner."""
        latency = load(GPU, self.model)
        return Site(latency, self.gpus, NODE, SLOTS, UTILIZATION, None if self.kv else dict.fromkeys(latency.tps))

    @cached_property
    def degrees(self) -> dict[int, Degree]:
        """Seconds per token by degree and batch: the truth."""
        site = self.site
        return {tp: degree(site.latency, Replica("r", tp, SLOTS, site.held(tp)), self.most, HABIT) for tp in site.degrees()}

    @cached_property
    def tempos(self) -> dict[int, Tempo]:
        """The same for the planner."""
        return {tp: self.site.tempo(tp, self.most, HABIT) for tp in self.site.degrees()}

    def makespan(self, tokens: Floats, layout: Sequence[int], groups: Groups) -> float:
        """Of the true lengths."""
        items = work(tokens)
        return max(price(items, list(group), self.degrees[tp], Cost.STAIRCASE) for tp, group in zip(layout, groups, strict=True))

    def even(self, tokens: Floats, tp: int, rng: np.random.Generator, times: int = 3) -> float:
        """Stock at one degree: equal counts at random, mean over some draws."""
        replicas = self.gpus // tp
        found = []
        for _ in range(times):
            shuffled = rng.permutation(len(tokens))
            found.append(self.makespan(tokens, (tp,) * replicas, [shuffled[number::replicas].tolist() for number in range(replicas)]))
        return float(np.mean(found))

    def placed(self, step: Coming, layout: Sequence[int], rng: np.random.Generator) -> tuple[tuple[int, ...], Groups]:
        """As the planner places on this layout: its groups, or an even split where that is forecast to be as good."""
        found = priced(step, layout, self.tempos)
        if found.groups:
            return found.layout, found.groups
        shuffled, replicas = rng.permutation(len(step.medians)), len(found.layout)
        return found.layout, [shuffled[number::replicas].tolist() for number in range(replicas)]

    def bound(self, tokens: Floats) -> float:
        """The longest alone at its best degree, and all tokens at the cheapest GPU-seconds; no schedule on any layout is faster."""
        alone = min(float(one.tau[0]) for one in self.degrees.values())
        cheap = min(float((tp * one.tau / np.arange(1, len(one.tau) + 1)).min()) for tp, one in self.degrees.items())
        return max(float(tokens.max()) * alone, float(tokens.sum()) * cheap / self.gpus)


def drawn(count: int, quality: float, sigma: float, seed: int) -> tuple[Floats, Coming]:
    """True tokens, and what is predicted."""
    rng = np.random.default_rng(seed)
    z, noise = rng.normal(size=(2, count))
    said = np.exp(log(MEDIAN) + quality * sigma * (quality * z + sqrt(1 - quality**2) * noise))
    truth = np.minimum(MEDIAN * np.exp(sigma * z), CAP)
    if quality == 1:
        said = truth
    return truth, coming(said, sigma * sqrt(1 - quality**2) * LOGISTIC, CAP if quality < 1 else np.inf)
