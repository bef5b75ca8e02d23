"""Forecasts of decode throughput held against published benchmarks, none of them a source of the tables or fitted to.

    python bench/published/run.py            every row; writes bench/results/simulated/published.json and the README's table
    python bench/published/run.py --quick    the first row of each unit, printed only
    python bench/published/run.py --table    only write the README's table again

A row of benchmarks.json is one engine under one load: `requests` of `inputs` and `outputs` tokens each, all there at once, of which `slots`
run at a time. The simulator plays that with what `verl-heddle simulate` takes for this model and GPU, its assumed host time in every step
included; no time between turns, since no router of verl's stands before these engines. `slots` null: as many as KV cache holds to their end
(TensorRT-LLM's `guaranteed_no_evict`), `MOST` at most. Units: output tokens per second of the whole run, prompt and output tokens the same,
or milliseconds between tokens. The error is that of throughput: forecast / measured - 1, with times the inverse.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from bench.marked import fill
from bench.provenance import save
from verl_heddle.fleet import BATCH_TOKENS, Replica
from verl_heddle.report.setting import Setting, setting
from verl_heddle.simulate import EngineOptions, Result, simulate
from verl_heddle.simulate.baselines.stock import Stock
from verl_heddle.trajectory import Trajectory, Turn

HERE = Path(__file__).parent
README = HERE / "README.md"
RESULT = ROOT / "bench/results/simulated/published.json"
BENCHMARKS: dict[str, Any] = json.loads((HERE / "benchmarks.json").read_text())

MOST = 4096
"""Sequences a TensorRT-LLM engine runs at once: "Max Runtime Batch Size" in the sample output of its performance overview."""

OUTPUT, ALL, MS = "output tokens/s", "all tokens/s", "ms per token"


def forecast(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with its forecast in the row's unit, its error and where the step times are from; or with `refused`, why there is none."""
    try:
        where, slots = situation(row)
    except ValueError as error:
        return {**row, "refused": str(error)}
    engine = EngineOptions("fcfs", batch_tokens=max(row.get("batch_tokens", BATCH_TOKENS), slots))
    fleet = [Replica("engine", row["tp"], slots, where.kv_tokens[row["tp"]])]
    result = simulate(work(row), fleet, where.latency, Stock(), engine=engine)
    value = told(row, result)
    ratio = row["measured"] / value if row["unit"] == MS else value / row["measured"]
    return {**row, "forecast": value, "error": ratio - 1.0, "at_once": slots, "times": where.times.kind if where.times else "none"}


def situation(row: Mapping[str, Any]) -> tuple[Setting, int]:
    """One replica, and how many requests run on it at a time.

    Raises:
        ValueError: the simulator knows no such model or GPU, or says that it does not fit.
    """
    tp, held = row["tp"], row["inputs"] + row["outputs"]
    precision = {"weights": row["weights"], "kv": row["kv"]}
    where = setting(row["model"], row["gpu"], tp, tp, row["slots"] or MOST, row["utilization"], 0.0, **precision)
    where.able(work(row)[:1])
    kv_tokens = where.kv_tokens[tp]
    if row["slots"] is None and kv_tokens is not None:
        return where, min(MOST, kv_tokens // held)
    return where, row["slots"] or MOST


def work(row: Mapping[str, Any]) -> list[Trajectory]:
    """The row's requests, each of one turn, no two of one prompt."""
    turn = (Turn(input_tokens=0, output_tokens=row["outputs"]),)
    return [Trajectory("published", row["source"], str(one), 0, row["inputs"], turn) for one in range(row["requests"])]


def told(row: Mapping[str, Any], result: Result) -> float:
    """The simulated run in the row's unit."""
    if row["unit"] == MS:
        return 1e3 * float((result.generate_s / result.output_tokens).mean())
    prompts = row["inputs"] * row["requests"] if row["unit"] == ALL else 0
    return (result.tokens + prompts) / result.makespan_s


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Every row with its forecast, its source below, and what comes of it above."""
    lines = [
        summary(rows),
        "",
        "| model | GPU | tp | weights, KV | engine | at once | in, out | measured | forecast | error | step times | |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    numbers = {name: number for number, name in enumerate(BENCHMARKS["sources"], 1)}
    for row in rows:
        cells = [row[name] for name in ("model", "gpu", "tp")]
        cells += [
            f"{row['weights']}, {row['kv']}",
            row["engine"],
            row.get("at_once", row["slots"]),
            f"{row['inputs']:,}, {row['outputs']:,}",
        ]
        cells += [
            f"{digits(row['measured'])} {row['unit']}",
            *([f"{digits(row['forecast'])}", f"{row['error']:+.0%}"] if "error" in row else ["none", ""]),
        ]
        lines.append(f"| {' | '.join(map(str, cells))} | {row.get('times', 'none')} | [{numbers[row['source']]}] |")
    for name, number in numbers.items():
        source = BENCHMARKS["sources"][name]
        lines += ["", f"[{number}] [{source['what']}]({source['url']})"]
    return "\n".join(lines)


def digits(value: float) -> str:
    """Four of them, or all before the point."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """Errors over all rows, by the source of step times and by GPU; then what could not be forecast, with the reason."""
    made = [row for row in rows if "error" in row]
    lines = ["| rows | number | error, median | worst | median with sign |", "|---|---|---|---|---|"]
    for name in ["all", *dict.fromkeys(row[key] for key in ("times", "gpu") for row in made)] if made else []:
        errors = [row["error"] for row in made if name in ("all", row["times"], row["gpu"])]
        lines.append(f"| {name} | {len(errors)} | {median(map(abs, errors)):.0%} | {max(errors, key=abs):+.0%} | {median(errors):+.0%} |")
    for row in rows:
        if "refused" in row:
            lines += ["", f"No forecast of {row['model']} on {row['gpu']}: {row['refused']}"]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the first row of each unit, nothing is written")
    parser.add_argument("--table", action="store_true", help="write the README's table from the results that are there")
    arguments = parser.parse_args()
    if arguments.quick:
        firsts = {row["unit"]: row for row in reversed(BENCHMARKS["rows"])}
        print(table([forecast(row) for row in firsts.values()]))
        return
    if not arguments.table:
        rows = []
        for row in BENCHMARKS["rows"]:
            rows.append(forecast(row))
            print(row["model"], row["gpu"], rows[-1].get("error", rows[-1].get("refused")), file=sys.stderr, flush=True)
        save(RESULT, {"kind": "simulated", "rows": rows})
    made = table(json.loads(RESULT.read_text())["rows"])
    print(made)
    fill(README, "published", made)


if __name__ == "__main__":
    main()
