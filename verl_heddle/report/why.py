"""Find why a recorded step took as long as it did, for `verl-heddle explain`. `why_text.py` formats the result.

A step is as long as its last trajectory, so that trajectory is analysed turn by turn; the rest of the step matters only through its effect
on that trajectory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from verl_heddle.compare.launch import TRACE
from verl_heddle.compare.ledger import Ledger
from verl_heddle.compare.plan import FILE, read_plan
from verl_heddle.latency import LatencyModel
from verl_heddle.report.attribution import WARM_UP_STEPS, Split, metrics_of, split
from verl_heddle.report.recorded import UTILIZATION, Engines, Machine, engines_of, machine, ready
from verl_heddle.report.whatif import WhatIf, what_ifs
from verl_heddle.simulate import Bound
from verl_heddle.simulate.baselines import Stock
from verl_heddle.traces import trace_of
from verl_heddle.traces.steps import training_steps
from verl_heddle.trajectory import Trajectory

Steps = dict[int, list[Trajectory]]


@dataclass(frozen=True)
class Why:
    """The analysis of one step. Times in seconds; `metrics` as in `step_metrics`; `machine` to `bound` are None without step times."""

    source: str
    """The trace file; for a comparison, the run."""
    step: int
    steps: int
    """Number of steps in the run."""
    typical_s: float
    """Median makespan of the run's steps."""
    metrics: dict[str, float]
    items: Sequence[Trajectory]
    last: Trajectory
    late_s: float
    """From the step's start to the start of the last trajectory."""
    split: Split
    engines: Engines
    machine: Machine | None = None
    alone_s: float | None = None
    """Simulated generation time of the last trajectory with a replica to itself."""
    replayed_s: float | None = None
    """Simulated makespan of the step as recorded."""
    bound: Bound | None = None
    what_ifs: tuple[WhatIf, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def shared_s(self) -> float | None:
        """Generation time lost to other trajectories on the replica; at least 0."""
        return None if self.alone_s is None else max(0.0, self.split.generate_s - self.alone_s)


def why(
    run: Path,
    step: int | None = None,
    arm: str | None = None,
    pair: int | None = None,
    tp: int | None = None,
    slots: int | None = None,
    table: LatencyModel | None = None,
    utilization: float | None = None,
) -> Why:
    """Explain a step of a recorded run; `step` None: the slowest after the first.

    Args:
        run: a trace file, a folder with one (or with heddle/trace.jsonl), or a comparison's folder.
        arm, pair: select the runs of a comparison.
        tp, slots: of the engines, if the trace does not record them.
        table: step times to use instead of a calibration.
        utilization: gpu_memory_utilization, if the trace does not record it.

    Raises:
        ValueError: there is nothing to explain; the message is one line.
    """
    name, number, steps, skipped = _chosen(run, step, arm, pair)
    items = steps[number]
    last = max(items, key=lambda item: item.meta["end_s"])
    metrics = metrics_of(items)
    engines = engines_of(list(steps.values())[-1], tp, slots, utilization)
    known = Why(
        source=name,
        step=number,
        steps=len(steps),
        typical_s=median(metrics_of(trajectories)["makespan_s"] for trajectories in steps.values()),
        metrics=metrics,
        items=items,
        last=last,
        late_s=metrics["last/late_start_s"],
        split=split(last),
        engines=engines,
        notes=(*skipped, *_notes(engines, items, table)),
    )
    measured = list(steps.values())
    simulated: dict[str, Any]
    try:
        model = machine(measured[WARM_UP_STEPS:] or measured, engines, table)
        base = model.replayed(items)
        own = ready([last])
        alone = model.run(own, Stock(), fleet=model.fleet(replicas=1)) if own else None
        simulated = {
            "machine": model,
            "alone_s": None if alone is None else float(alone.prefill_s[0] + alone.generate_s[0]),
            "replayed_s": base.makespan_s,
            "bound": model.bound(items),
            "what_ifs": tuple(what_ifs(items, model, base, last)),
        }
    except (ValueError, ArithmeticError) as error:  # too few turns to calibrate on, or impossible engine timings
        simulated = {"notes": (*known.notes, f"What would have helped is unknown: {error}")}
    return Why(**{**known.__dict__, **simulated})


def _chosen(run: Path, step: int | None, arm: str | None, pair: int | None) -> tuple[str, int, Steps, list[str]]:
    """The run's name, the step, all steps of that run, and notes on skipped records. Of several runs: the one whose step took longest."""
    found: list[tuple[float, str, int, Steps, list[str]]] = []
    seen: set[int] = set()
    for name, trace in _traces(run, arm, pair):
        skipped: list[str] = []
        steps = training_steps(trace, skipped.append)
        seen |= steps.keys()
        candidates = [step] if step is not None else list(steps)[WARM_UP_STEPS:] or list(steps)
        for number in candidates:
            if number in steps:
                found.append((metrics_of(steps[number])["makespan_s"], name, number, steps, skipped))
        found = [max(found, key=lambda entry: entry[0])] if found else []
    if not found:
        raise ValueError(f"{run} has no training step {step}; it has {', '.join(map(str, sorted(seen)[:20]))}")
    return found[0][1:]


def _traces(run: Path, arm: str | None, pair: int | None) -> Iterator[tuple[str, Path]]:
    if (run / FILE).is_file():
        plan, ledger = read_plan(run), Ledger(run)
        known = [key for key in plan.runs() if ledger.finished(key) and not plan.arm(key.arm).bare]
        keys = [key for key in known if arm in (None, key.arm) and pair in (None, key.pair)]
        if not keys:
            available = ", ".join(f"pair {key.pair} {key.arm}" for key in known) or "none"
            raise ValueError(f"{run}: no finished run with a trace matches; available: {available}")
        for key in keys:
            yield f"{run.name}, pair {key.pair}, {key.arm}", ledger.folder(key) / TRACE / "trace.jsonl"
        return
    if arm is not None or pair is not None:
        raise ValueError(f"--arm and --pair choose runs of a comparison; {run} is not a comparison")
    yield str(run), trace_of(run)


def _notes(engines: Engines, items: Sequence[Trajectory], table: LatencyModel | None) -> tuple[str, ...]:
    notes = []
    if table is not None and engines.kv_tokens is None and engines.utilization is None:
        notes.append(f"The trace does not record the KV cache size; assumed: --gpu-memory-utilization {UTILIZATION:g}, verl's default.")
    if engines.as_released:
        notes.append("The trace does not record heddle's settings; assumed: the defaults, with resident sets.")
    if engines.assumed:
        words = {"tp": f"--tp {engines.tp}", "slots": f"--slots {engines.slots}"}
        notes.append(f"The trace does not record the engines' size; assumed: {', '.join(words[name] for name in engines.assumed)}.")
    cut = sum(item.meta.get("outcome") not in (None, "finished") for item in items)
    if cut:
        notes.append(f"{cut} trajectories failed or were cancelled; they count with the length they had reached.")
    preempted = sum(turn.preemptions or 0 for item in items for turn in item.steps)
    if preempted and table is None and engines.kv_tokens is None:
        notes.append(
            f"The engines preempted turns {preempted} times; without the KV memory of a table (--model, --gpu) this is not simulated."
        )
    return tuple(notes)
