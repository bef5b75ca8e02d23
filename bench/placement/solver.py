"""How fast is the placement solver, and is it ever worse than Heddle's annealing? Prints a table; --json FILE writes the rows.

    python bench/placement/solver.py             # sizes, 200 random instances, the paper's size; under a minute
    python bench/placement/solver.py --quick     # small sizes, 20 instances

Lengths are log-normal (sigma 0.9, median 5,000 tokens), times those of Qwen3-8B on H200 at tp 1, 2, 4, 8. CPU seconds of one core, best of
three. Exit code 1 if a target is missed.
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from bench.placement.heddle import anneal, presorted_dp
from bench.provenance import save
from verl_heddle.fleet import Replica
from verl_heddle.latency import load
from verl_heddle.place.cost import Cost, Degree, Floats, work
from verl_heddle.place.exact import solve
from verl_heddle.place.pace import Habit, degree

TPS = (1, 2, 4, 8)
HABIT = Habit(context_tokens=8192.0)
SIZES = ((6_400, 64, 0.010), (100_000, 1_024, 1.0))
"""Trajectories, GPUs, seconds allowed under the cost `longest`."""

INSTANCES = 200
SAME = 1 + 1e-9


def lengths(count: int, seed: int) -> Floats:
    """Tokens, longest first."""
    return np.sort(np.minimum(np.exp(np.random.default_rng(seed).normal(np.log(5000), 0.9, count)), 40_960))[::-1].copy()


def degrees(most: int, slots: int = 4096) -> list[Degree]:
    """Up to `most` trajectories on a replica."""
    latency = load("H200", "Qwen3-8B")
    return [degree(latency, Replica("r", tp, slots), most, HABIT) for tp in TPS]


def cpu_s(what: Any, times: int = 3) -> float:
    """Least CPU seconds of a call."""
    least = np.inf
    for _ in range(times):
        begun = time.process_time()
        what()
        least = min(least, time.process_time() - begun)
    return least


def sizes(quick: bool) -> list[dict[str, Any]]:
    """Times by size and cost, with and without tools."""
    rows = []
    for count, gpus, limit in SIZES[:1] if quick else SIZES:
        tables, tokens = degrees(1000), lengths(count, 1)
        tools = np.exp(np.random.default_rng(2).normal(2, 1, count))
        for cost, tool_s in ((Cost.LONGEST, 0.0), (Cost.LONGEST, tools), (Cost.STAIRCASE, 0.0)):
            items = work(tokens, tool_s)
            answer = solve(items, tables, gpus, cost)
            target = limit if cost is Cost.LONGEST and isinstance(tool_s, float) else None
            seconds = cpu_s(partial(solve, items, tables, gpus, cost))
            rows.append(
                {
                    "trajectories": count,
                    "gpus": gpus,
                    "cost": str(cost),
                    "tools": not isinstance(tool_s, float),
                    "cpu_s": seconds,
                    "probes": answer.probes,
                    "makespan_s": answer.makespan_s,
                    "gap": answer.makespan_s / answer.bound_s - 1,
                    "limit_s": target,
                    "met": target is None or seconds <= target,
                }
            )
    return rows


def against_annealing(instances: int) -> dict[str, Any]:
    """Random instances: 20 to 1,000 trajectories on 4 to 64 GPUs; each degree's times bent at random, so that none dominates."""
    ratio, own_s, their_s = [], 0.0, 0.0
    for seed in range(instances):
        rng = np.random.default_rng(seed)
        gpus, count = int(rng.choice([4, 8, 16, 32, 64])), int(rng.integers(20, 1001))
        tokens = lengths(count, seed)
        tables = [Degree(item.tp, item.tau[0] * (item.tau / item.tau[0]) ** rng.uniform(0.6, 1.4)) for item in degrees(count)]
        by_tp = {item.tp: item.tau for item in tables}
        begun = time.process_time()
        mine = solve(work(tokens), tables, gpus)
        own_s += time.process_time() - begun
        begun = time.process_time()
        theirs, _ = anneal(tokens, by_tp, gpus, Random(seed))
        their_s += time.process_time() - begun
        ratio.append(theirs / mine.makespan_s)
    found = np.array(ratio)
    return {
        "instances": instances,
        "worse": int((found < 1 / SAME).sum()),
        "equal": int((np.abs(found - 1) <= 1e-9).sum()),
        "annealing_over_exact": {"median": float(np.median(found)), "p90": float(np.quantile(found, 0.9)), "max": float(found.max())},
        "exact_ms": 1e3 * own_s / instances,
        "annealing_ms": 1e3 * their_s / instances,
    }


def papers_size() -> dict[str, Any]:
    """6,400 trajectories on 64 GPUs: one evaluation of the dynamic programme, and the annealing once."""
    tokens, tables = lengths(6400, 1), degrees(1000)
    by_tp = {item.tp: item.tau for item in tables}
    exact = solve(work(tokens), tables, 64).makespan_s
    one = cpu_s(lambda: presorted_dp(tokens, by_tp, (4,) * 16), 1)
    begun = time.process_time()
    found, layout = anneal(tokens, by_tp, 64, Random(0))
    return {"dp_s": one, "annealing_s": time.process_time() - begun, "annealing_over_exact": found / exact, "layout": layout}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, 20 instances")
    parser.add_argument("--json", type=Path, help="write the rows here")
    args = parser.parse_args(argv)
    result: dict[str, Any] = {"sizes": sizes(args.quick)}
    print(f"{'trajectories':>12}{'GPUs':>6}  {'cost':<10}{'tools':<6}{'ms':>9}{'probes':>8}{'gap':>10}  limit")
    for row in result["sizes"]:
        limit = "" if row["limit_s"] is None else f"{1e3 * row['limit_s']:.0f} ms: {'met' if row['met'] else 'MISSED'}"
        print(
            f"{row['trajectories']:>12}{row['gpus']:>6}  {row['cost']:<10}{'yes' if row['tools'] else 'no':<6}{1e3 * row['cpu_s']:>9.1f}"
            f"{row['probes']:>8}{row['gap']:>10.1e}  {limit}"
        )
    against = result["against_annealing"] = against_annealing(20 if args.quick else INSTANCES)
    told = against["annealing_over_exact"]
    print(
        f"{against['instances']} random instances: exact worse in {against['worse']}, equal in {against['equal']}; "
        f"annealing / exact makespan median {told['median']:.3f}, p90 {told['p90']:.3f}, max {told['max']:.3f}; "
        f"{against['exact_ms']:.1f} ms against {against['annealing_ms']:.0f} ms"
    )
    if not args.quick:
        size = result["papers_size"] = papers_size()
        print(
            f"6,400 on 64 GPUs: one dynamic programme {size['dp_s']:.2f} s, annealing {size['annealing_s']:.1f} s, "
            f"{size['annealing_over_exact']:.3f}x the exact makespan"
        )
    if args.json:
        save(args.json, result)
    return int(against["worse"] > 0 or not all(row["met"] for row in result["sizes"]))


if __name__ == "__main__":
    sys.exit(main())
