"""What does preemption on arrival buy? One real vLLM replica on CPU, few slots, heavy-tailed steps replayed under three schedulers.

    python bench/schedule/run.py             every workload, five pairs; about 15 minutes; writes bench/results/cpu/schedule.json
    python bench/schedule/run.py --quick     one workload, one pair; prints only

What a pair is stands in pairs.py; the order of the arms is turned by one with every seed. The figure is the ratio of makespans, stock / arm
(above 1: faster than stock), its median over the pairs, all pairs shown. Beside it the simulator's forecast of the same runs, its latencies
fitted to runs of stock scheduling under other seeds.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from bench.fidelity.model import make_model
from bench.fidelity.replay import Engines
from bench.fidelity.server import EngineArguments
from bench.provenance import save
from bench.schedule import work
from bench.schedule.pairs import calm, facts, makespan, outside_s, summary, tell, turned, write_table
from verl_heddle.fleet import Replica
from verl_heddle.latency import LatencyModel, calibrate
from verl_heddle.orchestrator import Orchestrator
from verl_heddle.simulate import simulate
from verl_heddle.trajectory import Trajectory

RESULT = ROOT / "bench/results/cpu/schedule.json"
README = Path(__file__).parent / "README.md"
CALIBRATION_SEED = 1000
REPLICA = "replica_0"
VERSUS = (("stock", "priority"), ("stock", "heddle"), ("priority", "heddle"))


class Bench:
    """The engine, and how many steps it has seen."""

    def __init__(self, engines: Engines) -> None:
        self.engines = engines
        self.steps = 0

    def replay(self, arm: str, items: list[Trajectory], seed: int, slots: int = work.SLOTS) -> list[Trajectory]:
        """One step under one arm."""
        self.steps += 1
        return self.engines.replay(items, work.options(arm, seed), slots, work.ARMS[arm], work.known(arm, items), step=self.steps)

    def learn(self) -> tuple[LatencyModel, float]:
        """Latencies and the seconds a turn spends outside of the engine, from two steps of stock scheduling."""
        self.replay("stock", work.items("agentic", CALIBRATION_SEED)[:8], 0)  # warm-up
        records = self.replay("stock", work.items("agentic", CALIBRATION_SEED + 1), 0, work.MAX_SLOTS)
        records += self.replay("stock", work.items("long_turns", CALIBRATION_SEED + 2), 0)
        return calibrate(records), outside_s(records)

    def pair(self, workload: str, seed: int, latency: LatencyModel, overhead_s: float) -> dict[str, Any]:
        """One seed under every arm: seconds real and forecast, preemptions, disturbance."""
        items = work.items(workload, seed)
        row: dict[str, Any] = {"seed": seed, "makespan_s": {}, "forecast_s": {}, "preemptions": {}, "disturbed": {}}
        for arm in turned(list(work.ARMS), seed):
            records, row["disturbed"][arm] = calm(lambda arm=arm: self.replay(arm, items, seed))
            row["makespan_s"][arm] = makespan(records)
            row["preemptions"][arm] = sum(turn.preemptions or 0 for item in records for turn in item.steps)
            policy = Orchestrator(work.options(arm, seed))
            for end in work.known(arm, items):
                policy.trajectory_ended(end, 0.0)
            fleet = [Replica(REPLICA, slots=work.SLOTS)]
            row["forecast_s"][arm] = simulate(items, fleet, latency, policy, engine=work.engine(arm, overhead_s)).makespan_s
        return row


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one workload, one pair")
    parser.add_argument("--pairs", type=int, default=5, help="pairs of each workload (5)")
    parser.add_argument("--workloads", nargs="+", choices=list(work.WORKLOADS), default=list(work.WORKLOADS))
    parser.add_argument("--model", type=Path, default=ROOT / "outputs/bench_model", help="folder of the random model, made if missing")
    parser.add_argument("--out", type=Path, help="JSON to write (bench/results/cpu/schedule.json; with --quick: none)")
    args = parser.parse_args(argv)
    names, pairs = (args.workloads[:1], 1) if args.quick else (args.workloads, args.pairs)
    arguments = EngineArguments(
        str(make_model(args.model)),
        work.MAX_SLOTS,
        work.BATCH_TOKENS,
        block_size=work.BLOCK_TOKENS,
        scheduler_cls="bench.schedule.scheduler.SwitchedScheduler",
    )
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with Engines(arguments, cores=(0,)) as engines:
        bench = Bench(engines)
        latency, overhead_s = bench.learn()
        for seed in range(pairs):
            for name in names:
                row = bench.pair(name, seed, latency, overhead_s)
                rows[name].append(row)
                print(name, seed, {arm: round(seconds, 2) for arm, seconds in row["makespan_s"].items()}, row["preemptions"], flush=True)
                print("   disturbed", {arm: round(share, 2) for arm, share in row["disturbed"].items()}, flush=True)
    told = {name: summary(made, VERSUS) for name, made in rows.items()}
    result = facts("the engine bound to one", slots=work.SLOTS) | {
        "workloads": {name: {"ratios": told[name], "pairs": made} for name, made in rows.items()}
    }
    for name, one in told.items():
        tell(name, one)
    out = args.out or (None if args.quick else RESULT)
    if out is not None:
        save(out, result)
        if out == RESULT:
            write_table(README, told)


if __name__ == "__main__":
    main()
