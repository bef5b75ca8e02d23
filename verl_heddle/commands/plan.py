"""`verl-heddle plan`: which tensor-parallel degree and settings to use, and the overrides to paste."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from verl_heddle.commands.asking import Meter, add_arguments, answered, check_writable, setting_of, shell_line, source_of

EXAMPLES = """\
examples:
  choose the tensor parallelism for a coding agent on two nodes
      verl-heddle plan --workload coding --model qwen3-32b --gpus 16

  your own run, recorded by +plugin=observe, compared with the tp you use now
      verl-heddle plan --trace checkpoints/p/e/heddle/trace.jsonl --model qwen3-14b --gpus 64 --tp 2 --slots 256

Every fixed degree that fits the model is simulated under stock verl and under heddle. Heddle is also simulated on mixed degrees if a
mix is forecast to beat one degree for all replicas. A change is recommended only if it is faster in every draw.
"""


def add_parser(subparsers: Any) -> None:
    """Declare the command."""
    parser = subparsers.add_parser(
        "plan",
        help="which tensor parallelism and settings to use, with the overrides to paste",
        description="Rank tensor-parallel degrees, fixed under stock verl and heddle, and mixed under heddle; print the overrides to add "
        "to your verl command.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    files = parser.add_argument_group("output besides the ranking")
    files.add_argument("--json", metavar="FILE", help="all results as JSON, with the keys of simulate; - prints it instead of the ranking")
    files.add_argument("--html", metavar="FILE", help="one self-contained page with all results")


def run(args: argparse.Namespace) -> int:
    """Rank and recommend; the exit code is 0, or 2 for an error the user can fix."""
    return answered(args, _run)


def _run(args: argparse.Namespace) -> int:
    from verl_heddle.report.advice import advise, told
    from verl_heddle.report.document import document
    from verl_heddle.report.study import ranking
    from verl_heddle.report.text import plan_report

    setting = setting_of(args)
    check_writable(args.json, args.html)
    source = source_of(args)
    meter = Meter()
    try:
        answer = ranking(setting, source, args.jobs, meter)
        advice = advise(answer, args.jobs)
    finally:
        meter.close()
    sentences = told(answer, advice)
    if args.json != "-":
        print(plan_report(answer, advice, sentences), end="")
    if args.json is not None:
        text = json.dumps(document(answer, sentences, advice), indent=1) + "\n"
        if args.json == "-":
            print(text, end="")
        else:
            Path(args.json).write_text(text)
    if args.html is not None:
        from verl_heddle.report.figure import scenes
        from verl_heddle.report.page import page

        stays = (advice.row.rule, advice.row.tp) == ("stock", setting.tp)
        shown = scenes(answer, ["stock"] if stays else ["stock", advice.row.name])
        Path(args.html).write_text(page(answer, sentences, shown, shell_line(), advice), encoding="utf-8")
    return 0
