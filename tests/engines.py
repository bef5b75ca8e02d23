"""What the tests with real engines share: a way to make a recipe's data and model, and to run verl as a user does."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CPU_ENVIRONMENT = {
    "VERL_PLATFORM": "cpu",
    "VERL_ENGINE_DEVICE": "cuda",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
}
"""For engines started by a test itself; runs of verl get theirs from +machine=cpu."""

PORT_TAKEN = "EADDRINUSE"
"""verl picks a port in one process and binds it in another; once in about 20 runs another process was faster. One retry."""

RUN_TIMEOUT_S = 900

PREDICTING = ("heddle.priority.order=longest", "heddle.preempt.enable=true", "heddle.residents.enable=false")
"""The order by predicted length, as `Options.longest` has it."""

LITTLE_KV = "+actor_rollout_ref.rollout.engine_kwargs.vllm.num_gpu_blocks_override=16"
"""Engines that hold a fraction of the contexts: a block is 128 tokens, the longest context of the math recipe wants 12."""


@dataclass(frozen=True)
class Run:
    """A finished verl run. `steps`: the logged metrics of each step."""

    folder: Path
    code: int
    log: str
    steps: dict[int, dict[str, float]]

    @property
    def said(self) -> list[str]:
        """What heddle said on the console, without the Ray prefix."""
        return re.findall(r"heddle: .*", self.log)

    @property
    def trace(self) -> Path:
        return self.folder / "heddle" / "trace.jsonl"

    def rollouts(self, step: int) -> list[tuple[str, str]]:
        """(input, output) text of every trajectory verl trained on in a step, sorted."""
        lines = (self.folder / "rollouts" / f"{step}.jsonl").read_text().splitlines()
        return sorted((row["input"], row["output"]) for row in map(json.loads, lines))


def prepared(recipe: str, folder: Path, model_steps: int | None = None) -> Path:
    """Make a recipe's data and tiny model in `folder`; a model of fewer `model_steps` than the recipe's own knows less."""
    rows = ["--train-rows", "16", "--val-rows", "16"]
    weaker = [] if model_steps is None else ["--model-steps", str(model_steps)]
    command = [sys.executable, str(ROOT / "recipes" / recipe / "prepare.py"), "--out", str(folder), *rows, "--model", *weaker]
    subprocess.run(command, check=True, timeout=600, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return folder


def runner(recipe: str, folder: Path, root: Path = ROOT, python: Path | str = sys.executable) -> Callable[..., Run]:
    """Run a recipe of `root` as a user does: `run(name, *overrides, steps=1, replicas=1, env={})` -> Run."""

    def run(name: str, *overrides: str, steps: int = 1, replicas: int = 1, env: dict[str, str] | None = None) -> Run:
        settings = {"OUT": str(folder), "NAME": name, "STEPS": str(steps), "GPUS": str(replicas), "PYTHON": str(python)}
        environment = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "PYTHONDONTWRITEBYTECODE")}
        command = ["bash", str(root / "recipes" / recipe / "run.sh"), "+machine=cpu", *overrides]
        for _attempt in (1, 2):
            done = subprocess.run(
                command,
                env=environment | settings | {"WANDB_MODE": "offline"} | (env or {}),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                timeout=RUN_TIMEOUT_S,
            )
            if done.returncode == 0 or PORT_TAKEN not in done.stdout:
                break
        (folder / name / "train.log").write_text(done.stdout)
        return Run(folder / name, done.returncode, done.stdout, _steps(done.stdout))

    return run


NUMBER = re.compile(r"(?:np\.\w+\()?(-?\d+(?:\.\d+)?(?:e[+-]?\d+)?|nan|-?inf)\)?")


def _steps(log: str) -> dict[int, dict[str, float]]:
    """The console logger's lines, "step:1 - name:value - ...", as numbers."""
    steps = {}
    for line in re.findall(r"step:\d+ - .*", log):
        numbers = {}
        for pair in line.split(" - "):
            key, _, value = pair.strip().rpartition(":")
            if found := NUMBER.fullmatch(value):
                numbers[key] = float(found[1])
        steps[int(numbers.pop("step"))] = numbers
    return steps
