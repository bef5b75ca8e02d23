"""`verl-heddle overrides`: every key the flag sets, and every option."""

from __future__ import annotations

import argparse
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Declare the command."""
    parser = subparsers.add_parser(
        "overrides",
        help="every key the flag sets, and every heddle.* option, with its default and why",
        description="Print every verl key a config group sets (value, verl's own value, why) and every heddle.* option.",
    )
    parser.add_argument("--markdown", action="store_true", help="as the docs page docs/configuration.md")


def run(args: argparse.Namespace) -> int:
    """Print; always 0."""
    from verl_heddle.verl_plugin.overrides import markdown, text

    print(markdown() if args.markdown else text(), end="")
    return 0
