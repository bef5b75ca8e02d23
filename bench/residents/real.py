"""What do resident sets buy on real engines that are short of KV? Two vLLM replicas on CPU, heddle against stock and ThunderAgent's law.

    python bench/residents/real.py            two workloads, five pairs each, about 20 minutes; writes bench/results/cpu/residents.json
    python bench/residents/real.py --quick    one pair of the first; prints only

KV cache for a quarter of the contexts; trajectories of eight turns with a tool (a sleep) after each, replayed. Arms: `stock` is verl's
rule; `thunder` ThunderAgent's law in heddle's router, its check as much faster as the engines' turns are shorter; `heddle` as released.
Tokens read again are by vLLM's own count of what it found in its prefix cache. What a pair is stands in bench/schedule/pairs.py. Beside
the real ratio the simulator's forecast of the same runs, with step times calibrated on other runs. Above 1: faster than stock. Uses the
whole machine.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from bench.fidelity.model import make_model
from bench.fidelity.replay import Engines
from bench.fidelity.server import EngineArguments
from bench.marked import fill
from bench.provenance import save
from bench.residents.peers import PeerRouter, thunder_agent, under
from bench.schedule import work
from bench.schedule.pairs import calm, facts, makespan, outside_s, summary, tell, turned
from verl_heddle.fleet import Replica
from verl_heddle.latency import LatencyModel, calibrate
from verl_heddle.options import Options, Priority
from verl_heddle.orchestrator import Orchestrator
from verl_heddle.report.attribution import step_metrics
from verl_heddle.simulate import EngineOptions, simulate
from verl_heddle.simulate.workload import walk
from verl_heddle.traces import generate, replayable
from verl_heddle.trajectory import Trajectory
from verl_heddle.twin.judge import judge

RESULT = ROOT / "bench/results/cpu/residents.json"
README = Path(__file__).parent / "README.md"
SLOTS, TRAJECTORIES, REPLICAS = 24, 48, 2
KV_SHARE = 0.25
"""Of all contexts at their ends: what the KV cache of both replicas holds."""

SHORT = replace(
    work.WORKLOADS["agentic"],
    name="short tools",
    median_tokens=120.0,
    prompt_sigma=0.6,
    median_turns=8.0,
    input_tokens=250.0,
    max_input_tokens=400,
    prompt_tokens=300.0,
    cap_tokens=360,
    tool_mean_s=0.15,
)
"""Contexts to 3,700 tokens that grow by 250 a turn, and tools of a quarter of t*; chosen by its forecast, before any real run."""

WORKLOADS = {one.name: one for one in (SHORT, replace(SHORT, name="long tools", tool_mean_s=1.0))}
"""`long tools`: one and a half times t*, where by the forecast there is nothing to win."""

CALIBRATION_SEED = 1000
ARMS = ("stock", "thunder", "heddle")
VERSUS = (("stock", "thunder"), ("stock", "heddle"))
TWIN = {"stock": "heddle", "heddle": "stock"}
"""The arm that ran, and of which the twin tells."""


def options(arm: str, seed: int) -> Options:
    """The plugin's settings."""
    return Options(observe=arm == "stock", seed=seed, priority=Priority(enable=arm == "heddle"))


def kv_tokens(step: list[Trajectory]) -> int:
    """KV cache of a replica, in whole blocks; the longest context fits."""
    ends = [max(context + output for context, _, output in walk(replayable(item))) for item in step]
    wanted = max(KV_SHARE * sum(ends) / REPLICAS, max(ends) + work.BLOCK_TOKENS)
    return -(-round(wanted) // work.BLOCK_TOKENS) * work.BLOCK_TOKENS


class Bench:
    """The engines, and what has been learnt of them."""

    def __init__(self, engines: Engines) -> None:
        self.engines, self.steps = engines, 0
        self.latency: LatencyModel | None = None
        self.overhead_s = 0.0

    def replay(self, arm: str, step: list[Trajectory], seed: int, held: int | None) -> list[Trajectory]:
        """One step under one arm."""
        self.steps += 1
        order = "priority" if arm == "heddle" else "fcfs"
        return self.engines.replay(
            step, options(arm, seed), SLOTS, order, step=self.steps, kv_tokens=held, step_times=self.latency if arm == "heddle" else None
        )

    def learn(self) -> None:
        """Latencies and the seconds a turn spends outside of the engine, from a step of stock verl with KV cache for all."""
        self.replay("stock", generate(SHORT, 8, 1, CALIBRATION_SEED), 0, None)  # warm-up
        records = self.replay("stock", generate(SHORT, TRAJECTORIES, 1, CALIBRATION_SEED + 1), 0, None)
        self.latency, self.overhead_s = calibrate(records), outside_s(records)

    def forecast(self, arm: str, step: list[Trajectory], seed: int, held: int) -> tuple[float, int]:
        """Makespan and tokens read again in the simulator."""
        assert self.latency is not None
        policy = under(thunder_agent(seed), options(arm, seed)) if arm == "thunder" else Orchestrator(options(arm, seed))
        policy.step_times_known(self.latency)
        fleet = [Replica(f"replica_{number}", slots=SLOTS, kv_tokens=held) for number in range(REPLICAS)]
        order = "priority" if arm == "heddle" else "fcfs"
        engine = EngineOptions(order, batch_tokens=work.BATCH_TOKENS, block_tokens=work.BLOCK_TOKENS, turn_overhead_s=self.overhead_s)
        result = simulate(step, fleet, self.latency, policy, engine=engine)
        return result.makespan_s, sum(replica.recomputed_tokens for replica in result.replicas)

    def judged(self, arm: str, records: list[Trajectory], seed: int, held: int) -> dict[str, float]:
        """What the twin makes of this run, knowing nothing of the other."""
        order = "priority" if arm == "heddle" else "fcfs"
        engines = {"tp": 1, "slots": SLOTS, "replicas": REPLICAS, "kv_tokens": held, "order": order}
        return judge([replace(item, meta={**item.meta, **options(arm, seed).decisions(), **engines}) for item in records])

    def pair(self, workload: str, seed: int) -> dict[str, Any]:
        """One seed under every arm: seconds and tokens read again, real and forecast, and disturbance."""
        step = generate(WORKLOADS[workload], TRAJECTORIES, 1, seed)
        held = kv_tokens(step)
        row: dict[str, Any] = {"seed": seed, "kv_tokens": held, "makespan_s": {}, "forecast_s": {}, "again": {}, "forecast_again": {}}
        row["disturbed"], row["twin"] = {}, {}
        for arm in turned(ARMS, seed):
            records, row["disturbed"][arm] = calm(lambda arm=arm: self.replay(arm, step, seed, held))
            row["makespan_s"][arm] = makespan(records)
            row["again"][arm] = int(step_metrics(records)["read_again_tokens"])
            row["forecast_s"][arm], row["forecast_again"][arm] = self.forecast(arm, step, seed, held)
            if arm in TWIN:
                row["twin"][arm] = self.judged(arm, records, seed, held)
        return row


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one pair of the first workload; nothing written")
    parser.add_argument("--pairs", type=int, default=5, help="pairs of each workload (5)")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS), help="which (all); others in the JSON stay")
    parser.add_argument("--model", type=Path, default=ROOT / "outputs/bench_model", help="folder of the random model, made if missing")
    args = parser.parse_args(argv)
    arguments = EngineArguments(str(make_model(args.model)), SLOTS, work.BATCH_TOKENS, block_size=work.BLOCK_TOKENS)
    with Engines(arguments, router_class=PeerRouter) as engines:
        bench = Bench(engines)
        bench.learn()
        for workload in args.workloads[:1] if args.quick else args.workloads:
            rows: list[dict[str, Any]] = []
            for seed in range(1 if args.quick else args.pairs):
                rows.append(bench.pair(workload, seed))
                print(json.dumps(rows[-1]), flush=True)
                if not args.quick:
                    store(workload, rows)
            tell(workload, summary(rows, VERSUS))


def store(workload: str, rows: list[dict[str, Any]]) -> None:
    """After every pair, so that nothing is lost."""
    kept = json.loads(RESULT.read_text())["workloads"] if RESULT.exists() else {}
    result = facts("engines on one core each", slots=SLOTS, trajectories=TRAJECTORIES, kv_share=KV_SHARE)
    kept[workload] = {"date": result["date"], "ratios": summary(rows, VERSUS), "pairs": rows}
    save(RESULT, result | {"workloads": kept}, kept=True)
    fill(README, "real", table(kept))
    fill(README, "twin", twin_table(kept))


def table(workloads: dict[str, Any]) -> str:
    """Markdown: ratios of makespans, and thousands of tokens read again, real and forecast."""
    lines = ["| workload | arm | stock / arm | pairs | forecast | read again, k | forecast |", "|---|---|---|---|---|---|---|"]
    for name, told in workloads.items():
        for arm in ARMS:
            again, expected = (median(row[key][arm] for row in told["pairs"]) / 1000 for key in ("again", "forecast_again"))
            ratio = told["ratios"].get(f"stock/{arm}", {"median": 1.0, "pairs": [], "forecast_median": 1.0})
            shown = " ".join(f"{value:.2f}" for value in ratio["pairs"])
            lines.append(
                f"| {name} | {arm} | {ratio['median']:.2f} | {shown} | {ratio['forecast_median']:.2f} | {again:.0f} | {expected:.0f} |"
            )
    return "\n".join(lines)


def twin_table(workloads: dict[str, Any]) -> str:
    """Markdown: what the twin of one arm's run says the other takes, over what it took in the same pair."""
    lines = ["| workload | ran | told of | told / measured, by pair | error of the own run |", "|---|---|---|---|---|"]
    for name, told in workloads.items():
        rows = [row for row in told["pairs"] if row.get("twin")]
        for ran, other in TWIN.items():
            judged = [(row["twin"][ran], row["makespan_s"][other]) for row in rows]
            ratios = [f"{twin[f'{other}_s'] / took:.2f}" if f"{other}_s" in twin else "not judged" for twin, took in judged]
            errors = [f"{twin['error']:+.0%}" for twin, _ in judged]
            lines.append(f"| {name} | {ran} | {other} | {' '.join(ratios)} | {' '.join(errors)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
