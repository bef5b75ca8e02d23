"""Where KV is short: stock, heddle as released, the peers' rules of admission and the resident set on the same steps, all simulated.

python bench/residents/run.py               all cells and draws; writes bench/results/simulated/residents.json and the README's table
python bench/residents/run.py --quick       one cell, one draw, a quarter of the trajectories: does it run?
python bench/residents/run.py --table       only write the README's table again
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "bench" / "regimes")]

from cells import GPU, GPUS, SLOTS, Cell, draw

from bench.marked import fill
from bench.provenance import save
from verl_heddle.report.play import RULES, bound, play
from verl_heddle.report.setting import setting

README, RESULTS = Path(__file__).with_name("README.md"), ROOT / "bench" / "results" / "simulated" / "residents.json"

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

ARMS = ("heddle", "trajectory_fcfs", "stock_tier", "thunder_agent", "continuum", "residents")
SEEDS = (0, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small cell, nothing is written")
    parser.add_argument("--table", action="store_true", help="write the README's table from the results that are there")
    arguments = parser.parse_args()
    if arguments.quick:
        cell = Cell("Qwen3-8B", 64, 0.9, 0.3)
        print(json.dumps(measured("quick", cell, 1, 0), indent=1))
        return
    if not arguments.table:
        save(RESULTS, simulated())
    fill(README, "residents", table(json.loads(RESULTS.read_text())))
    print(f"wrote {README.relative_to(ROOT)}", file=sys.stderr)


def simulated() -> dict[str, Any]:
    """All cells and draws."""
    rows, begun = [], time.monotonic()
    for name, (cell, tp) in CELLS.items():
        rows += [measured(name, cell, tp, seed) for seed in SEEDS]
        print(f"{len(rows)} of {len(CELLS) * len(SEEDS)} steps, {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
    return {"kind": "simulated", "gpu": GPU, "gpus": GPUS, "slots": SLOTS, "rows": rows}


def measured(name: str, cell: Cell, tp: int, seed: int) -> dict[str, Any]:
    """One step under every arm: makespans in seconds, and tokens that were read again."""
    where = setting(cell.model, GPU, GPUS, tp, SLOTS, cell.utilization)
    one = draw(cell, where, seed)
    row: dict[str, Any] = {"cell": name, "seed": seed, "bound_s": bound(where, one)[0].makespan_s, "arms": {}}
    for arm in ("stock", *ARMS):
        (result,) = play(arm, tp, where, one)
        again = sum(replica.recomputed_tokens for replica in result.replicas)
        row["arms"][arm] = {"makespan_s": result.makespan_s, "read_again_tokens": again}
    return row


def table(result: dict[str, Any]) -> str:
    """Speedups over stock by draw, and millions of tokens read again in the first draw."""
    lines = ["| cell | stock / bound | " + " | ".join(RULES[arm].title for arm in ARMS) + " |", "|---|---|" + "---|" * len(ARMS)]
    for name in dict.fromkeys(row["cell"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["cell"] == name]
        stock = [row["arms"]["stock"]["makespan_s"] for row in rows]
        cells = [" ".join(f"{one / row['bound_s']:.2f}" for one, row in zip(stock, rows, strict=True)) + f" ({_again(rows[0], 'stock')})"]
        for arm in ARMS:
            speedups = " ".join(f"{one / row['arms'][arm]['makespan_s']:.2f}" for one, row in zip(stock, rows, strict=True))
            cells.append(f"{speedups} ({_again(rows[0], arm)})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _again(row: dict[str, Any], arm: str) -> str:
    return f"{row['arms'][arm]['read_again_tokens'] / 1e6:.0f} M"


if __name__ == "__main__":
    main()
