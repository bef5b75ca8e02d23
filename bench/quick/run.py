"""How far is `simulate --quick` from the full answer? Writes JSON and the table of the README.

    python bench/quick/run.py                    # everything, about 4 minutes of one core
    python bench/quick/run.py --quick            # the first two rows, one draw; writes nothing unless --json is given

Full: every trajectory on the whole fleet, `DRAWS` draws, medians. Quick: what `simulate --quick` plays. Both under the same four arms.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from bench.marked import fill
from bench.provenance import FOLDER, save
from verl_heddle.report.draws import generated, recorded
from verl_heddle.report.quick import ARMS, quick_trace, quick_workload
from verl_heddle.report.setting import setting
from verl_heddle.report.study import Answer, study
from verl_heddle.traces import generate, write

RESULTS = FOLDER / "simulated" / "quick.json"
README = Path(__file__).with_name("README.md")
DRAWS = 2


@dataclass(frozen=True)
class Cell:
    """A question. `steps`: of a trace; 0: a workload."""

    name: str
    workload: str
    model: str
    gpus: int
    prompts: int
    gpu: str = "h200"
    slots: int = 256
    steps: int = 0
    parameters: dict[str, float] = field(default_factory=dict)


CELLS = (
    Cell("coding, 8 GPUs", "coding", "qwen3-14b", 8, 16),
    Cell("search, 64 GPUs, 16 slots", "search", "qwen3-14b", 64, 128, slots=16),
    Cell("coding, 64 GPUs", "coding", "qwen3-14b", 64, 128),
    Cell("coding, 64 GPUs, slow tools", "coding", "qwen3-32b", 64, 128, parameters={"tool_mean_s": 5.0}),
    Cell("math, 64 GPUs", "math", "qwen3-8b", 64, 128),
    Cell("coding, 32 GPUs, little KV", "coding", "qwen3-32b", 32, 128, "h100"),
    Cell("coding, 8 GPUs, long step", "coding", "qwen3-14b", 8, 128),
    Cell("search, 8 GPUs, long step", "search", "qwen3-8b", 8, 256),
    Cell("trace of 8 coding steps, 16 GPUs", "coding", "qwen3-14b", 16, 32, steps=8),
)


def ask(cell: Cell, draws: int, folder: Path) -> dict[str, Any]:
    """Both answers to one question."""
    where = setting(cell.model, cell.gpu, cell.gpus, None, cell.slots)
    trace = str(folder / "trace.jsonl")
    if cell.steps:
        write(
            trace,
            (
                replace(item, prompt_id=f"{step}/{item.prompt_id}", meta=item.meta | {"step": step})
                for step in range(cell.steps)
                for item in generate(cell.workload, cell.prompts, 16, seed=step)
            ),
        )
        source = recorded(trace, range(draws))
    else:
        source = generated(cell.workload, cell.prompts, 16, range(draws), **cell.parameters)
    begun = time.process_time()
    full = study(where, source, ARMS, jobs=1)
    full_s, begun = time.process_time() - begun, time.process_time()
    scaled = quick_trace(where, trace) if cell.steps else quick_workload(where, cell.workload, cell.prompts, 16, **cell.parameters)
    quick = study(*scaled, ARMS, jobs=1)
    quick_s = time.process_time() - begun
    return {
        "cell": cell.name,
        "turns": sum(len(item.steps) for step in source.draws[0].steps for item in step) // max(1, cell.steps),
        "gpus": f"{quick.setting.gpus} of {cell.gpus}",
        "played": quick.source.sample,
        "full": told(full) | {"cpu_s": full_s},
        "quick": told(quick) | {"cpu_s": quick_s},
    }


def told(answer: Answer) -> dict[str, Any]:
    """What the headline says."""
    best = answer.rows["stock_best_tp"]
    degrees, plugin = best.speedup, answer.rows["heddle"].speedup
    return {
        "tp": answer.stock.tp,
        "stock_s": answer.stock.typical.makespan_s,
        "gpu_hours_per_1000": answer.stock.gpu_hours_per_1000,
        "best_tp": best.tp,
        "best_tp_speedup": degrees,
        "heddle": plugin,
        "heddle_best_tp": answer.rows["heddle_best_tp"].speedup,
        "heddle_range": [min(answer.rows["heddle"].speedups), max(answer.rows["heddle"].speedups)],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows of the README: full, then quick."""
    lines = [
        "| step | turns of a step | GPUs played | stock, s | GPU-h per thousand | best tp | its gain | the plugin | both | CPU s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        full, quick = row["full"], row["quick"]
        pairs = [
            f"{full['stock_s']:.0f} / {quick['stock_s']:.0f}",
            f"{full['gpu_hours_per_1000']:.2f} / {quick['gpu_hours_per_1000']:.2f}",
            f"{full['best_tp']} / {quick['best_tp']}",
            *(f"{full[key]:.2f} / {quick[key]:.2f}" for key in ("best_tp_speedup", "heddle", "heddle_best_tp")),
            f"{full['cpu_s']:.0f} / {quick['cpu_s']:.1f}",
        ]
        lines.append(f"| {row['cell']} | {row['turns']:,} | {row['gpus']} | {' | '.join(pairs)} |")
    same = sum(row["full"]["best_tp"] == row["quick"]["best_tp"] for row in rows)
    off = [100 * abs(row["quick"][key] / row["full"][key] - 1) for row in rows for key in ("best_tp_speedup", "heddle", "heddle_best_tp")]
    seconds = [100 * abs(row["quick"]["stock_s"] / row["full"]["stock_s"] - 1) for row in rows if "shorter step" not in row["played"]]
    lines += [
        "",
        f"The best degree is the same in {same} of {len(rows)}; a gain is off by {sorted(off)[len(off) // 2]:.1f} % in the median and "
        f"{max(off):.0f} % at most; stock's seconds, where the step was not shortened, by {max(seconds):.0f} % at most.",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the first two rows, one draw")
    parser.add_argument("--json", type=Path, help="write the rows here (default: bench/results/simulated/quick.json, and the README)")
    args = parser.parse_args()
    rows = []
    with TemporaryDirectory() as folder:
        for cell in CELLS[:2] if args.quick else CELLS:
            row = ask(cell, 1 if args.quick else DRAWS, Path(folder))
            rows.append(row)
            print(row["cell"], row["played"], row["full"], row["quick"], sep="\n  ", flush=True)
    if args.json is not None or not args.quick:
        save(args.json or RESULTS, rows)
    if args.json is None and not args.quick:
        fill(README, "quick", table(rows))


if __name__ == "__main__":
    main()
