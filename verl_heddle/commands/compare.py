"""`verl-heddle compare`: measure heddle against stock verl on your own job, with confidence intervals and reasons."""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verl_heddle.commands.asking import _positive, answered, one_line, shell_line

if TYPE_CHECKING:
    from verl_heddle.compare.plan import Plan

INCOMPLETE = 1
"""Exit code if runs failed or are missing; the report covers the finished ones."""

RECIPE_STEPS = 4
"""Default steps of a recipe's run: one to warm up, three that count."""

_DATA = ("DATA", "TRAIN_ROWS", "VAL_ROWS", "MAX_DIFFICULTY")
RECIPE_SETTINGS = ("MODEL", "MODEL_STEPS", "GPUS", "NODES", *_DATA, "HEDDLE_TOOL_DELAY_S", "HEDDLE_SANDBOX")
"""Environment variables that become part of a recipe's command, so that a later call cannot continue with different values."""

EXAMPLES = """\
examples:
  your own job: stock decisions against heddle, three pairs of runs, ten steps each
      verl-heddle compare --out cmp --steps 10 -- python -m verl.trainer.main_ppo <your overrides>

  a recipe; without a GPU it runs on the CPU with a tiny model (about 2 minutes per run on two cores)
      verl-heddle compare --recipe math --pairs 3 --out cmp

  an extra arm: a part switched off, or a different setting
      verl-heddle compare --recipe math --arm "no_residents: heddle.residents.enable=false"

  resume after an interruption, a crash or a failed arm; or add pairs
      verl-heddle compare --out cmp
      verl-heddle compare --out cmp --pairs 6

  print the commands without running them
      verl-heddle compare --recipe math --dry-run

The arm stock is your command with +plugin=observe: verl's own decisions, heddle's metrics and traces. All arms of a pair have the same
seeds; their order is balanced over the pairs. Checkpoints are not saved. All output goes to --out: report.html, compare.json, and a
folder per run with its log and trace. W&B: one group, offline if there is no key (upload later: wandb sync). What the numbers mean:
docs/compare.md.
"""


def add_parser(subparsers: Any) -> None:
    """Declare the command."""
    parser = subparsers.add_parser(
        "compare",
        help="compare stock verl and heddle on your own job: paired runs, an HTML report, W&B",
        description="Run a verl command under several arms, in pairs with the same seeds; report how much faster each arm is, and why.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.error = one_line(parser.prog)
    parser.usage = "%(prog)s [--out DIR] [options] (--recipe NAME | -- VERL COMMAND)"
    what = parser.add_argument_group("runs")
    what.add_argument("--recipe", metavar="NAME", help="a recipe of this repository, e.g. math; words after -- are added to its command")
    what.add_argument(
        "--arm",
        action="append",
        default=[],
        metavar='"NAME: OVERRIDES"',
        help="add an arm: heddle with these overrides; include a +plugin= to choose a different plugin (repeatable)",
    )
    what.add_argument("--no-heddle", action="store_true", help="leave out the arm heddle")
    what.add_argument("--stock-bare", action="store_true", help="add an arm without any plugin; only verl's own timings are known for it")
    what.add_argument("verl_command", nargs="*", metavar="-- VERL COMMAND", help="e.g. -- python -m verl.trainer.main_ppo ...")
    length = parser.add_argument_group("pairs and steps")
    length.add_argument("--pairs", type=_positive, metavar="N", help="runs of every arm (default 3)")
    length.add_argument(
        "--steps", type=_positive, metavar="N", help=f"training steps per run (default: as in the command; {RECIPE_STEPS} for a recipe)"
    )
    length.add_argument("--seed", type=int, default=1, metavar="N", help="seed of the first pair; later pairs count up from it (default 1)")
    length.add_argument("--warmup", type=int, default=1, metavar="N", help="first steps of each run that do not count (default 1)")
    length.add_argument(
        "--silence-s", type=float, default=1800.0, metavar="S", help="stop a run that prints nothing for this long (default 1800)"
    )
    where = parser.add_argument_group("output")
    where.add_argument("--out", metavar="DIR", help="folder of the comparison (default outputs/compare, or outputs/compare-RECIPE)")
    where.add_argument("--name", metavar="NAME", help="W&B group and prefix of the run names (default: the folder's name)")
    where.add_argument("--no-wandb", action="store_true", help="do not log to W&B")
    where.add_argument(
        "--model", metavar="MODEL", help="with --gpu: step times for the lower bound; named as in verl-heddle simulate, e.g. qwen3-8b"
    )
    where.add_argument(
        "--gpu",
        metavar="GPU",
        help="named as in verl-heddle simulate, e.g. h200; without --model and --gpu, step times are calibrated from the runs",
    )
    where.add_argument("--dry-run", action="store_true", help="print the commands without running them")
    where.add_argument("--report-only", action="store_true", help="run nothing, only rewrite the report")


def run(args: argparse.Namespace) -> int:
    """Compare; the exit code is 0, 1 if runs are missing, 2 for an error the user can fix, 130 after an interruption."""
    return answered(args, _run)


def _run(args: argparse.Namespace) -> int:
    import os

    from verl_heddle.compare.campaign import locked, make
    from verl_heddle.compare.launch import launch
    from verl_heddle.compare.outcome import publish, write
    from verl_heddle.compare.plan import keep, wanted

    if args.warmup < 0 or not args.silence_s > 0:
        raise ValueError("--warmup must not be negative, --silence-s must be positive")
    table = _table(args)
    out = Path(args.out or f"outputs/compare{f'-{args.recipe}' if args.recipe else ''}").resolve()
    asked = _asked(args, out)
    plan, again = wanted(out, asked, args.pairs, _extra(args))
    launch(plan, next(plan.runs()), out, os.environ)  # rejects a name that Hydra cannot represent before any file is written
    if args.dry_run:
        return _show(plan, out)
    if not args.report_only:
        _check(plan, out)
    out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        plan, again = wanted(out, asked, args.pairs, _extra(args))
        keep(out, plan)
        if not args.report_only:
            pairs = f"{plan.pairs} pair{'s' if plan.pairs > 1 else ''}"
            _log(f"{'resuming' if again else 'comparing'} {', '.join(arm.name for arm in plan.arms)}: {pairs} in {out}")
            signal.signal(signal.SIGTERM, _interrupt)

            def pair_done(pair: int) -> None:
                try:
                    write(plan, out, args.warmup, table, shell_line())
                except ValueError as error:  # a damaged trace must not cost the remaining runs
                    _log(f"no report after pair {pair}: {' '.join(str(error).split())}")

            try:
                made = make(plan, out, _log, pair_done, args.silence_s)
            except KeyboardInterrupt:
                _log(f"interrupted; finished runs are kept. Resume with: verl-heddle compare --out {shlex.quote(str(out))}")
                return 130
            _log(f"{len(made.finished)} runs executed, {len(made.kept)} kept, {len(made.failed)} failed, {len(made.skipped)} skipped")
            if len(made.kept) == len(list(plan.runs())):
                _log(f"every run was already finished: ask for more with --pairs {plan.pairs + 1}, or start anew with a different --out")
        answer = write(plan, out, args.warmup, table, shell_line())
        publish(answer, out)
    return INCOMPLETE if answer.missing else 0


def _asked(args: argparse.Namespace, out: Path) -> Plan | None:
    """The plan that the command line describes; None to resume the comparison in `out`."""
    from verl_heddle.compare.plan import BARE, HEDDLE, STOCK, Plan, is_flag

    words = list(args.verl_command)
    if args.recipe is None and not words:
        return None
    if args.recipe is not None:
        words = [*_recipe(args.recipe), *words]
    dropped = [word for word in words if is_flag(word)]
    if dropped:
        _log(f"removed {' '.join(dropped)} from the command: each arm sets its own plugin")
    command = tuple(word for word in words if not is_flag(word))
    if command and shutil.which(command[0]) is None:
        raise ValueError(
            f"{command[0]!r} is not a program: what follows -- must be a whole verl command, e.g. python -m verl.trainer.main_ppo ..."
        )
    arms = [STOCK, *([] if args.no_heddle else [HEDDLE]), *_extra(args), *([BARE] if args.stock_bare else [])]
    names = [arm.name for arm in arms]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"two arms are called {sorted(twice)[0]}")
    if len(arms) < 2:
        raise ValueError("nothing to compare: only one arm is left")
    steps = args.steps or (RECIPE_STEPS if args.recipe else None)
    name = args.name or out.name
    return Plan(name, command, tuple(arms), args.pairs or 3, args.seed, steps, args.recipe, not args.no_wandb)


def _extra(args: argparse.Namespace) -> tuple[Any, ...]:
    from verl_heddle.compare.plan import parse_arm

    return tuple(parse_arm(text) for text in args.arm)


def _recipe(name: str) -> list[str]:
    """The command of a recipe: its script, plus the CPU profile if there is no GPU.

    Raises:
        ValueError: there is no such recipe, or there is a GPU but MODEL is not set.
    """
    import os

    import verl_heddle

    roots = (Path.cwd(), Path(verl_heddle.__file__).resolve().parent.parent)
    found = next((script for root in roots if (script := root / "recipes" / name / "run.sh").is_file()), None)
    if found is None:
        there = sorted({script.parent.name for root in roots for script in root.glob("recipes/*/run.sh")})
        raise ValueError(
            f"there is no recipe {name!r}" + (f"; available: {', '.join(there)}" if there else ": recipes come with the repository")
        )
    settings = [f"{variable}={value}" for variable in RECIPE_SETTINGS if (value := os.environ.get(variable))]
    command = [*(("env", *settings) if settings else ()), "bash", str(found)]
    if shutil.which("nvidia-smi") is None:
        return [*command, "+machine=cpu"]
    if not os.environ.get("MODEL"):
        raise ValueError(
            f"this machine has a GPU: say which model to train, e.g. MODEL=Qwen/Qwen3-0.6B, and its size after --: see {found}"
        )
    return command


def _table(args: argparse.Namespace) -> Any:
    if (args.model is None) != (args.gpu is None):
        raise ValueError("--model and --gpu go together")
    if args.model is None:
        return None
    from verl_heddle.latency.times import times

    return times(args.gpu, args.model).latency


def _show(plan: Plan, out: Path) -> int:
    import os

    from verl_heddle.compare.launch import launch

    for key in plan.runs():
        started = launch(plan, key, out, os.environ)
        print(f"# pair {key.pair}, {key.arm}")
        print(
            " ".join(f"{name}={_quoted(value)}" for name, value in started.environment.items()),
            "\\\n ",
            " ".join(map(_quoted, started.command)),
        )
    return 0


def _quoted(word: str) -> str:
    """Quote for a shell as `shlex.quote` does, but put words with Hydra's own quotes in double quotes, which stay readable."""
    return f'"{word}"' if "'" in word and not re.search(r'["\\$`!]', word) else shlex.quote(word)


def _check(plan: Plan, out: Path) -> None:
    """Compose and check every arm's configuration before anything runs, if the command is a verl command and verl is installed.

    Raises:
        ValueError: an arm's configuration is invalid; one line.
    """
    import os
    from importlib.util import find_spec

    from verl_heddle.compare.launch import launch
    from verl_heddle.compare.plan import Key

    if find_spec("verl") is None:
        return
    from verl_heddle.verl_plugin.command_line import read
    from verl_heddle.verl_plugin.lint import lint
    from verl_heddle.verl_plugin.overrides import compose

    if read(plan.command).main is None:
        return
    for arm in plan.arms:
        command = read(launch(plan, Key(1, arm.name), out, os.environ).command)
        try:
            config = compose(command.overrides, command)
        except Exception as error:
            raise ValueError(f"arm {arm.name}: {' '.join(str(error).split())}") from None
        faults = [] if arm.bare else [finding for finding in lint(config) if finding.fatal or finding.grave]
        if faults:
            raise ValueError(f"arm {arm.name}: {faults[0].text}")


def _log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt
