"""Builds the command line and environment of one run: the user's command, the arm's overrides, and settings that isolate runs.

The isolating settings come last, so they take precedence: output paths, run name, seeds, W&B group and tags, and verl's `file` logger, from
which the run's metrics are read. Checkpoints are not saved (`trainer.save_freq=-1`). Environment variables are also passed through Ray's
runtime_env, because on a cluster the process that logs does not inherit this process's environment.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from verl_heddle.compare.plan import Key, Plan

METRICS = "metrics.jsonl"
TRACE = "heddle"
LOG = "train.log"

MARK = "VERL_HEDDLE_RUN"
"""Environment variable that every process of a run carries; its value is the run's folder. It identifies leftover processes."""

OUTPUTS = {"trainer.rollout_data_dir": "rollouts", "trainer.validation_data_dir": "validation"}
"""Optional output folders of verl, and their names in a run's folder; if the command sets one, each run gets its own."""

_PLAIN = re.compile(r"[A-Za-z_/][A-Za-z0-9_./-]*")


@dataclass(frozen=True, slots=True)
class Launch:
    """How to start a run: `environment` is added to the caller's."""

    command: tuple[str, ...]
    environment: Mapping[str, str]


def launch(plan: Plan, key: Key, out: Path, environment: Mapping[str, str]) -> Launch:
    """The launch of one run. `environment` is the caller's; only W&B's settings are read from it."""
    arm, run = plan.arm(key.arm), out / "runs" / key.folder
    seed = plan.seed_of(key.pair)
    variables = {
        "WANDB_DIR": str(run),
        "WANDB_RUN_GROUP": plan.name,
        "WANDB_JOB_TYPE": key.arm,
        "WANDB_TAGS": f"arm:{key.arm},pair:{key.pair}",
        "VERL_FILE_LOGGER_PATH": str(run / METRICS),
    }
    if plan.wandb and wandb_offline(environment):
        variables["WANDB_MODE"] = "offline"
    loggers = "console,file,wandb" if plan.wandb else "console,file"
    overrides = [
        *arm.overrides,
        override("trainer.experiment_name", f"{plan.name}-{key.folder}"),
        override("trainer.default_local_dir", str(run / "checkpoints")),
        override("hydra.run.dir", str(run / "hydra")),
        f"trainer.logger=[{loggers}]",
        "trainer.save_freq=-1",
        f"data.seed={seed}",
        f"actor_rollout_ref.rollout.seed={seed}",
        f"actor_rollout_ref.actor.data_loader_seed={seed}",
    ]
    overrides += [
        override(name, str(run / folder)) for name, folder in OUTPUTS.items() if any(w.startswith(f"{name}=") for w in plan.command)
    ]
    if plan.steps is not None:
        overrides.append(f"trainer.total_training_steps={plan.steps}")
    if not arm.bare:
        overrides += [f"heddle.seed={seed}", override("heddle.trace.dir", str(run / TRACE)), "heddle.trace.enable=true"]
    overrides += [override(f"++ray_kwargs.ray_init.runtime_env.env_vars.{name}", value, True) for name, value in variables.items()]
    extra: dict[str, str] = {}
    if plan.recipe is not None:
        extra |= {"OUT": str(out / "runs"), "NAME": key.folder, "PYTHON": sys.executable}
        if plan.steps is not None:
            extra["STEPS"] = str(plan.steps)
    return Launch((*plan.command, *overrides), {**variables, **extra, MARK: str(run)})


def override(key: str, value: str, text: bool = False) -> str:
    """A Hydra override with a text value, quoted if Hydra would parse it as something else, or always if `text` is set.

    Raises:
        ValueError: verl's configuration cannot represent the value; one line.
    """
    if "${" in value or value == "???":  # verl resolves its configuration twice, so no escape survives
        raise ValueError(f"{value!r} cannot be a value of {key.lstrip('+')}: Hydra interprets ${{ and ???; use a different --out or --name")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{value!r} cannot be a value of {key.lstrip('+')}: it is not UTF-8; use a different --out or --name") from None
    if not text and _PLAIN.fullmatch(value) and value.lower() not in ("null", "none", "true", "false", "nan", "inf", "-inf"):
        return f"{key}={value}"
    escaped = re.sub(r"(\\+)(?='|$)", r"\1\1", value).replace("'", r"\'")
    return f"{key}='{escaped}'"


def wandb_offline(environment: Mapping[str, str]) -> bool:
    """Whether runs must log to W&B offline: the user set no mode and there is no API key. `wandb sync` can upload them later."""
    if environment.get("WANDB_MODE") or environment.get("WANDB_API_KEY"):
        return False
    netrc = Path(environment.get("NETRC") or os.path.expanduser("~/.netrc"))
    try:
        return "wandb" not in netrc.read_text(errors="replace")
    except OSError:
        return True
