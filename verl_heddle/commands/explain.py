"""`verl-heddle explain`: why a recorded step was slow, and what would have made it faster."""

from __future__ import annotations

import argparse
import json
from typing import Any

from verl_heddle.commands.asking import _positive, _share, answered, one_line

EXAMPLES = """\
examples:
  the slowest step of a run
      verl-heddle explain checkpoints/p/e/heddle/trace.jsonl

  step 12 of the heddle run in a comparison's second pair
      verl-heddle explain cmp --arm heddle --pair 2 --step 12

  the effect of a different tensor parallelism: needs step times of a model on a GPU
      verl-heddle explain checkpoints/p/e/heddle --model qwen3-14b --gpu h200

Nothing is trained and no GPU is needed. What-ifs are simulated with the latency measured in the run itself, or with the table of --model
and --gpu. The output first states how well the simulator reproduces the recorded step. How to read it: docs/explain.md.
"""


def add_parser(subparsers: Any) -> None:
    """Declare the command."""
    parser = subparsers.add_parser(
        "explain",
        help="why a recorded step was slow, what would have helped, which settings to try",
        description="Show the trajectory that a step waited for, turn by turn, and simulate what would have helped.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.error = one_line(parser.prog)
    parser.usage = "%(prog)s RUN [--step K] [options]"
    parser.add_argument("run", metavar="RUN", help="a trace file, the folder it is in, or the output folder of verl-heddle compare")
    parser.add_argument("--step", type=int, metavar="K", help="training step to explain (default: the slowest)")
    parser.add_argument("--arm", metavar="NAME", help="in a comparison: this arm's runs only")
    parser.add_argument("--pair", type=_positive, metavar="N", help="in a comparison: this pair's runs only")
    parser.add_argument("--tp", type=_positive, metavar="N", help="tensor_model_parallel_size of the run, if its trace does not record it")
    parser.add_argument("--slots", type=_positive, metavar="N", help="max_num_seqs of the run, if its trace does not record it")
    parser.add_argument(
        "--model",
        metavar="MODEL",
        help="with --gpu: use step times of this model on that GPU; named as in verl-heddle simulate, e.g. qwen3-8b",
    )
    parser.add_argument("--gpu", metavar="GPU", help="named as in verl-heddle simulate, e.g. h200")
    parser.add_argument(
        "--gpu-memory-utilization",
        type=_share,
        metavar="X",
        help="gpu_memory_utilization of the run, if its trace does not record it; with --model (default 0.5, verl's)",
    )
    parser.add_argument("--json", metavar="FILE", help="all results as JSON; - prints it instead of the text")


def run(args: argparse.Namespace) -> int:
    """Explain; the exit code is 0, or 2 for an error the user can fix."""
    return answered(args, _run)


def _run(args: argparse.Namespace) -> int:
    from pathlib import Path

    from verl_heddle.commands.asking import check_writable
    from verl_heddle.report.why import why
    from verl_heddle.report.why_text import document, text

    if (args.model is None) != (args.gpu is None):
        raise ValueError("--model and --gpu go together")
    check_writable(args.json)
    table = None
    if args.model is not None:
        from verl_heddle.latency.times import times

        table = times(args.gpu, args.model).latency
    answer = why(Path(args.run), args.step, args.arm, args.pair, args.tp, args.slots, table, args.gpu_memory_utilization)
    if args.json != "-":
        print(text(answer), end="")
    if args.json is not None:
        result = json.dumps(document(answer), indent=1) + "\n"
        if args.json == "-":
            print(result, end="")
        else:
            Path(args.json).write_text(result)
    return 0
