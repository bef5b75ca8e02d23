"""`verl-heddle trace`: import other tools' logs as traces; describe, merge and cut traces."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verl_heddle.commands.asking import _positive, answered, check_writable, one_line

if TYPE_CHECKING:
    from verl_heddle.trajectory import Trajectory

EXAMPLES = """\
examples:
  import an agent's logs to simulate; the format is detected
      verl-heddle trace import logs/*.traj --out agent.jsonl.gz
      verl-heddle simulate --trace agent.jsonl.gz --model qwen3-14b

  describe it: lengths, spread, tools, contexts
      verl-heddle trace describe agent.jsonl.gz

  count tokens with a tokenizer instead of characters / 4
      verl-heddle trace import chats.jsonl --tokenizer Qwen/Qwen3-8B --out chats.trace.jsonl

simulate, plan and describe also accept such files and import them first. No text is kept. Formats: docs/import.md.
"""


def add_parser(subparsers: Any) -> None:
    """Declare the command."""
    parser = subparsers.add_parser(
        "trace",
        help="import other tools' logs, describe traces, merge and cut them",
        description="Make traces from files of other tools, and describe, merge and cut traces.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.error = one_line(parser.prog)
    what = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    for name, help_text, several in (
        ("import", "make one trace from files in other formats", True),
        ("describe", "describe a trace, or a file in another format, in words and one chart", False),
        ("merge", "join several traces into one", True),
        ("head", "keep the first trajectories of a trace", False),
    ):
        command = what.add_parser(name, help=help_text, description=help_text, formatter_class=argparse.RawDescriptionHelpFormatter)
        command.error = one_line(command.prog)  # type: ignore[method-assign]
        command.add_argument("files", nargs="+" if several else 1, metavar="FILE", help="a file; for heddle traces also a folder")
        if name == "merge":
            command.set_defaults(format=None, tokenizer=None)
        else:
            command.add_argument("--format", help="format of a file of another tool (default: detected from its content)")
            command.add_argument("--tokenizer", metavar="NAME", help="folder or name of a Hugging Face tokenizer (default: characters / 4)")
        if name == "head":
            command.add_argument("-n", type=_positive, default=100, metavar="N", help="number of trajectories (default 100)")
        if name != "describe":
            command.add_argument("--out", required=True, metavar="FILE", help="the trace to write; compressed if it ends in .gz")
            command.add_argument("--force", action="store_true", help="replace FILE if it exists")


def run(args: argparse.Namespace) -> int:
    """Run the subcommand; the exit code is 0, or 2 for an error the user can fix."""
    return answered(args, _run)


def _run(args: argparse.Namespace) -> int:
    if args.what == "describe":
        from verl_heddle.report.workload_words import words

        print("\n".join(words(_items(args, args.files[0]))))
        return 0
    check_writable(args.out)
    if Path(args.out).exists() and not args.force:
        raise ValueError(f"{args.out} already exists; --force replaces it")
    if Path(args.out).resolve() in {Path(file).resolve() for file in args.files}:
        raise ValueError(f"{args.out} is one of the input files")
    from verl_heddle.traces import write

    every = chain.from_iterable(_items(args, file) for file in args.files)
    number = write(args.out, islice(every, args.n) if args.what == "head" else every)
    print(f"wrote {args.out}: {number:,} trajectories")
    return 0


def _items(args: argparse.Namespace, file: str) -> Iterator[Trajectory]:
    """Yield the trajectories of one file; print the import's summary on stderr after the last one."""
    from verl_heddle.traces.importers.counting import Tally
    from verl_heddle.traces.importers.formats import trajectories

    def note(text: str) -> None:
        print(f"{file}: {text}", file=sys.stderr)

    items, found = trajectories(file, args.format, Tally(args.tokenizer), note)
    yield from items
    for line in found.told() if found is not None else ():
        note(line)
