"""A finished comparison of the fake trainer, made once, and the command as a user types it."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

FAKE = (sys.executable, str(Path(__file__).with_name("fake_trainer.py")))


@dataclass(frozen=True)
class Done:
    """What a call left."""

    code: int
    out: str
    err: str


def environment(**extra: str) -> dict[str, str]:
    """This one's, without what would change W&B or mark a run."""
    dropped = ("WANDB_MODE", "WANDB_API_KEY", "VERL_HEDDLE_RUN", "WANDB_JOB_TYPE")
    return {k: v for k, v in os.environ.items() if k not in dropped} | {"NETRC": "/nowhere", **extra}


def compare(*words: str, command: tuple[str, ...] = FAKE, **extra: str) -> Done:
    """Run `verl-heddle compare <words> -- <command>`; with `extra` environment variables."""
    typed = [sys.executable, "-m", "verl_heddle.cli", "compare", *words, *(["--", *command] if command else [])]
    done = subprocess.run(typed, capture_output=True, text=True, timeout=300, env=environment(**extra))
    return Done(done.returncode, done.stdout, done.stderr)
