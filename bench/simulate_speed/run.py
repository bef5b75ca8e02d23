"""How fast is the simulator, how much memory does it take, does its cost grow linearly? Prints a table, writes JSON.

    python bench/simulate_speed/run.py                  # everything, about 5 minutes
    python bench/simulate_speed/run.py --most-gpus 64   # the first row only

Every row is a fresh process on one core: 100 trajectories of about 12 turns per GPU (workload "coding"; the last row 98), Qwen3-8B on
H200 at tp 1 with its true KV capacity. Times are CPU seconds, so that a busy machine does not matter; wall seconds beside them.
"stock" is the orchestrator under verl's rules, "heddle" the same with prediction, priorities and their refresh, whose own cost is included.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from bench.provenance import save

RESULTS = ROOT / "bench" / "results" / "simulated" / "speed.json"
GPUS = (16, 64, 256, 1024)
TRAJECTORIES_PER_GPU = 100
LIMITS = {64: (8.0, 1024.0), 1024: (240.0, None)}
"""CPU seconds and peak MiB allowed, by GPUs: the project's targets."""


def measure(gpus: int, policy_name: str) -> dict[str, Any]:
    """One row, in this process."""
    from verl_heddle.latency import load
    from verl_heddle.options import Options
    from verl_heddle.orchestrator import Orchestrator
    from verl_heddle.simulate import EngineOptions, make_fleet, simulate
    from verl_heddle.traces import generate

    number = min(TRAJECTORIES_PER_GPU * gpus, 100_000)
    begun = time.process_time()
    work = generate("coding", -(-number // 16), 16, seed=1, median_turns=10.5)[:number]
    generate_s = time.process_time() - begun
    latency = load("h200", "Qwen3-8B")
    fleet = make_fleet(gpus, 1, latency)
    policy = Orchestrator(Options(observe=policy_name == "stock"))
    engine = EngineOptions("fcfs" if policy_name == "stock" else "priority")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    wall, cpu = time.perf_counter(), time.process_time()
    result = simulate(work, fleet, latency, policy, engine=engine)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    turns = len(result.turns)
    return {
        "policy": policy_name,
        "gpus": gpus,
        "trajectories": len(work),
        "turns": turns,
        "turns_per_trajectory": turns / len(work),
        "generate_s": generate_s,
        "cpu_s": cpu,
        "wall_s": wall,
        "us_per_turn": cpu / turns * 1e6,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "input_mib": before,
        "makespan_s": result.makespan_s,
        "preemptions": result.preemptions,
        "limit": LIMITS.get(gpus),
    }


def main() -> int:
    """Run every row in its own process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most-gpus", type=int, default=max(GPUS))
    parser.add_argument("--policies", default="stock,heddle")
    parser.add_argument("--json", type=Path, default=RESULTS, help="write the rows here (bench/results/simulated/speed.json)")
    parser.add_argument("--row", nargs=2, metavar=("GPUS", "POLICY"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        print(json.dumps(measure(int(args.row[0]), args.row[1])))
        return 0
    rows, worst = [], 0
    print(f"{'policy':<16}{'GPUs':>6}{'traj.':>9}{'turns':>10}{'CPU s':>9}{'wall s':>9}{'us/turn':>9}{'MiB':>8}  limit")
    for policy in args.policies.split(","):
        for gpus in GPUS:
            if gpus > args.most_gpus:
                continue
            command = [sys.executable, __file__, "--row", str(gpus), policy]
            row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            rows.append(row)
            limit, verdict = row["limit"], ""
            if limit:
                good = row["cpu_s"] <= limit[0] and (limit[1] is None or row["peak_mib"] <= limit[1])
                worst |= not good
                verdict = f"{limit[0]:.0f} s" + (f", {limit[1]:.0f} MiB" if limit[1] else "") + (": met" if good else ": MISSED")
            print(
                f"{policy:<16}{gpus:>6}{row['trajectories']:>9}{row['turns']:>10}{row['cpu_s']:>9.2f}{row['wall_s']:>9.2f}"
                f"{row['us_per_turn']:>9.1f}{row['peak_mib']:>8.0f}  {verdict}",
                flush=True,
            )
    save(args.json, rows)
    return int(worst)


if __name__ == "__main__":
    sys.exit(main())
