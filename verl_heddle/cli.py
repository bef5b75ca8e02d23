"""`verl-heddle`: the command line. Each command is a thin call into the room that knows; imports are lazy, so `--help` is instant."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import verl_heddle

EPILOG = """\
The plugin itself needs no command: add +plugin=heddle to a stock verl command line.

    python -m verl.trainer.main_ppo ... +plugin=heddle                  switch it on
    python -m verl.trainer.main_ppo ... +plugin=observe                 stock decisions, heddle's instruments
    python -m verl.trainer.main_ppo ... +plugin=heddle +machine=cpu     without a GPU
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="verl-heddle", description=verl_heddle.__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=verl_heddle.__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    doctor = commands.add_parser(
        "doctor",
        help="check versions, every seam of verl and vLLM, and a verl command line",
        description="Check versions and every seam of verl and vLLM that heddle uses. With a verl command line after --, check that too. "
        "Exit code: 0 all well, 1 runs but something is off, 2 does not run.",
    )
    doctor.add_argument(
        "verl_command", nargs="*", metavar="-- VERL COMMAND", help="e.g. -- python -m verl.trainer.main_ppo ... +plugin=heddle"
    )

    overrides = commands.add_parser(
        "overrides",
        help="every key the flag sets, and every heddle.* option, with its default and why",
        description="Print every verl key a config group sets (value, verl's own value, why) and every heddle.* option.",
    )
    overrides.add_argument("--markdown", action="store_true", help="as the docs page docs/configuration.md")

    args = parser.parse_args(argv)
    if args.command == "doctor":
        from verl_heddle.verl_plugin.doctor import doctor as run

        return run(args.verl_command)
    from verl_heddle.verl_plugin import overrides_page

    print(overrides_page.markdown() if args.markdown else overrides_page.text(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
