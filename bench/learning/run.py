"""Does shaping teach as well as plain sampling, and sooner? The math recipe on the CPU, arms in pairs with the same seeds.

    python bench/learning/run.py --out outputs/learning             # 3 seeds x 6 arms x 40 steps; two hours on 2 cores; goes on where it stopped
    python bench/learning/run.py --out outputs/learning --report-only

Runs `verl-heddle compare` and reads what verl logged. What a policy has learnt is told by *validation*, every `EVERY` steps, without
shaping, on other tasks, sampled as in training: the training reward of a shaped arm is that of the samples it kept, and GRPO improves the
samples, not the one greedy answer. `wall_s` is verl's own clock over all steps, `rollout_s` the sum of the makespans. Writes bench/results/cpu/learning.json and bench/learning/curves.png.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from verl_heddle.compare.campaign import numbers
from verl_heddle.compare.launch import METRICS

RESULT, PICTURE = ROOT / "bench/results/cpu/learning.json", ROOT / "bench/learning/curves.png"
EVERY, SAMPLES = 10, 4
"""Steps between validations; the recipe's samples per prompt."""
TASK = {"MODEL_STEPS": "500", "TRAIN_ROWS": "64", "VAL_ROWS": "128"}
"""For the recipe: a policy that knows its task badly, so that there is something to learn (recipes/math/README.md), and enough other tasks
to tell by: with the recipe's 16 a validation differs from the next by 0.1 without any learning."""
WATCH = [
    f"trainer.test_freq={EVERY}",
    "trainer.val_before_train=true",
    "actor_rollout_ref.rollout.val_kwargs.do_sample=true",
    "actor_rollout_ref.rollout.val_kwargs.temperature=1.0",
    "actor_rollout_ref.rollout.val_kwargs.top_p=1.0",
]
"""For every arm: see the module."""
LOOSE = "heddle.shape.enable=true heddle.shape.length_bias=1 heddle.shape.prompt_bias=1 heddle.shape.mixed_loss=1"
DUAL_END = f"{LOOSE} heddle.shape.spare=2 heddle.shape.uniform=true heddle.shape.longest=1 heddle.shape.patience=inf"
ARMS = {
    "shortest": f"{LOOSE} heddle.shape.spare=2 heddle.shape.uniform=true heddle.shape.longest=0",
    "dual_end": DUAL_END,
    "adaptive": "heddle.shape.enable=true heddle.shape.spare=2",
    "corrected": f"{DUAL_END} heddle.shape.corrected=true algorithm.adv_estimator=heddle_grpo",
}
"""Beside stock and heddle (scheduling only). `adaptive` has the bounds on, as a user gets them."""
WORDS = {
    "stock": "stock verl",
    "heddle": "scheduling only",
    "shortest": "shortest n of n + 2",
    "dual_end": "dual-end, n of n + 2",
    "adaptive": "dual-end, adaptive",
    "corrected": "dual-end, corrected",
}
COLORS = {
    "stock": "#1b2430",
    "heddle": "#2a5db0",
    "shortest": "#b8420f",
    "dual_end": "#8a6d1a",
    "adaptive": "#0d8a6a",
    "corrected": "#b55fc9",
}
"""Of `WORDS`; lightness apart for every kind of colour vision."""


def compare(out: Path, seeds: int, steps: int, more: list[str]) -> None:
    """Run, or go on."""
    arms = [part for name, overrides in ARMS.items() for part in ("--arm", f"{name}: {overrides}")]
    program = Path(sys.executable).with_name("verl-heddle")
    what = ["compare", "--recipe", "math", "--out", str(out), "--pairs", str(seeds), "--steps", str(steps), "--no-wandb"]
    subprocess.run([str(program), *what, *arms, "--", *WATCH, *more], check=True, cwd=ROOT, env=os.environ | TASK)


def learnt(metrics: Path) -> dict[str, list[float]]:
    """Curves of one run: validation by step, and by step reward, response length, seconds of the step and of its rollout."""
    logged = numbers(metrics)
    steps = sorted(step for step in logged if "critic/score/mean" in logged[step])
    checked = dict(_validations(metrics))
    return {
        "validation_step": [float(step) for step in checked],
        "validation": list(checked.values()),
        "reward": [logged[step]["critic/score/mean"] for step in steps],
        "response_tokens": [logged[step]["response_length/mean"] for step in steps],
        "step_s": [logged[step]["timing_s/step"] for step in steps],
        "rollout_s": [logged[step]["heddle/makespan_s"] for step in steps],
    }


def _validations(metrics: Path) -> Iterator[tuple[int, float]]:
    """(step, reward); step 0 is before training, which `numbers` leaves out."""
    for line in metrics.read_text().splitlines():
        row = json.loads(line)
        found = [value for name, value in row["data"].items() if name.startswith("val-core/") and "/mean@" in name]
        if found:
            yield row["step"], fmean(found)


def exactness(folder: Path, logged: dict[int, dict[str, float]], samples: int) -> dict[str, int]:
    """Of one run: groups trained on, those without exactly n rows or with a row twice, and requests left in engines after steps."""
    groups = wrong = 0
    for path in (folder / "rollouts").glob("*.jsonl"):
        keys = [json.loads(line)["uid"] for line in path.read_text().splitlines()]
        counts = Counter(key.split("_")[0] for key in keys)
        groups += len(counts)
        wrong += sum(count != samples for count in counts.values()) + len(keys) - len(set(keys))
    left = sum(int(row.get("heddle/engines/requests_left", 0)) for row in logged.values())
    return {"groups": groups, "wrong_groups": wrong, "requests_left": left}


def gathered(out: Path) -> dict[str, Any]:
    """Every finished run's curves by arm and pair, and the table."""
    told = json.loads((out / "compare.json").read_text())
    curves: dict[str, dict[str, dict[str, list[float]]]] = {}
    exact: dict[str, Counter[str]] = defaultdict(Counter)
    for run in told["runs"]:
        if run["state"] == "finished":
            metrics = out / run["folder"] / METRICS
            curves.setdefault(run["arm"], {})[str(run["pair"])] = learnt(metrics)
            exact[run["arm"]].update(exactness(out / run["folder"], numbers(metrics), SAMPLES))
    rows = {}
    for arm, runs in curves.items():
        ends = [fmean(curve["validation"][-2:]) for curve in runs.values()]
        rows[arm] = {
            "seeds": len(runs),
            "validation_end": fmean(ends),
            "validation_least": min(ends),
            "validation_most": max(ends),
            "reward_end": fmean(fmean(curve["reward"][-10:]) for curve in runs.values()),
            "response_tokens_end": fmean(fmean(curve["response_tokens"][-10:]) for curve in runs.values()),
            "wall_s": fmean(sum(curve["step_s"]) for curve in runs.values()),
            "rollout_s": fmean(sum(curve["rollout_s"]) for curve in runs.values()),
            **exact[arm],
        }
    return {"command": told.get("command"), "arms": ARMS, "rows": rows, "curves": curves}


def table(answer: dict[str, Any]) -> str:
    """Markdown."""
    lines = ["| arm | seeds | validation at the end (least to most) | response tokens | rollout s | wall s |", "|---|---|---|---|---|---|"]
    for arm in WORDS:
        if row := answer["rows"].get(arm):
            span = f"{row['validation_end']:.3f} ({row['validation_least']:.3f} to {row['validation_most']:.3f})"
            times = f"{row['rollout_s']:.0f} | {row['wall_s']:.0f}"
            lines.append(f"| {WORDS[arm]} | {row['seeds']} | {span} | {row['response_tokens_end']:.0f} | {times} |")
    return "\n".join(lines)


def draw(answer: dict[str, Any], path: Path) -> None:
    """Validation by step and by wall clock, response length by step; a line per arm, thin ones its seeds."""
    from itertools import accumulate

    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained", facecolor="white")
    by_step, by_time, length = figure.subplots(1, 3)
    for arm, runs in answer["curves"].items():
        style, all_of = {"color": COLORS[arm]}, list(runs.values())
        for curve in all_of:
            clock = [0.0, *accumulate(curve["step_s"])]
            by_step.plot(curve["validation_step"], curve["validation"], lw=0.6, alpha=0.6, **style)
            by_time.plot([clock[int(step)] for step in curve["validation_step"]], curve["validation"], lw=0.8, alpha=0.8, **style)
        least = min(len(curve["validation"]) for curve in all_of)
        means = [fmean(curve["validation"][i] for curve in all_of) for i in range(least)]
        by_step.plot(all_of[0]["validation_step"][:least], means, lw=2, label=WORDS[arm], **style)
        least = min(len(curve["response_tokens"]) for curve in all_of)
        smooth = [fmean(value for curve in all_of for value in curve["response_tokens"][max(0, i - 9) : i + 1]) for i in range(least)]
        length.plot(range(1, least + 1), smooth, lw=1.5, **style)
    by_step.set(xlabel="step", title="validation reward, mean of the seeds", ylabel="reward")
    by_time.set(xlabel="seconds in steps (verl's clock)", title="the same over wall clock, each seed")
    length.set(xlabel="step", title="response tokens trained on, mean of 10 steps")
    by_step.legend(frameon=False)
    figure.suptitle("math recipe, tiny model, real verl and vLLM on a CPU", fontsize=10)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/learning"), help="folder of the comparison")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--report-only", action="store_true", help="run nothing, read what is there")
    parser.add_argument("--json", type=Path, default=RESULT)
    parser.add_argument("--png", type=Path, default=PICTURE)
    parser.add_argument("overrides", nargs="*", help="after --: words added to every arm's command")
    args = parser.parse_args()
    if not args.report_only:
        compare(args.out, args.seeds, args.steps, args.overrides)
    answer = gathered(args.out)
    args.json.write_text(json.dumps(answer, indent=1) + "\n")
    draw(answer, args.png)
    print(table(answer))


if __name__ == "__main__":
    main()
