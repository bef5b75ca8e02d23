"""The command line and environment of one run: the user's command, the arm's overrides, and what keeps runs apart.

Added to every run, after everything else, so that it wins: where its files go, its name, its seeds, W&B group and tags, and verl's `file`
logger, from which a run's own numbers are read. Checkpoints are not saved (`trainer.save_freq=-1`). Environment variables go through
Ray's runtime_env as well, because on a cluster the process that logs does not inherit this one's.
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
"""Environment variable that every process of a run carries: its folder. Left-over processes are found by it."""

OUTPUTS = {"trainer.rollout_data_dir": "rollouts", "trainer.validation_data_dir": "validation"}
"""Folders that verl fills if told to; where the command names one, each run gets its own."""

_PLAIN = re.compile(r"[A-Za-z_/][A-Za-z0-9_./-]*")


@dataclass(frozen=True, slots=True)
class Launch:
    """`environment` comes on top of the caller's."""

    command: tuple[str, ...]
    environment: Mapping[str, str]


def launch(plan: Plan, key: Key, out: Path, environment: Mapping[str, str]) -> Launch:
    """How to start a run; `environment` is the caller's, asked only for W&B's settings."""
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
    """A Hydra override whose value is text, quoted where Hydra would read something else in it; `text`: always quoted.

    Raises:
        ValueError: no configuration of verl's can hold the text; one line.
    """
    if "${" in value or value == "???":  # verl resolves its configuration twice, so that no escape survives
        raise ValueError(
            f"{value!r} cannot be a value of {key.lstrip('+')}: Hydra reads ${{ and ??? as its own; use another --out or --name"
        )
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{value!r} cannot be a value of {key.lstrip('+')}: it is not UTF-8; use another --out or --name") from None
    if not text and _PLAIN.fullmatch(value) and value.lower() not in ("null", "none", "true", "false", "nan", "inf", "-inf"):
        return f"{key}={value}"
    escaped = re.sub(r"(\\+)(?='|$)", r"\1\1", value).replace("'", r"\'")
    return f"{key}='{escaped}'"


def wandb_offline(environment: Mapping[str, str]) -> bool:
    """Whether runs must log offline: the user said nothing and there is no key to log in with (an upload can follow: `wandb sync`)."""
    if environment.get("WANDB_MODE") or environment.get("WANDB_API_KEY"):
        return False
    netrc = Path(environment.get("NETRC") or os.path.expanduser("~/.netrc"))
    try:
        return "wandb" not in netrc.read_text(errors="replace")
    except OSError:
        return True
