"""How far off is what `verl-heddle explain` says of spare samples? Steps whose spare samples are known.

    python bench/shaping/forecast.py        # three minutes; --quick: one case in seconds, printed only; --table: the README's table again

In each case the first n samples of a prompt are the step that was recorded, under verl's rule; `explain` draws the rest from them. The
truth is the step with the samples that there are, under shaping as released, which has seen other samples of the prompts.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from bench.marked import fill
from bench.provenance import FOLDER, save
from bench.shaping.arms import ARMS, play
from bench.shaping.cases import Case, regimes
from verl_heddle.report.recorded import Engines, Machine
from verl_heddle.report.whatif import spare_samples

SEEDS = 5
RESULT = FOLDER / "simulated" / "spare_samples.json"


def forecast(case: Case, seed: int) -> tuple[float, float]:
    """What `explain` says, and what is true."""
    pool, before = case.draw(seed)
    where = case.where
    fleet = where.fleet(where.tp)
    engines = Engines(where.tp, fleet[0].slots, len(fleet), "fcfs", kv_tokens=fleet[0].kv_tokens)
    step = [replace(item, meta={**item.meta, "start_s": 0.0}) for items in pool.values() for item in items[: case.size]]
    said = spare_samples(step, Machine(engines, where.latency, where.bound_tps))
    assert said is not None
    stock, _ = play(case, ARMS["stock"], pool, before, before)
    shaped, _ = play(case, ARMS["auto"], pool, before, before)
    return said.ratio, stock.makespan_s / shaped.makespan_s


def rows(cases: Iterable[Case], seeds: int) -> list[dict[str, Any]]:
    """One a case."""
    made = []
    for case in cases:
        told = [forecast(case, seed) for seed in range(seeds)]
        made.append({"case": case.name, "said": [said for said, _ in told], "true": [true for _, true in told]})
        print(line(made[-1]), flush=True)
    return made


def line(row: dict[str, Any]) -> str:
    """In the README's table."""
    said, true = median(row["said"]), median(row["true"])
    spans = (f"{median(row[name]):.2f} ({min(row[name]):.2f} to {max(row[name]):.2f})" for name in ("said", "true"))
    return "| " + " | ".join([row["case"], *spans, f"{100 * said / true - 100:+.0f} %"]) + " |"


def table(made: list[dict[str, Any]]) -> str:
    """And what it comes to."""
    off = sorted(abs(median(row["said"]) / median(row["true"]) - 1) for row in made)
    return "\n".join(
        [
            f"| case | `explain` says, median of {SEEDS} steps (least to most) | true | off |",
            "|---|---|---|---|",
            *map(line, made),
            "",
            f"Off by {100 * median(off):.0f} % in the median of the cases, {100 * off[-1]:.0f} % at most.",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small case, one seed, printed only")
    parser.add_argument("--table", action="store_true", help="write the README's table from the results that are there")
    arguments = parser.parse_args()
    if arguments.quick:
        rows([regimes()[4]], 1)
        return
    if not arguments.table:
        save(RESULT, {"kind": "simulated", "cases": rows(regimes(), SEEDS)})
    fill(Path(__file__).with_name("README.md"), "forecast", table(json.loads(RESULT.read_text())["cases"]))


if __name__ == "__main__":
    main()
