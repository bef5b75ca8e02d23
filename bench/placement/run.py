"""Placement alone at fixed tensor parallelism, against stock verl, at every quality of prediction. All simulated.

    python bench/placement/run.py --quick                          # two regimes, one step each, under a minute
    python bench/placement/run.py --traces FOLDER --json FILE      # everything, about 20 minutes on one core
    python bench/placement/run.py --cases tools balrog             # names that contain one of these

Ratios are stock's makespan / the arm's, same step, same seed; above 1 the arm is faster. Each seed is a run of `--steps` steps with one
policy object, so that the planner's checks of itself take part. Quality = correlation of log predicted and log true length. Arms:

    plan      planned on distributions, told the batch ahead
    online    the same, every trajectory a surprise
    point     the ablation: the same planner, told the median as if it were certain
    liar      as plan; predicts with quality 0.57 and claims 0.95
    learned   as plan, with the plugin's own predictor after one epoch of the same prompts (generated regimes only)
    slime     every turn to the least loaded

Engines first come, first served, no priorities. Exit code 1 if `plan`, `online` or `learned` is more than 2 % slower than stock in the
median anywhere, or moves trajectories more than once in the mean.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from math import exp, log, sqrt
from pathlib import Path
from random import Random
from statistics import mean, median, stdev
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from bench.placement.cases import Case, regimes, select, traces
from bench.provenance import save
from verl_heddle.place.replan import Replanner
from verl_heddle.predict.predictor import Predictor, recall
from verl_heddle.report.setting import Setting
from verl_heddle.simulate import Policy, Result, lower_bound, simulate
from verl_heddle.simulate.baselines import Slime, Stock
from verl_heddle.simulate.foresight import Foresight
from verl_heddle.simulate.planned import Planned
from verl_heddle.trajectory import Trajectory

QUALITIES = (1.0, 0.95, 0.83, 0.71, 0.57, 0.0)
SOME = (1.0, 0.71, 0.0)
"""For the arms that are there for comparison."""

SLOWEST = 0.98
MOST_MOVES = 1.0
Forecaster = Callable[[list[Trajectory], int], Foresight]


class Arm:
    """A policy over the steps of one run; `play` simulates one."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    def play(self, step: list[Trajectory], number: int, where: Setting, seed: int) -> Result:
        return simulate(step, where.fleet(where.tp), where.latency, self.policy, engine=where.engine("fcfs"), step=number)


class PlannedArm(Arm):
    """The planner with a forecaster made for each step; `ahead`: it is told the batch before."""

    def __init__(self, case: Case, seed: int, forecaster: Forecaster, ahead: bool = True) -> None:
        self._forecaster, self._ahead = forecaster, ahead
        self._planner = Replanner(case.where.latency, Random(seed), cap_tokens=case.cap_tokens)
        self._made: Planned | None = None

    def play(self, step: list[Trajectory], number: int, where: Setting, seed: int) -> Result:
        foresight = self._forecaster(step, seed)
        if self._made is None:
            self._made = Planned(self._planner, foresight)
        self._made.predictor = foresight
        self.policy = self._made
        if self._ahead:
            self._made.replicas_added(where.fleet(where.tp))
            self._made.announce(step, number)
        return super().play(step, number, where, seed)


class LearnedArm(Arm):
    """The planner with the plugin's predictor, which has seen another epoch."""

    def __init__(self, case: Case, seed: int, before: list[list[Trajectory]]) -> None:
        predictor = Predictor(case.cap_tokens)
        for number, step in enumerate(before):
            recall(predictor, step, number)
        predictor.adopt(predictor.fit_job().run())
        self._made = Planned(Replanner(case.where.latency, Random(seed), cap_tokens=case.cap_tokens), predictor)
        super().__init__(self._made)

    def play(self, step: list[Trajectory], number: int, where: Setting, seed: int) -> Result:
        self._made.replicas_added(where.fleet(where.tp))
        self._made.announce(step, number)
        return super().play(step, number, where, seed)


def foresight(quality: float, claims: float | None = None, sure: bool = False) -> Forecaster:
    """Makes a forecaster of this quality."""
    return lambda step, seed: Foresight(step, quality, seed, claims, sure)


def measure(case: Case, seeds: int, steps: int) -> dict[str, Any]:
    """One case, every arm; JSON-ready."""
    where = case.where
    makers: dict[str, Callable[[int, list[list[Trajectory]]], Arm]] = {"slime": lambda seed, _: Arm(Slime(seed))}
    for quality in QUALITIES:
        makers[f"plan {quality:g}"] = lambda seed, _, q=quality: PlannedArm(case, seed, foresight(q))
    for quality in SOME:
        makers[f"online {quality:g}"] = lambda seed, _, q=quality: PlannedArm(case, seed, foresight(q), ahead=False)
        makers[f"point {quality:g}"] = lambda seed, _, q=quality: PlannedArm(case, seed, foresight(q, sure=True))
    makers["liar"] = lambda seed, _: PlannedArm(case, seed, foresight(0.57, 0.95))
    makers["learned"] = lambda seed, before: LearnedArm(case, seed, before)
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in ("stock", *makers)}
    for seed in range(seeds):
        draws = [case.draw(1000 * seed + number) for number in range(steps)]
        stock, offset = Stock(seed), steps
        base, bounds = [], []
        for number, (step, _) in enumerate(draws):
            base.append(Arm(stock).play(step, offset + number, where, seed))
            bound = lower_bound(step, where.gpus, where.latency, [where.tp], slots=where.slots, kv_tokens=where.kv_tokens)
            bounds.append(bound.makespan_s)
            rows["stock"].append(row(base[-1], base[-1], bounds[-1]))
        for name, make in makers.items():
            before = [other for _, other in draws]
            if name == "learned" and not all(before):
                continue
            arm = make(seed, before)
            for number, (step, _) in enumerate(draws):
                result = arm.play(step, offset + number, where, 1000 * seed + number + 1)
                rows[name].append(row(result, base[number], bounds[number]))
    return {"case": case.name, "tp": where.tp, "runs": seeds * steps, "arms": {name: told(found) for name, found in rows.items() if found}}


def row(result: Result, stock: Result, bound_s: float) -> dict[str, float]:
    """One step under one arm."""
    return {
        "ratio": stock.makespan_s / result.makespan_s,
        "moves": result.migrations / len(result.source),
        "of_bound": bound_s / result.makespan_s,
    }


def told(rows: list[dict[str, float]]) -> dict[str, Any]:
    """Medians over seeds and steps; `mean` is geometric, `error` the standard error of its logarithm."""
    ratios = [one["ratio"] for one in rows]
    logs = [log(ratio) for ratio in ratios]
    return {
        "ratio": median(ratios),
        "mean": exp(mean(logs)),
        "error": stdev(logs) / sqrt(len(logs)) if len(logs) > 1 else None,
        "worst": min(ratios),
        "best": max(ratios),
        "moves": mean(one["moves"] for one in rows),
        "of_bound": median(one["of_bound"] for one in rows),
    }


def table(result: dict[str, Any]) -> str:
    """One case as text."""
    arms = result["arms"]
    lines = [f"{result['case']}: tp={result['tp']}, {result['runs']} steps; stock at {arms['stock']['of_bound']:.2f} of the lower bound"]
    for name, one in arms.items():
        if name != "stock":
            spread = f"{one['worst']:.2f}..{one['best']:.2f}; mean {one['mean']:.3f} +- {one['error'] or 0:.3f}"
            lines.append(f"    {name:<12}{one['ratio']:.3f}x  ({spread})  moves {one['moves']:.2f}  bound {one['of_bound']:.2f}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two regimes, one step each")
    parser.add_argument("--traces", type=Path, help="folder of open traces; what it lacks is skipped")
    parser.add_argument("--cases", nargs="+", default=[], help="only those whose name contains one of these words")
    parser.add_argument("--seeds", type=int, default=4, help="runs of each case (4)")
    parser.add_argument("--steps", type=int, default=2, help="steps of each run (2)")
    parser.add_argument("--json", type=Path, help="write the numbers here; cases that are in the file and not measured again stay")
    args = parser.parse_args(argv)
    cases = regimes() + (traces(args.traces) if args.traces else [])
    if args.quick:
        cases, args.seeds, args.steps = cases[:2], 1, 1
    results = {}
    if args.json and args.json.exists():
        results = {one["case"]: one for one in json.loads(args.json.read_text())["cases"]}
    bad = []
    for case in select(cases, args.cases):
        begun = time.process_time()
        found = results[case.name] = measure(case, args.seeds, args.steps)
        print(table(found), f"   ({time.process_time() - begun:.0f} s)", sep="\n", flush=True)
        for name, one in found["arms"].items():
            if name.startswith(("plan", "online", "learned")) and (one["ratio"] < SLOWEST or one["moves"] > MOST_MOVES):
                bad.append(f"{case.name}, {name}: {one['ratio']:.3f}x, {one['moves']:.2f} moves")
        if args.json:
            order = [case.name for case in cases]
            kept = sorted(results.values(), key=lambda one: order.index(one["case"]) if one["case"] in order else len(order))
            save(args.json, {"kind": "simulated", "cases": kept}, kept=True)
    for line in bad:
        print("MISSED", line)
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
