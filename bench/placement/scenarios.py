"""How should a plan price a group whose lengths are distributions: sampled scenarios, how many, mean or quantile, or the closed form?

    python bench/placement/scenarios.py            # about 3 minutes; --quick: 20 s; --json FILE writes the numbers

A static step: 640 single-turn trajectories (log-normal, sigma 0.9, median 5,000, at most 40,960) on 8 replicas of Qwen3-8B on H200, honest
predictions of given quality. Every planner cuts the same order (by predicted median) into contiguous groups; only the price differs. The
result is the true staircase makespan of its groups. Ratios are stock's (mean of random even splits) over the planner's, median over draws.
`by one sample`: order and price by one sampled scenario, which is what the optimizer's curse looks like.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from math import log, sqrt
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from bench.provenance import save
from verl_heddle.fleet import Replica
from verl_heddle.latency import load
from verl_heddle.place.cost import Cost, Degree, Floats, Reach, price, work
from verl_heddle.place.exact import cover_free
from verl_heddle.place.outlook import GRID, curves
from verl_heddle.place.pace import Habit, Tempo, degree
from verl_heddle.place.robust import TOLERANCE, plan
from verl_heddle.predict.quantities import LOGISTIC

TRAJECTORIES, REPLICAS, SIGMA, MEDIAN, CAP = 640, 8, 0.9, 5000.0, 40_960
QUALITIES = (1.0, 0.83, 0.57, 0.0)
COUNTS = (1, 4, 16, 64)
HABIT = Habit(6000.0, 0.0, 5000.0, 0.0)
"""One turn, and a constant context, so that the static staircase is the truth."""

Groups = Sequence[Sequence[int]]


def draw(seed: int, quality: float) -> tuple[Floats, Floats, float]:
    """True tokens, predicted medians, scale of the prediction."""
    rng = np.random.default_rng(seed)
    z, noise = rng.normal(size=(2, TRAJECTORIES))
    said = np.exp(log(MEDIAN) + quality * SIGMA * (quality * z + sqrt(1 - quality**2) * noise))
    return np.minimum(MEDIAN * np.exp(SIGMA * z), CAP), said, max(0.02, SIGMA * sqrt(1 - quality**2) * LOGISTIC)


def sampled(medians: Floats, scale: float, count: int, rng: np.random.Generator) -> Floats:
    """Scenarios [count, n]."""
    uniform = rng.random((count, len(medians)))
    return np.minimum(medians * (uniform / (1 - uniform)) ** scale, CAP)


def cut(order: Sequence[int], scenarios: Floats, tau: Floats, quantile: float | None) -> Groups:
    """Contiguous groups of the order; a group costs the mean or a quantile over scenarios of its staircase."""
    columns, steps, count = scenarios[:, order], np.diff(tau, prepend=0.0), len(order)

    def cost(start: int, end: int) -> float:
        drained = -np.sort(-columns[:, start:end], axis=1) @ steps[: end - start]
        return float(drained.mean() if quantile is None else np.quantile(drained, quantile))

    def reach(makespan_s: float) -> Reach:
        def far(start: int) -> int:
            good, bad = start, count + 1
            step = 1
            while good < count and step:
                end = min(count, good + step)
                if cost(start, end) <= makespan_s:
                    good, step = end, 2 * step
                else:
                    bad, step = end, 0
            while bad - good > 1:
                middle = (good + bad) // 2
                good, bad = (middle, bad) if cost(start, middle) <= makespan_s else (good, middle)
            return good

        return far

    low, high = 0.0, cost(0, count)
    best = cover_free([reach(high)], [1], REPLICAS, count)
    while high - low > TOLERANCE * high:
        middle = 0.5 * (low + high)
        found = cover_free([reach(middle)], [1], REPLICAS, count)
        if found is None:
            low = middle
        else:
            best, high = found, middle
    return [[order[i] for i in range(start, end)] for _, start, end in best or []]


def planners(table: Degree, tempo: Tempo) -> dict[str, Callable[[Floats, float, np.random.Generator], Groups]]:
    """By name: medians, scale, random numbers -> groups."""

    def closed(medians: Floats, scale: float, rng: np.random.Generator) -> Groups:
        return plan(medians, curves(medians, scale, CAP), {1: tempo}, layout=(1,) * REPLICAS).groups

    def by(count: int, quantile: float | None) -> Callable[[Floats, float, np.random.Generator], Groups]:
        def scenario(medians: Floats, scale: float, rng: np.random.Generator) -> Groups:
            return cut(np.argsort(-medians).tolist(), sampled(medians, scale, count, rng), table.tau, quantile)

        return scenario

    def point(medians: Floats, scale: float, rng: np.random.Generator) -> Groups:
        return cut(np.argsort(-medians).tolist(), np.minimum(medians, CAP)[None, :], table.tau, None)

    def cursed(medians: Floats, scale: float, rng: np.random.Generator) -> Groups:
        one = sampled(medians, scale, 1, rng)
        return cut(np.argsort(-one[0]).tolist(), one, table.tau, None)

    made = {"closed form": closed, "point": point, "by one sample": cursed}
    for count in COUNTS:
        made[f"{count} scenarios, mean"] = by(count, None)
    made[f"{COUNTS[-1]} scenarios, q0.8"] = by(COUNTS[-1], 0.8)
    return made


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="4 draws, two qualities")
    parser.add_argument("--draws", type=int, default=25)
    parser.add_argument("--json", type=Path, help="write the numbers here")
    args = parser.parse_args(argv)
    draws, qualities = (4, (0.83, 0.0)) if args.quick else (args.draws, QUALITIES)
    latency, replica = load("H200", "Qwen3-8B"), Replica("r", 1, 1024)
    table, tempo = degree(latency, replica, TRAJECTORIES, HABIT), Tempo(latency, replica, GRID, TRAJECTORIES, HABIT)
    known = planners(table, tempo)
    ratios: dict[str, dict[float, list[float]]] = {name: {quality: [] for quality in qualities} for name in known}
    seconds = dict.fromkeys(known, 0.0)
    for seed in range(draws):
        for quality in qualities:
            truth, medians, scale = draw(seed, quality)
            items, rng = work(truth), np.random.default_rng(seed)
            stock = np.mean([makespan(items, even(rng), table) for _ in range(4)])
            for name, make in known.items():
                begun = time.process_time()
                groups = make(medians, scale, np.random.default_rng(1000 + seed))
                seconds[name] += time.process_time() - begun
                ratios[name][quality].append(float(stock) / makespan(items, groups, table))
    print(f"{'price':<22}" + "".join(f"{f'quality {quality:g}':>14}" for quality in qualities) + f"{'ms a plan':>12}")
    told: dict[str, Any] = {}
    for name, found in ratios.items():
        middle = {f"{quality:g}": float(np.median(one)) for quality, one in found.items()}
        told[name] = {"ratio": middle, "ms": 1e3 * seconds[name] / draws / len(qualities)}
        print(f"{name:<22}" + "".join(f"{one:>14.3f}" for one in middle.values()) + f"{told[name]['ms']:>12.1f}")
    if args.json:
        save(args.json, {"kind": "simulated", "draws": draws, "prices": told})


def even(rng: np.random.Generator) -> Groups:
    """Stock: equal counts, at random."""
    shuffled = rng.permutation(TRAJECTORIES)
    return [shuffled[number::REPLICAS].tolist() for number in range(REPLICAS)]


def makespan(items: Any, groups: Groups, table: Degree) -> float:
    """Of the true lengths."""
    return max(price(items, list(group), table, Cost.STAIRCASE) for group in groups)


if __name__ == "__main__":
    main()
