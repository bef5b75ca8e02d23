"""`verl-heddle doctor`: can heddle work here, and with this command line?"""

from __future__ import annotations

import argparse
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Declare the command."""
    parser = subparsers.add_parser(
        "doctor",
        help="check versions, every seam of verl and vLLM, and a verl command line",
        description="Check versions and every seam of verl and vLLM that heddle uses. With a verl command line after --, check that too. "
        "The command may be that of a run script: variables before python, ray job submit, Hydra's own options, a main of your own. "
        "Exit code: 0 all well; 1 runs, but something is off or could not be checked; 2 does not run, or heddle would do nothing.",
    )
    parser.add_argument(
        "verl_command", nargs="*", metavar="-- VERL COMMAND", help="e.g. -- python -m verl.trainer.main_ppo ... +plugin=heddle"
    )


def run(args: argparse.Namespace) -> int:
    """Examine; see the description for the exit code."""
    from verl_heddle.verl_plugin.doctor import doctor

    return doctor(args.verl_command)
