"""Code shared by the commands: the arguments of `simulate` and `plan` and what they build, progress, and one-line errors."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from verl_heddle.report.draws import Source
    from verl_heddle.report.setting import Setting
    from verl_heddle.simulate import HostTier
    from verl_heddle.trajectory import Trajectory

WORKLOADS = ("coding", "search", "math")

BAD_INPUT = 2
"""Exit code for errors the user can fix, the same as argparse's."""

PROMPTS_PER_GPU, SAMPLES = 2, 16
"""Default size of a generated step: 32 trajectories per GPU, in groups of 16 as in the Heddle paper."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that define a simulation: workload, hardware, costs and number of draws."""
    parser.error = one_line(parser.prog)  # type: ignore[assignment, method-assign]
    parser.usage = "%(prog)s (--trace FILE | --workload NAME) --model MODEL [options]"
    work = parser.add_argument_group("workload (choose one)")
    which = work.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--trace",
        metavar="FILE",
        help="a trace or a folder of traces (+plugin=heddle and +plugin=observe write them), or logs of other tools (docs/import.md)",
    )
    which.add_argument("--workload", choices=WORKLOADS, help="a synthetic workload, for a first look without a trace")
    work.add_argument("--step", type=int, metavar="N", help="with --trace: this training step only (default: every step in turn)")
    work.add_argument(
        "--prompts", type=_positive, metavar="N", help=f"prompts per step (default: {PROMPTS_PER_GPU} per GPU, or all of a trace)"
    )
    work.add_argument("--samples", type=_positive, metavar="N", help=f"trajectories per prompt (default: {SAMPLES}, or all of a trace)")
    work.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="with --workload: set one of its parameters, e.g. --set tool_mean_s=2 (repeatable)",
    )
    work.add_argument(
        "--cold",
        action="store_true",
        help="start heddle without history, as in a first epoch (default: with one epoch of history; docs/simulate.md)",
    )
    place = parser.add_argument_group("hardware and engines")
    place.add_argument(
        "--model", required=True, help="a known name (qwen3-14b, llama-3.1-70b, ...: docs/models.md), a config.json, or a folder with one"
    )
    place.add_argument(
        "--gpu",
        default="h200",
        help="a100, h20, h100, h200 (default), l40s, b200, or a custom one as name:mem=..GiB,bw=..TB/s,tflops=.. (dense bf16)",
    )
    place.add_argument("--weights", choices=("bf16", "fp8"), help="precision of the weights (default: from the model's config)")
    place.add_argument("--kv", choices=("bf16", "fp8"), help="precision of the KV cache (default: from the model's config)")
    place.add_argument(
        "--calibrate",
        metavar="RUN",
        help="calibrate step times on your own engines: a trace, or a folder with one; other tensor-parallel degrees are scaled from it",
    )
    place.add_argument("--gpus", type=_positive, default=8, metavar="N", help="GPUs for rollout (default 8)")
    place.add_argument(
        "--tp",
        type=_positive,
        metavar="N",
        help="your tensor_model_parallel_size (default: the smallest with room for 100,000 KV tokens, at least 2 from a dense 32B up)",
    )
    place.add_argument("--slots", type=_positive, default=256, metavar="N", help="your max_num_seqs (default 256, verl's)")
    place.add_argument(
        "--gpu-memory-utilization", type=float, default=0.5, metavar="X", help="your gpu_memory_utilization (default 0.5, verl's)"
    )
    costs = parser.add_argument_group("step costs besides kernels and tools (defaults are assumptions and are reported as such)")
    costs.add_argument(
        "--host-s",
        type=float,
        metavar="S",
        help="seconds the host adds to every engine step (default 0.001; to measure it: verl-heddle explain RUN --model ... --gpu ...)",
    )
    costs.add_argument(
        "--overhead-s", type=float, metavar="S", help="seconds per turn outside engine and tools (default 0.015; explain measures it)"
    )
    costs.add_argument(
        "--sync-s",
        type=float,
        metavar="S",
        help="seconds of weight sync before a step (default: the time to copy the weights at PCIe speed)",
    )
    costs.add_argument("--tools-at-once", type=_positive, metavar="N", help="most tools running at once (default: no limit, as in verl)")
    costs.add_argument(
        "--offload-gb-s", type=float, metavar="X", help="for stock_tier: GB/s at which each GPU reads KV cache back (default 25)"
    )
    costs.add_argument("--offload-gib", type=float, metavar="X", help="for stock_tier: GiB of KV cache kept per host (default: no limit)")
    draws = parser.add_argument_group("draws")
    draws.add_argument(
        "--seeds", type=_positive, default=3, metavar="N", help="independent draws, reported as median and range (default 3)"
    )
    draws.add_argument("--jobs", type=_positive, metavar="N", help="processes (default: one per CPU, at most 8)")


def setting_of(args: argparse.Namespace) -> Setting:
    """The setting that the arguments describe.

    Raises:
        ValueError: an argument is invalid; one line.
    """
    from verl_heddle.report.setting import setting

    return setting(
        args.model,
        args.gpu,
        args.gpus,
        args.tp,
        args.slots,
        args.gpu_memory_utilization,
        args.overhead_s,
        host_s=args.host_s,
        sync_s=args.sync_s,
        tools_at_once=args.tools_at_once,
        tier=_tier(args),
        weights=args.weights,
        kv=args.kv,
        run=None if args.calibrate is None else (args.calibrate, _live(args.calibrate)),
    )


def _live(run: str) -> list[Trajectory]:
    """Training trajectories to calibrate on, from whole steps after the warm-up. `run` is a trace or a run's folder that holds one.

    Raises:
        ValueError: there is no such trace, or it is not of a live run.
    """
    from verl_heddle.report.attribution import WARM_UP_STEPS
    from verl_heddle.report.recorded import enough
    from verl_heddle.traces import trace_of, training_steps

    steps = list(training_steps(trace_of(run)).values())
    return enough(steps[WARM_UP_STEPS:] or steps)


def _tier(args: argparse.Namespace) -> HostTier | None:
    """The KV offload settings given by the user, None if there are none."""
    from verl_heddle.simulate import HostTier

    if args.offload_gb_s is None and args.offload_gib is None:
        return None
    for option, value in (("--offload-gb-s", args.offload_gb_s), ("--offload-gib", args.offload_gib)):
        if value is not None and not value > 0:
            raise ValueError(f"{option} must be positive, got {value:g}")
    bandwidth = {} if args.offload_gb_s is None else {"bytes_per_s": args.offload_gb_s * 1e9}
    capacity = {} if args.offload_gib is None else {"host_bytes": args.offload_gib * 2**30}
    return HostTier(**bandwidth, **capacity)


def source_of(args: argparse.Namespace) -> Source:
    """The draws that the arguments describe.

    Raises:
        ValueError: an argument is invalid or a file cannot be read; one line.
    """
    from verl_heddle.report.draws import generated, recorded

    seeds = range(args.seeds)
    if args.trace is not None:
        if args.set:
            raise ValueError("--set changes a generated workload, not a trace")
        with _imported(args.trace) as path:
            return recorded(path, seeds, args.step, args.prompts, args.samples, args.cold)
    if args.step is not None:
        raise ValueError("--step chooses a step of a trace; a workload has only one")
    prompts = args.prompts or max(8, PROMPTS_PER_GPU * args.gpus)
    return generated(args.workload, prompts, args.samples or SAMPLES, seeds, args.cold, **dict(map(_parameter, args.set)))


def quick_of(args: argparse.Namespace) -> tuple[Setting, Source]:
    """The requested setting and draws, reduced so that the answer takes seconds.

    Raises:
        ValueError: as `setting_of` and `source_of`.
    """
    from verl_heddle.report.quick import quick_trace, quick_workload

    setting = setting_of(args)
    if args.trace is not None:
        if args.set:
            raise ValueError("--set changes a generated workload, not a trace")
        return quick_trace(setting, args.trace, args.step, args.prompts, args.samples, args.cold)
    if args.step is not None:
        raise ValueError("--step chooses a step of a trace; a workload has only one")
    prompts = args.prompts or max(8, PROMPTS_PER_GPU * args.gpus)
    return quick_workload(setting, args.workload, prompts, args.samples or SAMPLES, args.cold, **dict(map(_parameter, args.set)))


@contextmanager
def _imported(path: str) -> Iterator[str]:
    """Yield the path of a trace. A file in another format is imported into a temporary trace, with a summary on stderr."""
    from verl_heddle.traces import write
    from verl_heddle.traces.importers.formats import trajectories

    items, found = trajectories(path)
    if found is None:
        yield path
        return
    with TemporaryDirectory(prefix="heddle-import-") as folder:
        trace = os.path.join(folder, f"{os.path.basename(path).removesuffix('.gz').removesuffix('.jsonl')}.jsonl")
        write(trace, items)
        for line in found.told():
            print(f"{path}: {line}", file=sys.stderr)
        yield trace


def answered(args: argparse.Namespace, work: Callable[[argparse.Namespace], int]) -> int:
    """Run `work`. For an error the user can fix, print one line on stderr and return `BAD_INPUT`."""
    try:
        return work(args)
    except (ValueError, OSError) as error:
        print(f"verl-heddle {args.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print(f"verl-heddle {args.command}: interrupted", file=sys.stderr)
        return 130


def one_line(prog: str) -> Callable[[str], NoReturn]:
    """A replacement for argparse's `error` that omits the usage text, which would hide the one line that matters."""

    def error(message: str) -> NoReturn:
        print(f"{prog}: {message} (see {prog} --help)", file=sys.stderr)
        sys.exit(BAD_INPUT)

    return error


def check_writable(*paths: str | None) -> None:
    """Check the output paths before the simulation starts.

    Raises:
        OSError: a folder does not exist or is not writable, or a path is a folder.
    """
    for path in paths:
        if path is None or path == "-":
            continue
        folder = os.path.dirname(os.path.abspath(path))
        if not os.path.isdir(folder):
            raise FileNotFoundError(f"cannot write {path}: there is no folder {folder}")
        if os.path.isdir(path):
            raise IsADirectoryError(f"cannot write {path}: it is a folder")
        if not os.access(folder, os.W_OK):
            raise PermissionError(f"cannot write {path}: no permission in {folder}")


def shell_line(argv: list[str] | None = None) -> str:
    """The command as typed, to show on the page."""
    return shlex.join(["verl-heddle", *(sys.argv[1:] if argv is None else argv)])


class Meter:
    """Progress on stderr: one line updated in place on a terminal, a line every `EVERY_S` elsewhere, nothing in the first `QUIET_S`."""

    QUIET_S = 2.0
    EVERY_S = 15.0

    def __init__(self, clock: Callable[[], float] = time.monotonic, out: Any = None) -> None:
        self._clock = clock
        self._out = sys.stderr if out is None else out
        self._live = bool(getattr(self._out, "isatty", lambda: False)())
        self._start = self._last = clock()
        self._shown = 0

    def __call__(self, done: int, total: int, what: str) -> None:
        """Report progress; called after each simulation."""
        now = self._clock()
        took = now - self._start
        if took < self.QUIET_S or (not self._live and (now - self._last < self.EVERY_S or done == total)):
            return
        self._last = now
        text = f"simulated {done} of {total} ({what}), {took:.0f} s, about {took / done * (total - done):.0f} s left"
        if self._live:
            print(f"\r{text:<{self._shown}}", end="", file=self._out, flush=True)
            self._shown = len(text)
        else:
            print(text, file=self._out, flush=True)

    def close(self) -> None:
        """Clear the progress line."""
        if self._live and self._shown:
            print("\r" + " " * self._shown + "\r", end="", file=self._out, flush=True)
            self._shown = 0


def _positive(text: str) -> int:
    number = int(text) if text.lstrip("-").isdigit() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return number


def _share(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, got {text!r}")
    return number


def _parameter(text: str) -> tuple[str, float | int]:
    name, equals, value = text.partition("=")
    try:
        number = float(value)
    except ValueError:
        number = float("nan")
    if not equals or not name or number != number:
        raise ValueError(f"--set needs KEY=NUMBER, got {text!r}")
    whole = name in ("cap_tokens", "max_turns", "max_input_tokens")
    return name, int(number) if whole and number == int(number) else number
