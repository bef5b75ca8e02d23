"""`verl-heddle doctor`: can heddle work in this environment, and with this command line?"""

from __future__ import annotations

import logging
import os
import platform
import sys
import warnings
from collections.abc import Sequence
from importlib import metadata

from verl_heddle.verl_plugin import compat, lint
from verl_heddle.verl_plugin.overrides import arguments_of, compose

OK, WORKS_LESS, BROKEN = 0, 1, 2
"""Exit codes: all well; runs, but something is off or untested; does not run."""


def doctor(command: Sequence[str]) -> int:
    """Print versions, seams and, for a given verl command line, what is wrong with it; returns the exit code."""
    _quiet()
    return max(_versions(), _seams(), _command(command) if command else OK)


def _quiet() -> None:
    """Importing verl and vLLM says much that does not matter here."""
    os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "VERL_LOGGING_LEVEL": "ERROR", "TRANSFORMERS_VERBOSITY": "error"}
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")


def _versions() -> int:
    print("Environment")
    worst = OK
    print(f"  {'python':<14}{platform.python_version():<16}supported: 3.11, 3.12")
    for name in ("verl", "vllm", "torch", "ray", "TransferQueue", "transformers"):
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            found = "missing"
        supported = compat.SUPPORTED.get(name)
        if found == "missing":
            worst = max(worst, BROKEN)
            note = "install it"
        elif supported and found.split("+")[0] not in supported:
            worst = max(worst, WORKS_LESS)
            note = f"untested; supported: {', '.join(supported)}"
        else:
            note = f"supported: {', '.join(supported)}" if supported else ""
        print(f"  {name:<14}{found:<16}{note}".rstrip())
    return worst


def _seams() -> int:
    print("Seams (importing verl and vLLM, some seconds)", flush=True)
    worst = OK
    for result in compat.examine():
        if result.error is None:
            print(f"  OK       {result.seam.name}")
            continue
        worst = max(worst, BROKEN if result.seam.needed else WORKS_LESS)
        print(f"  MISSING  {result.seam.name}: {result.error}\n           consequence: {result.seam.consequence}")
    return worst


def _command(command: Sequence[str]) -> int:
    print("Command line")
    overrides = arguments_of(command)
    if not any(word.startswith(("+plugin=", "plugin=", "++plugin=")) for word in overrides):
        print("  stock verl: add +plugin=heddle to switch heddle on")
        return OK
    try:
        config = compose(overrides)
    except Exception as error:
        print(f"  error: {' '.join(str(error).split())}")
        return BROKEN
    findings = lint.lint(config)
    for finding in findings:
        print(f"  {finding}")
    if not findings:
        print("  OK")
    return BROKEN if any(f.fatal for f in findings) else WORKS_LESS if findings else OK


if __name__ == "__main__":
    sys.exit(doctor(sys.argv[1:]))
