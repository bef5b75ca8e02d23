"""Does shaping teach as well as plain sampling, and sooner? The math recipe on the CPU, arms in pairs with the same seeds.

    python bench/learning/run.py --out outputs/learning             # 3 seeds x 6 arms x 40 steps; two hours; goes on where it stopped
    python bench/learning/run.py --out outputs/learning --report-only

Runs `verl-heddle compare` and reads what verl logged. What a policy has learnt is told by *validation*, every `EVERY` steps, without
shaping, on other tasks, sampled as in training: the training reward of a shaped arm is that of the samples it kept, and GRPO improves the
samples, not the one greedy answer. `step_s` is verl's own clock over all steps, `rollout_s` the sum of the makespans; ratios are stock's
over the arm's in the same pair, medians over the pairs. Writes bench/results/cpu/learning.json and bench/learning/curves.png.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from statistics import fmean, median
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from bench.marked import fill
from bench.provenance import save
from verl_heddle.compare.campaign import numbers
from verl_heddle.compare.launch import METRICS
from verl_heddle.compare.ledger import Ledger
from verl_heddle.compare.plan import wanted

RESULT, PICTURE = ROOT / "bench/results/cpu/learning.json", ROOT / "bench/learning/curves.png"
EVERY, SAMPLES = 10, 4
"""Steps between validations; the recipe's samples per prompt."""
SMOOTH = 8
"""Steps in a mean: two rounds through the training tasks, whose difficulty differs."""
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


def gathered(out: Path, timed_from: int) -> dict[str, Any]:
    """Every finished run's curves by arm and pair, and the table; times are those of the pairs from `timed_from` on."""
    plan, _ = wanted(out, None)
    ledger = Ledger(out)
    curves: dict[str, dict[str, dict[str, list[float]]]] = {}
    exact: dict[str, Counter[str]] = defaultdict(Counter)
    for key in sorted(plan.runs(), key=lambda key: list(WORDS).index(key.arm)):
        if ledger.finished(key):
            metrics = ledger.folder(key) / METRICS
            curves.setdefault(key.arm, {})[str(key.pair)] = learnt(metrics)
            exact[key.arm].update(exactness(ledger.folder(key), numbers(metrics), SAMPLES))
    rows = {}
    for arm, runs in curves.items():
        ends = [fmean(curve["validation"][-2:]) for curve in runs.values()]
        rows[arm] = {
            "seeds": len(runs),
            "validation_before": fmean(curve["validation"][0] for curve in runs.values()),
            "validation_end": fmean(ends),
            "validation_least": min(ends),
            "validation_most": max(ends),
            "reward_first_10": fmean(fmean(curve["reward"][:10]) for curve in runs.values()),
            "reward_last_10": fmean(fmean(curve["reward"][-10:]) for curve in runs.values()),
            "response_tokens_first_10": fmean(fmean(curve["response_tokens"][:10]) for curve in runs.values()),
            "response_tokens_last_10": fmean(fmean(curve["response_tokens"][-10:]) for curve in runs.values()),
            **exact[arm],
        }
        timed = [pair for pair in runs if int(pair) >= timed_from and pair in curves["stock"]]
        for what in ("step_s", "rollout_s") if timed else ():
            rows[arm][f"{what[:-2]}_ratio"] = median(sum(curves["stock"][pair][what]) / sum(runs[pair][what]) for pair in timed)
            rows[arm][what] = fmean(sum(runs[pair][what]) for pair in timed)
        rows[arm]["timed_pairs"] = len(timed)
    about = {
        "recipe": plan.recipe,
        "steps": plan.steps,
        "always": WATCH,
        "task": TASK,
        "arms": ARMS,
        "timed_from": timed_from,
    }
    return about | {"rows": rows, "curves": curves}


def table(answer: dict[str, Any]) -> str:
    """Markdown."""
    head = (
        "arm",
        "seeds",
        "validation before",
        "at the end (least to most)",
        "reward, first 10 steps",
        "last 10",
        "response tokens, first 10",
        "last 10",
        "rollout s (stock over it)",
        "all steps s (stock over it)",
        "pairs timed",
        "groups / not n rows / requests left",
    )
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for arm in WORDS:
        if row := answer["rows"].get(arm):
            span = f"{row['validation_end']:.3f} ({row['validation_least']:.3f} to {row['validation_most']:.3f})"
            cells = [WORDS[arm], str(row["seeds"]), f"{row['validation_before']:.3f}", span]
            cells += [f"{row['reward_first_10']:.3f}", f"{row['reward_last_10']:.3f}"]
            cells += [f"{row['response_tokens_first_10']:.0f}", f"{row['response_tokens_last_10']:.0f}"]
            timed = row["timed_pairs"] > 0
            cells += [f"{row[f'{what}_s']:.0f} ({row[f'{what}_ratio']:.2f})" if timed else "" for what in ("rollout", "step")]
            cells += [str(row["timed_pairs"]), f"{row['groups']} / {row['wrong_groups']} / {row['requests_left']}"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(answer: dict[str, Any], path: Path) -> None:
    """Validation by step and by clock, reward and length of what was trained on by step; a line per arm, thin ones its seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 8), layout="constrained", facecolor="white")
    (by_step, by_time), (reward, tokens) = figure.subplots(2, 2)
    for arm, runs in answer["curves"].items():
        style = {"color": COLORS[arm]}
        for pair, curve in runs.items():
            by_step.plot(curve["validation_step"], curve["validation"], lw=0.6, alpha=0.5, **style)
            if int(pair) >= answer["timed_from"]:
                clock = [0.0, *accumulate(curve["step_s"])]
                by_time.plot([clock[int(step)] for step in curve["validation_step"]], curve["validation"], lw=1, marker=".", **style)
        mean = _mean([curve["validation"] for curve in runs.values()])
        by_step.plot([EVERY * number for number in range(len(mean))], mean, lw=2.2, label=f"{WORDS[arm]} ({len(runs)} seeds)", **style)
        for axes, what in ((reward, "reward"), (tokens, "response_tokens")):
            smooth = _smooth(_mean([curve[what] for curve in runs.values()]))
            axes.plot(range(SMOOTH, len(smooth) + SMOOTH), smooth, lw=1.8, **style)
    by_step.set(xlabel="step", ylabel="reward", title="validation, sampled, unshaped: mean of the seeds, and each")
    by_time.set(xlabel="seconds in steps (verl's clock)", ylabel="reward", title="the same over time, runs on a quiet machine")
    reward.set(xlabel="step", ylabel="reward", title=f"what was trained on, mean of {SMOOTH} steps and the seeds: reward")
    tokens.set(xlabel="step", ylabel="tokens", title="its response length")
    by_step.legend(frameon=False, fontsize=9)
    for axes in (by_step, by_time, reward, tokens):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.suptitle("math recipe, a model of half a megabyte, real verl and vLLM on a CPU")
    figure.savefig(path, dpi=110)


def _mean(curves: list[list[float]]) -> list[float]:
    return [fmean(values) for values in zip(*curves, strict=False)]


def _smooth(values: list[float]) -> list[float]:
    return [fmean(values[end - SMOOTH : end]) for end in range(SMOOTH, len(values) + 1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/learning"), help="folder of the comparison")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--report-only", action="store_true", help="run nothing, read what is there")
    parser.add_argument("--timed-from", type=int, default=1, help="pairs before this one ran beside other work: their times do not count")
    parser.add_argument("--json", type=Path, default=RESULT)
    parser.add_argument("--png", type=Path, default=PICTURE)
    parser.add_argument("overrides", nargs="*", help="after --: words added to every arm's command")
    args = parser.parse_args()
    if not args.report_only:
        compare(args.out, args.seeds, args.steps, args.overrides)
    answer = gathered(args.out, args.timed_from)
    save(args.json, answer)
    draw(answer, args.png)
    lines = table(answer)
    if args.json == RESULT:
        fill(ROOT / "bench/learning/README.md", "arms", lines)
    print(lines)


if __name__ == "__main__":
    main()
