"""verl's three trainers, stock and with heddle, over whole runs of training; all simulated.

    python bench/modes/run.py               all cells and draws; writes bench/results/simulated/modes.json and the README's table
    python bench/modes/run.py --quick       one small cell, nothing is written
    python bench/modes/run.py --table       only write the README's table again

Cells are of bench/regimes: a batch is what is submitted at once there, and each step has another draw of it. The update takes `UPDATE` of
stock's synchronous rollout, and in separate_async, where the trainer has GPUs of its own and the same number serve rollouts, new weights
take `TRANSFER` of it to them.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "bench" / "regimes")]

from cells import GPU, GPUS, SAMPLES, SLOTS, Cell, draw

from bench.cellwise import Bench
from verl_heddle.options import Options
from verl_heddle.orchestrator import Orchestrator
from verl_heddle.report.setting import Setting, setting
from verl_heddle.simulate import simulate
from verl_heddle.simulate.baselines.stock import Stock
from verl_heddle.training.play import train
from verl_heddle.training.trainer import MODES, Run, Trainer
from verl_heddle.trajectory import Trajectory

CELLS = {
    "8B tp1, 16 per GPU, no tools": (Cell("Qwen3-8B", 16, 0.9, 0.0), 1),
    "8B tp1, 16, tools 30 %": (Cell("Qwen3-8B", 16, 0.9, 0.3), 1),
    "8B tp1, 64, no tools": (Cell("Qwen3-8B", 64, 0.9, 0.0), 1),
    "8B tp1, 64, tools 30 %": (Cell("Qwen3-8B", 64, 0.9, 0.3), 1),
    "32B tp2, 64, no tools": (Cell("Qwen3-32B", 64, 0.9, 0.0), 2),
    "32B tp2, 64, tools 30 %": (Cell("Qwen3-32B", 64, 0.9, 0.3), 2),
    "32B tp2, 128, no tools": (Cell("Qwen3-32B", 128, 0.9, 0.0), 2),
    "32B tp2, 128, tools 30 %": (Cell("Qwen3-32B", 128, 0.9, 0.3), 2),
}
STEPS, SKIP = 12, 4
DRAWS = 2
SPARE = 3
"""Batches more than steps: for what is asked for ahead, and for what takes the place of the dropped."""

UPDATE, TRANSFER = 0.4, 0.03
ARMS = ("stock", "heddle")


def measured(name: str, cell: Cell, tp: int, seed: int, steps: int = STEPS, skip: int = SKIP) -> dict[str, Any]:
    """One run under each trainer and arm."""
    where = setting(cell.model, GPU, GPUS, tp, SLOTS, cell.utilization)
    groups = batches(cell, where, seed, steps + SPARE)
    prompts = cell.concurrency * GPUS // SAMPLES
    first = [item for group in groups[:prompts] for item in group]
    rollout_s = float(simulate(first, where.fleet(tp), where.latency, Stock(seed), engine=where.engine("fcfs")).finish_s.max())
    row: dict[str, Any] = {"cell": name, "seed": seed, "rollout_s": rollout_s, "kv_tokens": where.fleet(tp)[0].kv_tokens, "modes": {}}
    for mode in MODES:
        trainer = Trainer(mode, prompts, UPDATE * rollout_s, TRANSFER * rollout_s, steps)  # type: ignore[arg-type]
        row["modes"][mode] = {arm: told(played(arm, groups, where, tp, trainer, seed, skip)) for arm in ARMS}
    return row


def batches(cell: Cell, where: Setting, seed: int, number: int) -> list[list[Trajectory]]:
    """The samples of each prompt, batch after batch, every batch a draw of its own."""
    groups: dict[str, list[Trajectory]] = defaultdict(list)
    for batch in range(number):
        for item in draw(cell, where, 1000 * seed + batch).steps[0]:
            groups[f"{batch}:{item.prompt_id}"].append(replace(item, prompt_id=f"{batch}:{item.prompt_id}"))
    return list(groups.values())


def played(arm: str, groups: Sequence[Sequence[Trajectory]], where: Setting, tp: int, trainer: Trainer, seed: int, skip: int) -> Run:
    """A run; heddle knows the engines' step times, as a real run does after a step."""
    if arm == "stock":
        return train(groups, where.fleet(tp), where.latency, Stock(seed), trainer, where.engine("fcfs"), skip)
    policy = Orchestrator(Options(seed=seed))
    policy.step_times_known(where.latency)
    return train(groups, where.fleet(tp), where.latency, policy, trainer, where.engine("priority"), skip)


def told(run: Run) -> dict[str, float]:
    """Numbers of a run."""
    mean, most = run.ages
    return {
        "tokens_per_s": run.tokens_per_s,
        "waited_share": run.waited_share,
        "dropped_share": run.dropped_share,
        "length_bias": run.length_bias,
        "age_mean": mean,
        "age_max": most,
        "recomputed_per_trained": run.recomputed_per_trained,
        "interrupted": sum(step.interrupted for step in run.counted) / len(run.counted),
    }


def table(result: dict[str, Any]) -> str:
    """Trained tokens per second over stock's synchronous trainer, and what goes with it; medians over draws."""
    lines = [
        "| cell | trainer | on-policy | stock | heddle | heddle / stock, by draw | read again per trained token | oldest | dropped "
        "| length bias |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(row["cell"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["cell"] == name]
        base = [row["modes"]["sync"]["stock"]["tokens_per_s"] for row in rows]
        for mode in MODES:
            of = {arm: [row["modes"][mode][arm] for row in rows] for arm in ARMS}
            over = {arm: median(one["tokens_per_s"] / b for one, b in zip(of[arm], base, strict=True)) for arm in ARMS}
            ratios = [ours["tokens_per_s"] / stock["tokens_per_s"] for ours, stock in zip(of["heddle"], of["stock"], strict=True)]

            def pair(key: str, form: str, of: dict[str, list[dict[str, float]]] = of) -> str:
                return ", ".join(format(median(one[key] for one in of[arm]), form) for arm in ARMS)

            lines.append(
                f"| {name} | {mode} | {'yes' if mode == 'sync' else 'no'} | {over['stock']:.2f} | {over['heddle']:.2f} | "
                f"{' '.join(f'{ratio:.2f}' for ratio in ratios)} | {pair('recomputed_per_trained', '.1f')} | {pair('age_max', '.0f')} | "
                f"{pair('dropped_share', '.1%')} | {pair('length_bias', '+.1%')} |"
            )
    return "\n".join(lines)


def quick() -> dict[str, Any]:
    """A small cell, a few steps."""
    return measured("quick", Cell("Qwen3-8B", 4, 0.9, 0.3), 1, 0, steps=4, skip=1)


ABOUT = {"gpu": GPU, "gpus": GPUS, "slots": SLOTS, "steps": STEPS, "skipped": SKIP, "update": UPDATE, "transfer": TRANSFER}
BENCH = Bench("modes", Path(__file__).with_name("README.md"), CELLS, range(DRAWS), ABOUT, measured, table, quick)

if __name__ == "__main__":
    BENCH.main(__doc__)
