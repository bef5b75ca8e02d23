"""What choosing the layout is worth: against every layout, against fixed degrees, in time; and whether to regroup the tail inside a step.

    python bench/layout/run.py                     # about 5 minutes on one core; --quick: half a minute, nothing written

Simulated on the shipped step times of H200; nothing is run. Numbers go to bench/results/simulated/layout.json, tables to README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(name, "1")  # times are of one core

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from bench.layout import exhaustive, regimes, simulated
from bench.layout.times import times
from bench.marked import fill
from bench.provenance import save

RESULT = ROOT / "bench" / "results" / "simulated" / "layout.json"
PAGE = Path(__file__).with_name("README.md")
SAMPLES, SEEDS, GPUS = 200, 5, 64


def measure(quick: bool) -> dict[str, Any]:
    """All parts."""
    told: dict[str, Any] = {"kind": "simulated", "gpu": "h200"}
    told["exhaustive"] = exhaustive.against_all(10 if quick else SAMPLES)
    print("exhaustive search: done", file=sys.stderr)
    told["times"] = times(quick)
    print("times: done", file=sys.stderr)
    told["static"] = regimes.cells(16 if quick else GPUS, 1 if quick else SEEDS)
    print("static steps: done", file=sys.stderr)
    told["simulated"] = simulated.cells(quick)
    return told


def tables(told: dict[str, Any]) -> str:
    """The page's part."""
    parts = [
        "**Against every layout of 8 GPUs**, lengths known (8 to 1,600 trajectories, log-normal, sigma 0.5 to 1.3): makespan of the",
        "planner's layout over the best layout's, less 1.",
        "",
        "| | samples | median | 95 of 100 | worst | over 3 % | best layout is mixed |",
        "|---|---|---|---|---|---|---|",
    ]
    parts += [
        f"| {row['model']} | {row['samples']} | {row['median']:.1%} | {row['p95']:.1%} | {row['worst']:.1%} | {row['over_3_percent']} "
        f"| {row['best_is_mixed']:.0%} |"
        for row in told["exhaustive"]
    ]
    parts += ["", "**Time**, one core.", "", "| trajectories | GPUs | joint search | target | the whole choice |", "|---|---|---|---|---|"]
    parts += [
        f"| {row['trajectories']:,} | {row['gpus']:,} | {1e3 * row['search_s']:.0f} ms | {1e3 * row['target_s']:.0f} ms "
        f"| {1e3 * row['choice_s']:.0f} ms |"
        for row in told["times"]
    ]
    parts += [
        "",
        f"**Static steps**, {told['static'][0]['gpus']} GPUs, one turn, sigma 0.9: stock's makespan at its best degree over the arm's. "
        "`usual`: stock at the degree most run. `tail`: factor that an oracle's regrouping would add.",
        "",
        "| | per GPU | usual | best degree | planner, lengths known | planner, 0.71 | mixed whatever the forecast, known; 0.71 "
        "| 0.71 over usual | bound / best degree; planner known; 0.71 | tail: over best degree, planner 0.71; usual |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in told["static"]:
        known, guess = row["q1"], row["q0.71"]
        parts.append(
            f"| {row['model']} | {row['per_gpu']} | {1 / row['usual_over_best']:.2f} (tp {row['usual_tp']}) | tp {row['best_tp']} "
            f"| {known['planner']:.2f} ({known['layout']}) | {guess['planner']:.2f} ({guess['layout']}) "
            f"| {known['mixed']:.2f}; {guess['mixed']:.2f} | {guess['planner'] * row['usual_over_best']:.2f} "
            f"| {row['best_bound']:.2f}; {known['bound']:.2f}; {guess['bound']:.2f} "
            f"| {row['tail_over_best']:.2f}, {guess['tail']:.2f}; {row['tail_over_usual']:.2f} |"
        )
    parts += [
        "",
        f"**Event simulator**, {simulated.GPUS} GPUs, turns and tools, planned placement with moves, one draw each: stock's makespan "
        "at its best degree over the arm's.",
        "",
        "| | workload | per GPU | usual | best degree | planner, lengths known | planner, 0.71 "
        "| bound / best degree; planner known; 0.71 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in told["simulated"]:
        known, guess = row["q1"], row["q0.71"]
        parts.append(
            f"| {row['model']} | {row['workload']} | {row['per_gpu']} | {1 / row['usual_over_best']:.2f} (tp {row['usual_tp']}) "
            f"| tp {row['best_tp']} | {known['planner']:.2f} ({known['layout']}) | {guess['planner']:.2f} ({guess['layout']}) "
            f"| {row['best_bound']:.2f}; {known['bound']:.2f}; {guess['bound']:.2f} |"
        )
    return "\n".join(parts)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few samples; nothing is written")
    parser.add_argument("--table", action="store_true", help="only write the table anew from the stored numbers")
    args = parser.parse_args(argv)
    told = json.loads(RESULT.read_text()) if args.table else measure(args.quick)
    if not args.quick:
        if not args.table:
            save(RESULT, told)
        fill(PAGE, "layout", tables(told))
    print(tables(told))
    return 0


if __name__ == "__main__":
    sys.exit(main())
