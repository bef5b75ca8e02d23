"""GRPO through verl's trainer for a few steps, stock decisions against heddle: `recipes/math/run.sh` with `+plugin=observe` and
`+plugin=heddle`.

A policy of random weights and the 0.6B shape, made on the spot (`shapes.write_policy`): its trajectories end by chance, so lengths are
geometric and nothing about a prompt tells them; one turn each, since it calls no tools. So the order cannot win here by prediction: what is
measured is what the whole loop costs with the plugin on, in absolute seconds by phase, with sleep and weight sync of a hybrid replica.
The expected ratio is 1. Both arms have the same instruments and the same 0.1 s poll. The order of the arms is stock, then heddle.
"""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

from bench.gpu.one import Run
from bench.gpu.profiles import Profile
from bench.gpu.results import Prediction, Row
from bench.gpu.shapes import write_policy
from verl_heddle.compare.campaign import stop, tail
from verl_heddle.compare.launch import MARK

TITLE = "GRPO end to end, one hybrid replica: stock verl against heddle, seconds by phase"
CAVEATS = (
    "Random weights: geometric lengths of one turn that no prompt foretells; the order cannot win by prediction here.",
    "Medians over the steps after the first; few of them, one run an arm.",
)
ROOT = Path(__file__).resolve().parents[3]
ARMS = {"stock": "+plugin=observe", "heddle": "+plugin=heddle"}
PHASES = {
    "heddle/makespan_s": "rollout makespan",
    "timing_s/gen": "generation as verl times it",
    "timing_s/update_actor": "actor update",
    "timing_s/update_weights": "weight sync",
    "timing_s/step": "whole step",
}
NUMBER = re.compile(r"(?:np\.\w+\()?(-?\d+(?:\.\d+)?(?:e[+-]?\d+)?)\)?")


def predict(profile: Profile) -> Prediction:
    """The ratio; of absolute seconds nobody knows."""
    rows = [Row(f"{arm}: {phase}", "s") for arm in ARMS for phase in PHASES.values()]
    rows += [Row("stock / heddle, rollout makespan", "x", 1.0), Row("stock / heddle, whole step", "x", 1.0)]
    return Prediction(tuple(rows), "lengths that nothing foretells, and a plugin that should cost nothing: ratio 1")


def steps(log: str) -> dict[int, dict[str, float]]:
    """Metrics by step, from verl's console lines "step:1 - name:value - ..."."""
    told: dict[int, dict[str, float]] = {}
    for line in re.findall(r"step:\d+ - .*", log):
        numbers = {}
        for pair in line.split(" - "):
            key, _, value = pair.strip().rpartition(":")
            if found := NUMBER.fullmatch(value):
                numbers[key] = float(found[1])
        if "step" in numbers:
            told[int(numbers.pop("step"))] = numbers
    return told


def command(profile: Profile, arm: str, model: Path, out: Path) -> tuple[list[str], dict[str, str]]:
    """The recipe's own script, and its environment beside this process's."""
    job = profile.endtoend
    overrides = [ARMS[arm], *job.overrides, "trainer.logger=[console]", "data.val_max_samples=4"]
    variables = {
        "OUT": str(out),
        "NAME": arm,
        "MODEL": str(model),
        "STEPS": str(job.steps),
        "GPUS": str(job.gpus),
        "TRAIN_ROWS": str(job.rows),
        "VAL_ROWS": "4",
        "PYTHON": sys.executable,
        "WANDB_MODE": "offline",
    }
    return ["bash", str(ROOT / "recipes/math/run.sh"), *overrides], variables


async def measure(run: Run) -> None:
    """Both arms; each may take half of the time that is left when it begins, the second all of it."""
    job = run.profile.endtoend
    model, out = run.scratch / "policy", run.scratch / "endtoend"
    await asyncio.to_thread(write_policy, job.shape, model, job.mean_tokens, "cpu" if run.profile.device == "cpu" else "cuda")
    if run.profile.device != "cpu":
        import torch

        torch.cuda.empty_cache()
    seconds: dict[str, dict[str, float]] = {}
    for number, arm in enumerate(ARMS):
        seen = await asyncio.to_thread(_train, run, arm, model, out, run.left_s() / (len(ARMS) - number) - 5)
        later = [seen[step] for step in sorted(seen)[1:]] or list(seen.values())
        run.note(**{arm: {"steps": {str(step): _kept(metrics) for step, metrics in seen.items()}}})
        for key, phase in PHASES.items():
            found = [metrics[key] for metrics in later if key in metrics]
            if found:
                seconds.setdefault(arm, {})[phase] = median(found)
                run.put(f"{arm}: {phase}", median(found), steps=len(found))
    for phase in ("rollout makespan", "whole step"):
        run.put(f"stock / heddle, {phase}", seconds["stock"][phase] / seconds["heddle"][phase])


def _train(run: Run, arm: str, model: Path, out: Path, limit_s: float) -> dict[int, dict[str, float]]:
    """One run of the recipe; its metrics by step.

    Raises:
        RuntimeError: it failed, printed no step, or took too long; with the end of its log.
    """
    line, variables = command(run.profile, arm, model, out)
    log = run.out / "logs" / f"endtoend-{arm}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    mark = f"{os.environ.get(MARK, 'endtoend')}-{arm}"  # of its own, so that what it leaves behind can be ended without ending us
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | variables | {MARK: mark}
    print(f"engine and trainer of {arm} start, log {log}", flush=True)
    with open(log, "wb") as file:
        process = subprocess.Popen(line, env=environment, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True)
        try:
            code: int | None = process.wait(timeout=max(1.0, limit_s))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            stop(mark, [process.pid])
    seen = steps(log.read_text(errors="replace"))
    if code != 0 or not seen:
        why = f"took more than {limit_s:.0f} s" if code is None else f"exit status {code}, {len(seen)} steps"
        raise RuntimeError(f"{arm}: {why}: {' | '.join(tail(log, 6))[-1200:]}")
    return seen


def _kept(metrics: dict[str, float]) -> dict[str, Any]:
    """Of the metrics those that a reader of seconds wants."""
    wanted = ("timing_s/", "heddle/", "response_length/", "perf/")
    return {key: value for key, value in metrics.items() if key.startswith(wanted)}
