"""Where KV is short: stock, peers' rules, and heddle's resident sets on the same steps, also with true lengths; all simulated.

python bench/residents/run.py               all cells and draws; writes bench/results/simulated/residents.json and the README's table
python bench/residents/run.py --quick       one cell, one draw, a quarter of the trajectories: does it run?
python bench/residents/run.py --table       only write the README's table again
"""

from __future__ import annotations

import sys
from pathlib import Path
from random import Random
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "bench" / "regimes")]

from cells import GPU, GPUS, SLOTS, Cell, draw

from bench.cellwise import Bench
from verl_heddle.options import Options
from verl_heddle.orchestrator import Orchestrator
from verl_heddle.report.draws import Draw
from verl_heddle.report.play import bound, play
from verl_heddle.report.rules import RULES
from verl_heddle.report.setting import Setting, setting
from verl_heddle.schedule.residents import Residents
from verl_heddle.simulate import Result, simulate
from verl_heddle.trajectory import TrajectoryId

CELLS = {
    "32B tp4, 256 per GPU, no tools": (Cell("Qwen3-32B", 256, 0.9, 0.0), 4),
    "32B tp2, 128, no tools": (Cell("Qwen3-32B", 128, 0.9, 0.0), 2),
    "8B tp1, 128, no tools, sigma 0.5": (Cell("Qwen3-8B", 128, 0.5, 0.0), 1),
    "32B tp4, 256, tools 30 %": (Cell("Qwen3-32B", 256, 0.9, 0.3), 4),
    "32B tp2, 128, tools 30 %": (Cell("Qwen3-32B", 128, 0.9, 0.3), 2),
    "30B-A3B tp2, 256, tools 30 %, sigma 1.3": (Cell("Qwen3-30B-A3B", 256, 1.3, 0.3), 2),
    "14B tp1, 128, tools 30 %, sigma 1.3": (Cell("Qwen3-14B", 128, 1.3, 0.3), 1),
    "8B tp1, 256, tools 30 %": (Cell("Qwen3-8B", 256, 0.9, 0.3), 1),
    "32B tp2, 128, tools 60 %": (Cell("Qwen3-32B", 128, 0.9, 0.6), 2),
}
"""Cells of the regime map in which contexts want more KV than there is, each at a tensor-parallel degree that people use; sigma 0.9 unless
said."""

ARMS = (
    *("heddle_longest", "trajectory_fcfs", "thunder_agent", "continuum", "wave_admission", "lfs", "uniboost"),
    *("stock_tier", "heddle_tier", "heddle"),
)
KNOWN = "known"
"""Resident sets whose order is by true length, longest first."""

SEEDS = (0, 1, 2)


def measured(name: str, cell: Cell, tp: int, seed: int) -> dict[str, Any]:
    """One step under every arm: makespans in seconds, and tokens that were read again."""
    where = setting(cell.model, GPU, GPUS, tp, SLOTS, cell.utilization)
    one = draw(cell, where, seed)
    row: dict[str, Any] = {"cell": name, "seed": seed, "bound_s": bound(where, one)[0].makespan_s, "arms": {}}
    for arm in ("stock", *ARMS, KNOWN):
        result = known(tp, where, one) if arm == KNOWN else play(arm, tp, where, one)[0]
        again = sum(replica.recomputed_tokens for replica in result.replicas)
        row["arms"][arm] = {"makespan_s": result.makespan_s, "read_again_tokens": again}
    return row


def known(tp: int, where: Setting, one: Draw) -> Result:
    """Heddle, but that the longest trajectory is admitted first, by true lengths."""
    policy, step = Orchestrator(Options(seed=one.seed), cap_tokens=one.cap_tokens), len(one.before)
    tokens = {TrajectoryId(item.prompt_id, f"{step}:{item.prompt_id}", item.trial, step).key: item.output_tokens for item in one.steps[0]}
    policy.residents = Residents(lambda live: -tokens[live.key], Random(one.seed))
    policy.step_times_known(where.latency)
    return simulate(one.steps[0], where.fleet(tp), where.latency, policy, engine=where.engine("priority"), step=step)


def table(result: dict[str, Any]) -> str:
    """Speedups over stock by draw, and millions of tokens read again in the first draw."""
    titles = [*(RULES[arm].title for arm in ARMS), "heddle, true lengths: longest first"]
    lines = ["| cell | stock / bound | " + " | ".join(titles) + " |", "|---|---|" + "---|" * len(titles)]
    for name in dict.fromkeys(row["cell"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["cell"] == name]
        stock = [row["arms"]["stock"]["makespan_s"] for row in rows]
        cells = [" ".join(f"{one / row['bound_s']:.2f}" for one, row in zip(stock, rows, strict=True)) + f" ({_again(rows[0], 'stock')})"]
        for arm in (*ARMS, KNOWN):
            speedups = " ".join(f"{one / row['arms'][arm]['makespan_s']:.2f}" for one, row in zip(stock, rows, strict=True))
            cells.append(f"{speedups} ({_again(rows[0], arm)})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _again(row: dict[str, Any], arm: str) -> str:
    return f"{row['arms'][arm]['read_again_tokens'] / 1e6:.0f} M"


def quick() -> dict[str, Any]:
    """One cell, one draw, a quarter of the trajectories."""
    return measured("quick", Cell("Qwen3-8B", 64, 0.9, 0.3), 1, 0)


BENCH = Bench(
    "residents", Path(__file__).with_name("README.md"), CELLS, SEEDS, {"gpu": GPU, "gpus": GPUS, "slots": SLOTS}, measured, table, quick
)

if __name__ == "__main__":
    BENCH.main(__doc__)
