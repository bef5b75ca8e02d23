"""`verl-heddle simulate`: how long a step would take under stock verl, peers' rules and heddle, and what limits it."""

from __future__ import annotations

import argparse
import json
import os
import re
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verl_heddle.commands.asking import Meter, add_arguments, answered, check_writable, quick_of, setting_of, shell_line, source_of

if TYPE_CHECKING:
    from verl_heddle.report.study import Answer

DEFAULT_ARMS = (
    "stock",
    "stock_best_tp",
    "stock_tier",
    "trajectory_fcfs",
    "slime",
    "verl_star",
    "heddle",
    "heddle_place",
    "heddle_best_tp",
    "lpt_oracle",
)

OTHER_ARMS = (
    *("round_robin", "dual_threshold", "affinity_margin", "plas"),
    *("thunder_agent", "continuum", "wave_admission", "lfs", "uniboost", "heddle_longest", "heddle_tier"),
)

FILES = {"json": "simulate.json", "png": "timeline.png", "perfetto": "perfetto.json.gz", "html": "report.html"}
"""The files that `--out DIR` writes."""

EXAMPLES = """\
examples:
  a first look: a coding agent on one node of H200
      verl-heddle simulate --workload coding --model qwen3-14b

  only the answer, for a step of any size, in seconds
      verl-heddle simulate --workload coding --model qwen3-14b --gpus 1024 --quick

  your own run, recorded by +plugin=observe or +plugin=heddle, simulated on 64 GPUs
      verl-heddle simulate --trace checkpoints/p/e/heddle/trace.jsonl --model qwen3-14b --gpu h200 --gpus 64 --tp 2

  one step of it, with all outputs: a page, a timeline image, a trace for ui.perfetto.dev, JSON
      verl-heddle simulate --trace trace.jsonl --step 12 --model qwen3-8b --out step12

  slow tools and few slots
      verl-heddle simulate --workload search --set tool_mean_s=5 --model qwen3-8b --slots 32

  your own policy next to the others
      verl-heddle simulate --workload coding --model qwen3-14b --policy my_policy.py

  every peer's rule, five draws
      verl-heddle simulate --workload math --model qwen3-32b --gpus 16 --arms all --seeds 5

Nothing is trained and no GPU is needed. Step times come from a table, a roofline or your own run; the output names the source
(docs/models.md). Columns, arms and JSON keys: docs/simulate.md. To choose settings: verl-heddle plan.
"""


def add_parser(subparsers: Any) -> None:
    """Declare the command."""
    parser = subparsers.add_parser(
        "simulate",
        help="how long a step would take under stock verl, peers' rules and heddle, without a GPU",
        description="Simulate rollout steps under several rules; report what limits them and what to do.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="only the answer, in seconds: one draw of stock at every degree and of the plugin; a large step is sampled onto fewer GPUs",
    )
    parser.add_argument(
        "--arms",
        metavar="A,B,...",
        help=f"rules to simulate (stock is always included; default: {', '.join(DEFAULT_ARMS)}); also {', '.join(OTHER_ARMS)}; or 'all'",
    )
    parser.add_argument(
        "--policy",
        metavar="FILE",
        action="append",
        default=[],
        help="add your own policy as a rule: a Python file with one class (repeatable); how to write one: CONTRIBUTING.md",
    )
    files = parser.add_argument_group("output besides the table")
    files.add_argument("--json", metavar="FILE", help="all results as JSON; - prints it instead of the table")
    files.add_argument("--png", metavar="FILE", help="timeline: replicas over time, coloured by trajectory length (needs matplotlib)")
    files.add_argument(
        "--perfetto",
        metavar="FILE",
        help="every turn, for https://ui.perfetto.dev; .gz compresses (arms: those of --arms, or of the timeline)",
    )
    files.add_argument("--html", metavar="FILE", help="one self-contained page with all results")
    files.add_argument("--out", metavar="DIR", help=f"write all four to this folder: {', '.join(FILES.values())}")


def run(args: argparse.Namespace) -> int:
    """Simulate; the exit code is 0, or 2 for an error the user can fix."""
    return answered(args, _run)


def _run(args: argparse.Namespace) -> int:
    from verl_heddle.report.explain import explain
    from verl_heddle.report.study import study
    from verl_heddle.report.text import report

    if args.quick:
        return _quick(args)
    arms = DEFAULT_ARMS if args.arms is None else (*DEFAULT_ARMS, *OTHER_ARMS) if args.arms == "all" else tuple(args.arms.split(","))
    if odd := [file for file in args.policy if not file.endswith(".py")]:
        raise ValueError(f"--policy {odd[0]}: must be a Python file (.py)")
    arms = (*arms, *args.policy)
    setting = setting_of(args)
    paths = _paths(args)
    source = source_of(args)
    meter = Meter()
    try:
        answer = study(setting, source, arms, args.jobs, meter)
    except Exception as error:
        raise _blamed(error, args.policy) from error
    finally:
        meter.close()
    sentences = explain(answer)
    if paths.get("json") != "-":
        print(report(answer, sentences), end="")
    _write(paths, answer, sentences, list(answer.rows) if args.arms else None)
    return 0


def _quick(args: argparse.Namespace) -> int:
    from verl_heddle.report.explain import explain
    from verl_heddle.report.quick import ARMS
    from verl_heddle.report.study import study
    from verl_heddle.report.text import headline

    if args.arms is not None or args.policy:
        raise ValueError("--quick simulates stock and the plugin only: leave out --arms and --policy, or --quick")
    paths = _paths(args)
    setting, source = quick_of(args)
    meter = Meter()
    try:
        answer = study(setting, source, ARMS, args.jobs, meter)
    finally:
        meter.close()
    if paths.get("json") != "-":
        print("\n".join([*headline(answer), "", f"{setting.model}, step times: {setting.step_times}", *answer.source.notes]))
    _write(paths, answer, explain(answer), None)
    return 0


def _blamed(error: Exception, policies: list[str]) -> Exception:
    """An error raised in a policy as one line with its location; any other error unchanged."""
    trace = "".join(traceback.format_exception(error))  # includes the traceback of a worker process
    for file in policies:
        places = re.findall(rf'File "{re.escape(os.path.realpath(file))}", line (\d+), in (\w+)', trace)
        if places:
            line, where = places[-1]
            return ValueError(f"{file}, line {line}, {where}: {type(error).__name__}: {error}")
    if policies and not isinstance(error, ValueError | OSError):
        return ValueError(
            f"a policy of --policy {', '.join(policies)} returned something the simulator cannot use: {type(error).__name__}: {error}"
        )
    return error


def _paths(args: argparse.Namespace) -> dict[str, str]:
    """The output path of each requested file, checked before any work."""
    from verl_heddle.report.figure import need_matplotlib

    paths = {kind: getattr(args, kind) for kind in FILES if getattr(args, kind) is not None}
    if args.out is not None:
        os.makedirs(args.out, exist_ok=True)
        paths = {kind: os.path.join(args.out, name) for kind, name in FILES.items()} | paths
    check_writable(*paths.values())
    if "png" in paths:
        need_matplotlib()
    return paths


def _write(paths: dict[str, str], answer: Answer, sentences: list[str], every: list[str] | None) -> None:
    from verl_heddle.report.document import document
    from verl_heddle.report.figure import pictured, scenes

    if "json" in paths:
        text = json.dumps(document(answer, sentences), indent=1) + "\n"
        if paths["json"] == "-":
            print(text, end="")
        else:
            Path(paths["json"]).write_text(text)
    if not {"png", "html", "perfetto"} & set(paths):
        return
    drawn = pictured(answer)
    traced = drawn if every is None else every
    names = list(dict.fromkeys([*drawn, *(traced if "perfetto" in paths else [])]))
    shown = dict(zip(names, scenes(answer, names), strict=True))
    if "perfetto" in paths:
        from verl_heddle.report.perfetto import perfetto

        perfetto(paths["perfetto"], [shown[name] for name in traced])
    if "png" in paths:
        from verl_heddle.report.figure import timeline

        timeline(paths["png"], answer, [shown[name] for name in drawn])
    if "html" in paths:
        from verl_heddle.report.page import page

        Path(paths["html"]).write_text(page(answer, sentences, [shown[name] for name in drawn], shell_line()), encoding="utf-8")
    for kind in ("html", "png", "perfetto", "json"):
        if kind in paths and paths[kind] != "-" and paths.get("json") != "-":
            print(f"wrote {paths[kind]}")
