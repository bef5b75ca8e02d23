"""Measures finished runs: the metrics of every step of every run, from traces and verl's log.

The makespan is computed from the trajectories in the trace (first start to last end), never from `timing_s/gen`, which includes verl's
polling interval. Under an asynchronous trainer trajectories outlive steps, so there is no makespan; such a run is measured by what it
logged for the window between two batches (`attribution.window_metrics`). A bare run has no trace, so only verl's own timings are known.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from statistics import mean
from typing import Any

import yaml

from verl_heddle.compare.campaign import numbers
from verl_heddle.compare.launch import METRICS, TRACE
from verl_heddle.compare.ledger import Entry, Ledger
from verl_heddle.compare.plan import Key, Plan
from verl_heddle.latency import LatencyModel
from verl_heddle.report.attribution import WARM_UP_STEPS, metrics_of
from verl_heddle.report.recorded import Machine, engines_of, machine, prediction
from verl_heddle.traces.steps import training_steps
from verl_heddle.trajectory import Trajectory

SPLIT = ("queue_s", "generate_s", "tool_s", "other_s", "late_start_s")
"""Seconds of the trajectory that ended last, by activity; they add up to the makespan."""

VERLS = {"step_s": "timing_s/step", "reward": "critic/score/mean", "response_tokens": "response_length/mean"}
"""Our name of a metric, and verl's; the only metrics of a run without a trace."""

VALIDATION = "val-core/"
"""Prefix of verl's validation metrics, logged at steps that validate."""

OURS = "heddle/"
"""Prefix of heddle's metrics in verl's log."""

WINDOW = "window_s"
"""Length of the window between two batches; only asynchronous runs log it."""

TWIN = "twin/"
"""Prefix of the twin's results; they refer to the step `twin/step` and are logged with a later step."""

SHARES = ("generate_share", "queue_share", "tool_share", "paused_share")
"""Shares of the total time of the trajectories that ended in a window, by activity."""


@dataclass(frozen=True, slots=True)
class Step:
    """One training step of one run. `metrics` has the names of `step_metrics` or `window_metrics`, `reward`, `validation` and those of
    `VERLS`. `bound_s` is the lower bound of the makespan, None if unknown."""

    number: int
    metrics: Mapping[str, float]
    bound_s: float | None = None

    def get(self, name: str) -> float | None:
        """A metric; None if it is missing or not finite."""
        value = self.metrics.get(name)
        return value if value is not None and isfinite(value) else None

    @property
    def split(self) -> dict[str, float] | None:
        """The seconds of `SPLIT`; None without a trace."""
        return {name: self.metrics[f"last/{name}"] for name in SPLIT} if "makespan_s" in self.metrics else None

    @property
    def shares(self) -> dict[str, float] | None:
        """The shares of `SHARES`; None without a window."""
        return {name: self.metrics.get(name, 0.0) for name in SHARES} if WINDOW in self.metrics else None


@dataclass(frozen=True, slots=True)
class RunResult:
    """A finished run. `warm` holds the steps that count, after the warm-up; `predicted` holds rows of `recorded.prediction`."""

    key: Key
    entry: Entry
    steps: tuple[Step, ...]
    warm: tuple[Step, ...]
    predicted: Sequence[tuple[int, float, float, float | None]]
    config: Mapping[str, Any]

    def step(self, number: int) -> Step | None:
        """The step with this number in `warm`; None if there is none."""
        return next((step for step in self.warm if step.number == number), None)


def measured(
    plan: Plan,
    out: Path,
    warmup: int = WARM_UP_STEPS,
    table: LatencyModel | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> tuple[dict[Key, RunResult], Machine | None]:
    """The results of every finished run, and the machine model behind the lower bounds (None if calibration failed).

    Args:
        warmup: steps dropped at the start of each run, as long as one remains.
        table: step times to use instead of a calibration.
        note: called with one line for each thing that is missing.
    """
    ledger = Ledger(out)
    done = [key for key in plan.runs() if ledger.finished(key)]
    logs = {key: numbers(ledger.folder(key) / METRICS) for key in done}
    in_windows = {key for key, logged in logs.items() if any(OURS + WINDOW in row for row in logged.values())}
    followed = [key for key in done if not plan.arm(key.arm).bare and key not in in_windows]
    known = _machine(plan, out, followed, warmup, table, note)
    results = {}
    for key in done:
        entry = ledger.entry(key)
        assert entry is not None
        folder = ledger.folder(key)
        traced = traced_steps(folder, note) if key in followed else {}
        logged = logs[key]
        judged = _judged(logged)
        steps = []
        guessed: dict[int, list[tuple[int, float, float, float | None]]] = {}
        for number in sorted(logged.keys() | traced.keys()):
            row = logged.get(number, {})
            of_verl = {name: row[theirs] for name, theirs in VERLS.items() if theirs in row}
            if scores := [value for name, value in row.items() if name.startswith(VALIDATION)]:
                of_verl["validation"] = mean(scores)
            of_us = {name.removeprefix(OURS): value for name, value in row.items() if name.startswith(OURS)}
            of_verl |= judged.get(number, {})
            items = traced.get(number)
            if items is None:
                steps.append(Step(number, of_verl | (of_us if key in in_windows else {})))
                continue
            counted = {name: value for name, value in of_us.items() if name.startswith("fallbacks/")}
            bound = known.bound(items).makespan_s if known is not None else None
            ours = metrics_of(items)
            steps.append(Step(number, of_verl | counted | {n: v for n, v in ours.items() if n != "reward" or isfinite(v)}, bound))
            guessed[number] = prediction(items)
        warm = tuple(steps[warmup:] or steps[-1:])
        predicted = [row for step in warm for row in guessed.get(step.number, [])]
        results[key] = RunResult(key, entry, tuple(steps), warm, predicted, config_of(folder))
    return results, known


def _judged(logged: Mapping[int, Mapping[str, float]]) -> dict[int, dict[str, float]]:
    """The twin's results by the step they refer to."""
    by_step = {}
    for row in logged.values():
        results = {name.removeprefix(OURS): value for name, value in row.items() if name.startswith(OURS + TWIN)}
        if (number := results.get(TWIN + "step")) is not None:
            by_step[int(number)] = results
    return by_step


def traced_steps(folder: Path, note: Callable[[str], None] = lambda text: None) -> dict[int, list[Trajectory]]:
    """The training steps in a run's trace; `note` is called with a line about each omission.

    Raises:
        ValueError: the trace is missing or damaged.
    """
    return training_steps(folder / TRACE / "trace.jsonl", lambda text: note(f"{folder.name}: {text}"))


def config_of(folder: Path) -> dict[str, Any]:
    """The composed verl configuration of a run as Hydra saved it, with flat dotted keys; empty if there is none."""
    try:
        tree = yaml.safe_load((folder / "hydra" / ".hydra" / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return {}
    return dict(_flat(tree, "")) if isinstance(tree, dict) else {}


def _flat(node: Any, prefix: str) -> list[tuple[str, Any]]:
    if not isinstance(node, dict) or not node:
        return [(prefix.rstrip("."), node)]
    return [leaf for key, value in node.items() for leaf in _flat(value, f"{prefix}{key}.")]


def _machine(
    plan: Plan, out: Path, keys: Sequence[Key], warmup: int, table: LatencyModel | None, note: Callable[[str], None]
) -> Machine | None:
    """Calibrate one machine model on all arms of the first pair that has traces; sharing it makes bound fractions comparable."""
    if not keys:
        return None
    ledger = Ledger(out)
    steps: list[list[Trajectory]] = []
    for key in keys:
        if key.pair == keys[0].pair:
            of_run = list(traced_steps(ledger.folder(key)).values())
            steps += of_run[warmup:] or of_run
    try:
        return machine(steps, engines_of(steps[-1]), table)
    except ValueError as error:
        note(f"no lower bound: {error}")
        return None
