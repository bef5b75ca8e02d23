"""The plugin with planned placement, its predictor taught by one epoch, and as released, against stock verl on the same fleet.

    python bench/placement/beside.py               # about two minutes on one core; a line of JSON per cell, then all of them together

Cells of bench/regimes: coding workload, Qwen3-8B on 8 H200. Ratios are stock's makespan over the arm's, by draw. All simulated.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import product
from pathlib import Path
from statistics import fmean

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from bench.regimes.cells import GPU, GPUS, SLOTS, Cell, draw
from verl_heddle.report.draws import Source
from verl_heddle.report.setting import setting
from verl_heddle.report.study import study

TPS, CONCURRENCY, TOOL_SHARES, SIGMA, DRAWS = (1, 4), (16, 64), (0.0, 0.3), 0.9, 3
ARMS = ("heddle", "heddle_place")


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    every: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for tp, concurrency, share in product(TPS, CONCURRENCY, TOOL_SHARES):
        cell = Cell("Qwen3-8B", concurrency, SIGMA, share)
        where = setting(cell.model, GPU, GPUS, tp, SLOTS, cell.utilization)
        draws = tuple(draw(cell, where, seed) for seed in range(DRAWS))
        rows = study(where, Source("beside", draws, {"steps": 1}), ARMS, jobs=1).rows
        made = {arm: [round(ratio, 3) for ratio in rows[arm].speedups] for arm in ARMS}
        print(json.dumps({"tp": tp, "per_gpu": concurrency, "tool_share": share, **made}), flush=True)
        for arm in ARMS:
            every[arm] += rows[arm].speedups
    told = {arm: {"least": min(of), "most": max(of), "mean": fmean(of), "slower": sum(x < 0.999 for x in of)} for arm, of in every.items()}
    print(json.dumps(told))


if __name__ == "__main__":
    main()
