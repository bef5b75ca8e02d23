"""`verl-heddle`: the command-line entry point. Each command is a module in `commands`; imports are lazy, so `--help` is instant."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import verl_heddle
from verl_heddle.commands import compare, doctor, explain, overrides, plan, simulate, trace

MODULES = {
    "doctor": doctor,
    "overrides": overrides,
    "simulate": simulate,
    "plan": plan,
    "compare": compare,
    "explain": explain,
    "trace": trace,
}

EPILOG = """\
The plugin itself needs no command: add +plugin=heddle to a stock verl command line.

    python -m verl.trainer.main_ppo ... +plugin=heddle                  switch it on
    python -m verl.trainer.main_ppo ... +plugin=observe                 stock decisions, heddle's metrics and traces
    python -m verl.trainer.main_ppo ... +plugin=heddle +machine=cpu     without a GPU
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, run the command, and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="verl-heddle", description=verl_heddle.__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=verl_heddle.__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    for module in MODULES.values():
        module.add_parser(commands)
    args = parser.parse_args(argv)
    return MODULES[args.command].run(args)


if __name__ == "__main__":
    sys.exit(main())
