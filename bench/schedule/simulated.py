"""What heddle is worth, simulated: the slot-limited places of the regime map, and the open traces.

    python bench/schedule/simulated.py            # about twenty minutes on one core; JSON and the table of bench/schedule/README.md
    python bench/schedule/simulated.py --check 4  # four rows again: do the results hold for the code of now?
    python bench/schedule/simulated.py --quick    # one small place and one trace, printed only

`stock`: first come, first served. `stock + tier`: the same with KV cache kept in the host's memory, read back at 25 GB/s per GPU, without
limit. `trajectory-FCFS`: the trajectory that came first. `plas`: least served first (Autellix). `thunder agent`: programs paused and
resumed. `heddle`: as released, resident sets. `longest`: `heddle.priority.order=longest`, longest predicted first with preemption on
arrival and the bound on turns in flight, the prediction learnt from one earlier epoch. `longest, true lengths`: the same with an oracle
for its predictor, all else alike.
Open traces are read from --traces, by default VERL_HEDDLE_TRACES or ../shared/traces; without them those rows are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import chain, repeat
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "bench" / "regimes")]

from cells import GPU, GPUS, SLOTS, Cell
from cells import draw as drawn

from bench.marked import fill
from bench.provenance import measured_again, save
from verl_heddle.options import Options
from verl_heddle.orchestrator import Orchestrator
from verl_heddle.predict.quantities import Estimate
from verl_heddle.report.draws import Draw, recorded
from verl_heddle.report.play import CrossFitted, engine_for, halves, teach
from verl_heddle.report.setting import Setting, setting
from verl_heddle.simulate import EngineOptions, HostTier, Policy, simulate
from verl_heddle.simulate.baselines import Plas, Stock, ThunderAgent, TrajectoryFcfs
from verl_heddle.traces import TraceError, trace_files
from verl_heddle.trajectory import ToolStart, Trajectory, TrajectoryEnd, TurnEnd, TurnStart

RESULT = ROOT / "bench" / "results" / "simulated" / "schedule.json"
README = Path(__file__).parent / "README.md"
SEEDS = (0, 1, 2)

PLACES = tuple(
    (Cell(model, concurrency, sigma, share), tp)
    for model, tp in (("Qwen3-8B", 1), ("Qwen3-32B", 2))
    for concurrency, sigma, share in ((256, 0.9, 0.0), (128, 0.9, 0.0), (256, 0.9, 0.3))
)
QUICK = ((Cell("Qwen3-8B", 4, 0.9, 0.0), 1),)
"""Where more trajectories want to run than slots or KV cache allow, at usual degrees; the whole map is bench/regimes."""

TRACE_SLOTS = (8, 32, 256)
"""Slots of each of two replicas of tp 4 (contexts reach 850,000 tokens) for the open traces, whose steps have 92 to 1,600 trajectories;
256 are verl's default."""


class Lengths:
    """A predictor that knows every trajectory: what is left of it, tokens and tool seconds."""

    def __init__(self, trajectories: Sequence[Trajectory]) -> None:
        self._of = {(item.prompt_id, item.trial): item for item in trajectories}
        self._live: dict[str, tuple[Trajectory, TurnStart]] = {}

    def turn_started(self, turn: TurnStart) -> None:
        """Who it is, and how far it has come."""
        self._live[turn.trajectory.key] = self._of[turn.trajectory.prompt, turn.trajectory.sample], turn

    def __contains__(self, key: str) -> bool:
        return key in self._live

    def predict(self, key: str) -> Estimate:
        """What is left."""
        item, turn = self._live[key]
        rest = item.steps[turn.turn :]
        tokens = float(item.output_tokens - turn.generated_tokens)
        return Estimate(tokens, tokens, float(len(rest)), sum(one.tool_latency_s or 0.0 for one in rest))

    def turn_finished(self, turn: TurnEnd) -> None:
        """Nothing to learn."""

    def tool_started(self, start: ToolStart) -> None:
        """Nothing to learn."""

    def trajectory_ended(self, end: TrajectoryEnd) -> None:
        """Nothing to learn."""


def knowing(draw: Draw) -> Policy:
    """Longest first with true lengths: the same gate, the same key, the same engines as `learned`, so that only the prediction differs."""
    options = Options.longest(seed=draw.seed)
    options.priority.refresh_s = 0.0  # what is known does not change
    policy = Orchestrator(options, cap_tokens=draw.cap_tokens)
    policy.predictor = Lengths(draw.steps[0])
    return policy


def learned(draw: Draw) -> Policy:
    """Longest first, taught one epoch; a trace's trajectories are never predicted from themselves."""
    policy = Orchestrator(Options.longest(seed=draw.seed), cap_tokens=draw.cap_tokens)
    teach(policy, draw)
    return CrossFitted(policy, halves(draw.steps)[0]) if draw.crossed else policy


def arms(draw: Draw, where: Setting) -> dict[str, tuple[Policy, EngineOptions]]:
    """Policy and engine of every arm, fresh."""
    fcfs, order = where.engine("fcfs"), where.engine("priority")
    predicting = engine_for(Options.longest(), where)
    seed = draw.seed
    heddle = Orchestrator(Options(seed=seed), cap_tokens=draw.cap_tokens)
    heddle.step_times_known(where.latency)
    return {
        "stock": (Stock(seed), fcfs),
        "stock + tier": (Stock(seed), replace(fcfs, tier=HostTier())),
        "trajectory-FCFS": (TrajectoryFcfs(seed), order),
        "plas": (Plas(seed), order),
        "thunder agent": (ThunderAgent(seed), fcfs),
        "heddle": (heddle, order),
        "longest": (learned(draw), predicting),
        "longest, true lengths": (knowing(draw), predicting),
    }


def play(draw: Draw, where: Setting, tp: int) -> dict[str, tuple[float, int]]:
    """Makespan and tokens read again of every arm."""
    told = {}
    for arm, (policy, engine) in arms(draw, where).items():
        result = simulate(draw.steps[0], where.fleet(tp), where.latency, policy, engine=engine, step=len(draw.before))
        told[arm] = result.makespan_s, sum(replica.recomputed_tokens for replica in result.replicas)
    return told


def measure(name: str, where: Setting, tp: int, draws: Sequence[Draw]) -> dict[str, Any]:
    """One row: stock's makespan over each arm's, median over the draws, with all of them; and recomputed tokens."""
    ratios: dict[str, list[float]] = {}
    recomputed: dict[str, list[int]] = {}
    with ProcessPoolExecutor(min(len(draws), os.cpu_count() or 1)) as pool:
        played = list(pool.map(play, draws, repeat(where), repeat(tp)))
    for one in played:
        stock_s = one["stock"][0]
        for arm, (makespan_s, again) in one.items():
            ratios.setdefault(arm, []).append(stock_s / makespan_s)
            recomputed.setdefault(arm, []).append(again)
    row = {"name": name, "tp": tp, "slots": where.slots, "trajectories": len(draws[0].steps[0]), "stock_s": stock_s}
    row |= {"speedup": {arm: median(values) for arm, values in ratios.items()}, "draws": ratios}
    row["recomputed_tokens"] = {arm: median(values) for arm, values in recomputed.items()}
    print(f"{name:34}", "  ".join(f"{arm} {value:.3f}" for arm, value in row["speedup"].items()), flush=True)
    return row


def once_more(row: dict[str, Any], folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The row measured anew."""
    return next(places(False, row["name"]) if row["kind"] == "generated" else traces(folder, False, row["name"]))


def places(quick: bool, only: str = "") -> Iterator[dict[str, Any]]:
    """The rows of the map, or `only` one."""
    for cell, tp in QUICK if quick else PLACES:
        name = f"{cell.model} tp {tp}, {cell.concurrency} per GPU, tools {cell.tool_share:.0%}"
        if only not in ("", name):
            continue
        where = setting(cell.model, GPU, GPUS, None, SLOTS, cell.utilization)
        draws = [drawn(cell, where, seed) for seed in SEEDS[: 1 if quick else 2]]
        yield measure(name, where, tp, draws) | {"kind": "generated"}


def traces(folder: str | os.PathLike[str], quick: bool, only: str = "") -> Iterator[dict[str, Any]]:
    """The open traces, on two replicas with few slots; or `only` one row."""
    try:
        files = sorted(trace_files(folder))
    except TraceError as error:
        print(f"open traces left out: {error}")
        return
    for file in files[:1] if quick else files:
        for slots in TRACE_SLOTS:
            name = f"{file.name.split('.')[0]}, {slots} slots"
            if only not in ("", name):
                continue
            where = setting("Qwen3-8B", GPU, 8, 4, slots)
            source = recorded(file, SEEDS)
            yield measure(name, where, 4, source.draws) | {"kind": "open trace"}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    names = list(rows[0]["speedup"])[1:]
    lines = ["| | trajectories | " + " | ".join(names) + " | tokens read again: stock, heddle, longest |"]
    lines.append("|---|---|" + "---|" * (len(names) + 1))
    for row in rows:
        again = " / ".join(f"{row['recomputed_tokens'][arm] / 1e6:.1f} M" for arm in ("stock", "heddle", "longest"))
        lines.append(
            f"| {row['name']} | {row['trajectories']} | " + " | ".join(f"{row['speedup'][n]:.2f}" for n in names) + f" | {again} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small place and one trace, printed only")
    parser.add_argument("--traces", default=os.environ.get("VERL_HEDDLE_TRACES", ROOT.parent / "shared" / "traces"))
    parser.add_argument("--check", type=int, metavar="N", help="measure N rows anew: are they what they were? Then the results still hold")
    args = parser.parse_args()
    if args.check:
        rows = json.loads(RESULT.read_text())["rows"]
        return measured_again(RESULT, rows, lambda row: once_more(row, args.traces), args.check)
    rows: list[dict[str, Any]] = []
    for row in chain(traces(args.traces, args.quick), places(args.quick)):
        rows.append(row)
        if not args.quick:  # after every row: the run takes long enough to be interrupted
            store(sorted(rows, key=lambda one: one["kind"]))


def store(rows: Sequence[dict[str, Any]]) -> None:
    """Write JSON and table."""
    save(RESULT, {"kind": "simulated", "rows": rows})
    fill(README, "simulated", table(rows))


if __name__ == "__main__":
    main()
