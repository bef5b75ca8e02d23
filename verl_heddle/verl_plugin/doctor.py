"""`verl-heddle doctor`: can heddle work in this environment, and with this command line?"""

from __future__ import annotations

import logging
import os
import platform
import re
import sys
import warnings
from collections.abc import Sequence, Set
from importlib import metadata

from omegaconf import DictConfig

from verl_heddle.options import Options
from verl_heddle.verl_plugin import compat, lint, parts
from verl_heddle.verl_plugin.command_line import Command, read
from verl_heddle.verl_plugin.overrides import compose
from verl_heddle.verl_plugin.verl_keys import gone

OK, WORKS_LESS, BROKEN = 0, 1, 2
"""Exit codes: all well; runs, but something is off, untested or unread; does not run, or heddle would do nothing, or nothing was read."""


SWEPT = 8
"""Jobs of a sweep (--multirun) that are checked."""


def doctor(words: Sequence[str]) -> int:
    """Print versions, seams and, for a given verl command line, what is wrong with it; returns the exit code."""
    _quiet()
    if not words:
        return max(_versions(), _seams())
    try:
        command = read(words)
    except ValueError as error:
        return max(_versions(), _seams(), _error(str(error)))
    before = os.environ.copy()
    os.environ |= command.environment  # before verl is imported, which reads some of them then
    try:
        return max(_versions(), _seams(), _command(command))
    finally:
        os.environ.clear()
        os.environ |= before


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
    for note in shared_files({name for found in metadata.distributions() if (name := found.metadata["Name"])}):
        worst = max(worst, WORKS_LESS)
        print(f"  {note}")
    return worst


ONE_OF = {"xgboost": "the module xgboost, of which prediction needs one", "nvidia-nccl-cu": "libnccl.so.2, which torch loads"}
"""Beginnings of distributions' names -> the same files that they all hold: the last one installed has overwritten the others'."""


def shared_files(installed: Set[str]) -> list[str]:
    """What is wrong with distributions that overwrite each other's files, and with an xgboost that is missing, a line each."""
    notes = []
    for beginning, files in ONE_OF.items():
        found = sorted(name for name in installed if re.fullmatch(rf"{beginning}(-cpu|\d*)", name))
        if len(found) > 1:
            notes.append(f"{' and '.join(found)} both hold {files}: uninstall both, then install the one you want")
        if not found and beginning == "xgboost":
            notes.append("xgboost is missing: no prediction; pip install xgboost-cpu")
    return notes


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


def _command(command: Command) -> int:
    print("Command line")
    worst = OK
    for why in command.unread:
        print(f"  not checked: {why}")
        worst = WORKS_LESS
    if command.main is None and not command.overrides:
        return BROKEN
    try:
        jobs = _jobs(command)
    except Exception as error:
        return _error(_line(error))
    for number, overrides in enumerate(jobs[:SWEPT], start=1):
        if len(jobs) > 1:
            print(f"  job {number} of {len(jobs)}: {' '.join(word for word in overrides if word not in command.overrides)}")
        worst = max(worst, _job(command, overrides))
    if len(jobs) > SWEPT:
        print(f"  not checked: the other {len(jobs) - SWEPT} jobs of the sweep")
        worst = max(worst, WORKS_LESS)
    return worst


def _jobs(command: Command) -> list[list[str]]:
    """The overrides of each job: one, or those of a sweep."""
    if not command.multirun:
        return [list(command.overrides)]
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    batches = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(list(command.overrides)), None)
    return [job for batch in batches for job in batch]


def _job(command: Command, overrides: Sequence[str]) -> int:
    try:
        config = compose(overrides, command)
    except Exception as error:
        return _refused(command, overrides, error)
    if "heddle" not in config:
        print("  stock verl: add +plugin=heddle to switch heddle on")
        return OK
    findings = lint.lint(config)
    for finding in findings:
        print(f"  {'error' if finding.fatal or finding.grave else 'warning'}: {finding.text}")
    if (options := lint.options_or_none(config)) is not None:
        _table(config, options)
    if not findings and not command.unread:
        print("  OK")
    return BROKEN if any(finding.fatal or finding.grave for finding in findings) else WORKS_LESS if findings else OK


def _table(config: DictConfig, options: Options) -> None:
    rows = parts.table(config, options)
    width = max(len(row.part) for row in rows)
    print(f"  {'part':<{width}}  {'':<3}  why")
    for row in rows:
        print(f"  {row.part:<{width}}  {'on' if row.on else 'off':<3}  {row.why}")


def _refused(command: Command, overrides: Sequence[str], error: Exception) -> int:
    """Say whether the fault is the command's own, which stock verl refuses as well."""
    stock = [word for word in overrides if not word.lstrip("+~").startswith(("plugin=", "machine=", "heddle."))]
    try:
        compose(stock, command)
    except Exception as own:
        for line in gone(stock):
            _error(line)
        return _error(f"stock verl refuses this command, without the flag as with it: {_line(own)}")
    return _error(_line(error))


def _error(text: str) -> int:
    print(f"  error: {text}")
    return BROKEN


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


if __name__ == "__main__":
    sys.exit(doctor(sys.argv[1:]))
