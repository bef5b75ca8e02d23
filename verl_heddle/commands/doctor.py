"""`verl-heddle doctor`: check that heddle works in this environment and with a given command line."""

from __future__ import annotations

import argparse
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Declare the command."""
    parser = subparsers.add_parser(
        "doctor",
        help="check versions, every seam of verl and vLLM, and a verl command line",
        description="Check versions and every seam of verl and vLLM that heddle uses. With a verl command line after --, check that too. "
        "The command may come from a run script: variables before python, ray job submit, Hydra's own options, your own main. "
        "Exit code: 0 all checks passed; 1 runs, but something is wrong or unchecked; 2 does not run, or heddle would do nothing.",
    )
    parser.add_argument(
        "verl_command", nargs="*", metavar="-- VERL COMMAND", help="e.g. -- python -m verl.trainer.main_ppo ... +plugin=heddle"
    )


def run(args: argparse.Namespace) -> int:
    """Run the checks; the parser's description lists the exit codes."""
    from verl_heddle.verl_plugin.doctor import doctor

    return doctor(args.verl_command)
