"""What does planned placement buy on real engines? Two or three vLLM replicas on CPU, skewed steps replayed, heddle against stock.

    python bench/placement/real.py                  two replicas, five pairs, about 8 minutes; writes bench/results/cpu/placement.json
    python bench/placement/real.py --replicas 3     three replicas, which share the cores of a machine that has two
    python bench/placement/real.py --quick          one pair; prints only

Arms: `stock` is verl's rule; `place` is the planner with the batch announced ahead, prompts' lengths known from one earlier visit, step
times calibrated on other runs, contexts pre-warmed where a trajectory moves. Engines run first come, first served in both, and nothing has
a priority, so it is placement alone. What a pair is stands in bench/schedule/pairs.py. Beside the real ratio the simulator's forecast of
the same runs. Above 1: faster than stock.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
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
from verl_heddle.options import Admission, Options, Place, Priority
from verl_heddle.orchestrator import Orchestrator
from verl_heddle.report.attribution import step_metrics
from verl_heddle.simulate import EngineOptions, simulate
from verl_heddle.traces import generate
from verl_heddle.trajectory import Trajectory

RESULT = ROOT / "bench/results/cpu/placement.json"
README = Path(__file__).parent / "README.md"
SLOTS, PER_REPLICA = 16, 24
"""Slots of a replica, and trajectories of a step for each replica: some wait, as in a rollout with many per GPU."""

SKEWED = replace(
    work.WORKLOADS["agentic"],
    name="skewed",
    median_tokens=100.0,
    prompt_sigma=1.3,
    median_turns=3.0,
    turns_per_length=0.4,
    tool_mean_s=0.1,
)
"""Half of the trajectories have below 100 tokens and one in twenty has more than 1,000; chosen by its forecast, before any real run."""

CALIBRATION_SEED = 1000
ARMS = ("stock", "place")
VERSUS = (("stock", "place"),)


def items(seed: int, replicas: int) -> list[Trajectory]:
    """The trajectories of one step, in order of submission."""
    return generate(SKEWED, PER_REPLICA * replicas, 1, seed)


def options(arm: str, seed: int) -> Options:
    """The plugin's settings."""
    if arm == "stock":
        return Options(observe=True, seed=seed)
    return Options(seed=seed, place=Place(enable=True), priority=Priority(enable=False), admission=Admission(per_slot=0))


class Bench:
    """The engines, and what has been learnt of them."""

    def __init__(self, engines: Engines, replicas: int) -> None:
        self.engines, self.replicas, self.steps = engines, replicas, 0
        self.latency: LatencyModel | None = None
        self.overhead_s = 0.0

    def replay(self, arm: str, step: list[Trajectory], seed: int) -> list[Trajectory]:
        """One step under one arm."""
        self.steps += 1
        times = self.latency if arm == "place" else None
        known = work.known(arm, step)
        return self.engines.replay(step, options(arm, seed), SLOTS, "fcfs", known, step=self.steps, step_times=times)

    def learn(self) -> None:
        """Latencies and the seconds a turn spends outside of the engine, from two steps of stock verl."""
        self.replay("stock", items(CALIBRATION_SEED, self.replicas)[:8], 0)  # warm-up
        records = [record for more in (1, 2) for record in self.replay("stock", items(CALIBRATION_SEED + more, self.replicas), 0)]
        self.latency, self.overhead_s = calibrate(records), outside_s(records)

    def forecast(self, arm: str, step: list[Trajectory], seed: int) -> tuple[float, int]:
        """Makespan and moves in the simulator."""
        assert self.latency is not None
        policy = Orchestrator(options(arm, seed))
        for end in work.known(arm, step):
            policy.trajectory_ended(end, 0.0)
        policy.step_times_known(self.latency)
        fleet = [Replica(f"replica_{number}", slots=SLOTS) for number in range(self.replicas)]
        engine = EngineOptions("fcfs", batch_tokens=work.BATCH_TOKENS, block_tokens=work.BLOCK_TOKENS, turn_overhead_s=self.overhead_s)
        result = simulate(step, fleet, self.latency, policy, engine=engine)
        return result.makespan_s, result.migrations

    def pair(self, seed: int) -> dict[str, Any]:
        """One seed under every arm: seconds real and forecast, moves, disturbance."""
        step = items(seed, self.replicas)
        row: dict[str, Any] = {"seed": seed, "makespan_s": {}, "forecast_s": {}, "moves": {}, "forecast_moves": {}, "disturbed": {}}
        for arm in turned(ARMS, seed):
            records, row["disturbed"][arm] = calm(lambda arm=arm: self.replay(arm, step, seed))
            row["makespan_s"][arm] = makespan(records)
            row["moves"][arm] = int(step_metrics(records)["moves"])
            row["forecast_s"][arm], row["forecast_moves"][arm] = self.forecast(arm, step, seed)
        return row


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one pair; nothing written")
    parser.add_argument("--pairs", type=int, default=5, help="pairs (5)")
    parser.add_argument("--first", type=int, default=0, help="first seed (0); pairs of other seeds that are in the JSON stay")
    parser.add_argument("--replicas", type=int, default=2, choices=(2, 3), help="engines (2)")
    parser.add_argument("--model", type=Path, default=ROOT / "outputs/bench_model", help="folder of the random model, made if missing")
    parser.add_argument("--out", type=Path, default=RESULT, help="JSON to write; what is in it of other numbers of replicas stays")
    args = parser.parse_args(argv)
    arguments = EngineArguments(str(make_model(args.model)), SLOTS, work.BATCH_TOKENS, block_size=work.BLOCK_TOKENS)
    name, rows = f"skewed, {args.replicas} replicas", []
    with Engines(arguments, cores=(0, 1) if args.replicas == 2 else (None, None, None)) as engines:
        bench = Bench(engines, args.replicas)
        bench.learn()
        for seed in range(args.first, args.first + (1 if args.quick else args.pairs)):
            rows.append(bench.pair(seed))
            print(json.dumps(rows[-1]), flush=True)
            if not args.quick:
                store(args.out, name, rows, args.replicas)
    tell(name, summary(rows, VERSUS))


def store(out: Path, name: str, rows: list[dict[str, Any]], replicas: int) -> None:
    """After every pair, so that nothing is lost; on the page as well where it is the result."""
    kept = json.loads(out.read_text()) if out.exists() else {"workloads": {}}
    result = facts("engines on one core each" if replicas == 2 else "engines on any core", slots=SLOTS, per_replica=PER_REPLICA)
    seeds = {row["seed"] for row in rows}
    rows = [row for row in kept["workloads"].get(name, {"pairs": []})["pairs"] if row["seed"] not in seeds] + rows
    told = {"date": result["date"], "ratios": summary(rows, VERSUS), "pairs": rows}
    result["workloads"] = kept["workloads"] | {name: told}
    save(out, result, kept=True)
    if out == RESULT:
        write_table(README, {name: one["ratios"] for name, one in result["workloads"].items()})


if __name__ == "__main__":
    main()
