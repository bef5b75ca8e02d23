"""A map of where there is something to win: concurrency per GPU x tail weight x tool share x model, all simulated.

    python bench/regimes/run.py                      the map, about 40 minutes on one core; writes bench/results/simulated/regimes.json too
    python bench/regimes/run.py --jobs 8             the same numbers, sooner
    python bench/regimes/run.py --check 12           12 cells again: do the results hold for the code of now?
    python bench/regimes/run.py --from FILE          only write docs/regimes.md and docs/regimes.png again

Each cell simulates stock verl at every fixed tensor-parallel degree and heddle at stock's usual and best degree, on the same draws.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

from cells import CONCURRENCY, DRAWS, GPU, GPUS, MEAN_TOKENS, MODELS, SAMPLES, SIGMAS, SLOTS, TOOL_SHARES, Cell, cells, measure
from picture import heat_maps
from reading import markdown

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import verl_heddle
from bench.provenance import measured_again, save
from verl_heddle.report.setting import OVERHEAD_S, setting

RESULTS = ROOT / "bench" / "results" / "simulated" / "regimes.json"
HEDDLE = (
    "as released: trajectories are admitted to replicas as KV cache has room, least served first, and kept through their tools "
    "for as long as that pays; nothing is predicted."
)
"""The arm called heddle, in words; stored with the numbers."""
BESIDE = [
    "Trajectory-FCFS: the trajectory whose first turn came first, by vLLM's priorities. KV offload: what is evicted stays in the host's "
    "memory, without limit, and is read back at 25 GB/s per GPU. ThunderAgent: its law as far as known "
    "([simulate](simulate.md)). More peers where KV is short: [bench/residents](../bench/residents/README.md).",
    f"A turn spends {1e3 * OVERHEAD_S:g} ms outside engine and tool.",
]
"""More that was assumed, in words."""
PAGE, PICTURE = ROOT / "docs" / "regimes.md", ROOT / "docs" / "regimes.png"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1, help="processes (default 1)")
    parser.add_argument("--from", dest="known", type=Path, help="write the page from these results instead of simulating")
    parser.add_argument("--check", type=int, metavar="N", help="measure N cells anew: are they what they were? Then the results still hold")
    arguments = parser.parse_args()
    if arguments.check:
        names = [item.name for item in fields(Cell)]
        rows = json.loads(RESULTS.read_text())["cells"]
        return measured_again(RESULTS, rows, lambda row: measure(Cell(*(row[name] for name in names))), arguments.check)
    result = json.loads(arguments.known.read_text()) if arguments.known else simulated(arguments.jobs)
    if not arguments.known:
        save(RESULTS, result)
    PAGE.write_text(markdown(result))
    heat_maps(result, PICTURE)
    print(f"wrote {PAGE.relative_to(ROOT)} and {PICTURE.relative_to(ROOT)}", file=sys.stderr)


def simulated(jobs: int) -> dict[str, Any]:
    """All cells, with what they assume."""
    todo = list(cells())
    begun = time.monotonic()
    rows = []
    with ProcessPoolExecutor(jobs) if jobs > 1 else nullcontext() as pool:
        for number, row in enumerate(pool.map(measure, todo) if pool else map(measure, todo), start=1):
            rows.append(row)
            if number % 20 == 0 or number == len(todo):
                print(f"{number} of {len(todo)} cells, {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
    return {
        "kind": "simulated",
        "version": verl_heddle.__version__,
        "assumptions": {
            "latency": setting(MODELS[0], GPU, GPUS).latency.source,
            "heddle": HEDDLE,
            "beside": BESIDE,
            "gpu": GPU,
            "gpus": GPUS,
            "slots": SLOTS,
            "samples": SAMPLES,
            "mean_tokens": MEAN_TOKENS,
            "cap_tokens": 40_960,
            "concurrency": list(CONCURRENCY),
            "sigmas": list(SIGMAS),
            "tool_shares": list(TOOL_SHARES),
            "draws": {str(key): value for key, value in DRAWS.items()},
        },
        "cells": rows,
    }


if __name__ == "__main__":
    main()
