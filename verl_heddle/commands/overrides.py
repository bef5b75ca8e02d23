"""`verl-heddle overrides`: print every verl key the plugin sets and every heddle option."""

from __future__ import annotations

import argparse
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Declare the command."""
    parser = subparsers.add_parser(
        "overrides",
        help="list every verl key +plugin=heddle sets and every heddle.* option, with defaults and reasons",
        description="Print every verl key a config group sets (value, verl's own value, why) and every heddle.* option.",
    )
    parser.add_argument("--markdown", action="store_true", help="print the docs page docs/configuration.md")


def run(args: argparse.Namespace) -> int:
    """Print the list; always returns 0."""
    from verl_heddle.verl_plugin.overrides import markdown, text

    print(markdown() if args.markdown else text(), end="")
    return 0
