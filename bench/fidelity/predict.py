"""From recorded runs to errors: calibrate on some, simulate the others, compare. Needs no engines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.fidelity.configurations import BATCH_TOKENS, BLOCK_TOKENS, CALIBRATION, KV_BOUND, PREDICTED, REPLICAS, Configuration
from verl_heddle.fleet import Replica
from verl_heddle.latency import LatencyModel, calibrate
from verl_heddle.orchestrator import Orchestrator
from verl_heddle.report.play import preempt_rule
from verl_heddle.simulate import EngineOptions, Result, simulate
from verl_heddle.traces import read
from verl_heddle.trajectory import Trajectory

OVERHEADS = ("route_s", "transport_s", "between_s")
"""What a turn spends outside engine, queue and tool: asking the router, RPC there and back, the client's own work."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """One run on the engines. `role`: see `record`; `foreign`: see `disturbance`; `load` average as it began."""

    role: str
    configuration: Configuration
    seed: int
    records: Sequence[Trajectory]
    foreign: float
    load: float

    @property
    def finish_s(self) -> NDArray[np.float64]:
        """End of every trajectory, seconds after the first start; shape [trajectories]."""
        begin = min(item.meta["start_s"] for item in self.records)
        return np.array([item.meta["end_s"] - begin for item in self.records])


@dataclass(frozen=True, slots=True)
class Machine:
    """What was learned from the calibration runs: the engine, and the mean seconds of each of `OVERHEADS` per turn."""

    latency: LatencyModel
    overheads_s: dict[str, float]


def load(folder: Path, index: dict[str, Any]) -> list[Recorded]:
    """The runs of `record.record`."""
    known = {one.name: one for one in (*CALIBRATION, *PREDICTED, *KV_BOUND)}
    return [
        Recorded(run["role"], known[run["configuration"]], run["seed"], list(read(folder / run["file"])), run["foreign"], run["load"])
        for run in index["runs"]
    ]


def counting(runs: Sequence[Recorded]) -> list[Recorded]:
    """The least disturbed attempt of each run."""
    best: dict[tuple[str, str, int], Recorded] = {}
    for run in runs:
        key = run.role, run.configuration.name, run.seed
        if key not in best or run.foreign < best[key].foreign:
            best[key] = run
    return list(best.values())


def learn(runs: Sequence[Recorded]) -> Machine:
    """Fit the latency model to the turns of all runs, and take their mean overheads."""
    latency = calibrate([item for run in runs for item in run.records])
    turns = [turn for run in runs for item in run.records for turn in item.steps]
    return Machine(latency, {name: mean(getattr(turn, name) or 0.0 for turn in turns) for name in OVERHEADS})


def predict(configuration: Configuration, seed: int, machine: Machine) -> Result:
    """The same run in the simulator: the same trajectories in the same order, the same orchestrator with the same history."""
    work, history = configuration.work(seed)
    policy = Orchestrator(configuration.options(seed))
    for end in history:
        policy.trajectory_ended(end, 0.0)
    overhead_s = sum(machine.overheads_s.values())
    engine = EngineOptions(order=configuration.order, batch_tokens=BATCH_TOKENS, block_tokens=BLOCK_TOKENS, turn_overhead_s=overhead_s)
    if configuration.preempt:
        engine = replace(engine, preempt=preempt_rule(configuration.options(seed)))
    fleet = [Replica(name, slots=configuration.slots, kv_tokens=configuration.kv_tokens(seed)) for name in REPLICAS]
    return simulate(work, fleet, machine.latency, policy, engine=engine)


def compare(run: Recorded, result: Result) -> dict[str, Any]:
    """Errors of one run, relative: predicted / real - 1; those of the trajectories' ends in order of submission."""
    real = run.finish_s
    finish = result.finish_s / real - 1.0
    return {
        "configuration": run.configuration.name,
        "seed": run.seed,
        "makespan_s": float(real.max()),
        "predicted_s": result.makespan_s,
        "makespan_error": result.makespan_s / float(real.max()) - 1.0,
        "finish_errors": [round(float(error), 4) for error in finish],
        "preemptions": sum(turn.preemptions or 0 for item in run.records for turn in item.steps),
        "predicted_preemptions": result.preemptions,
        "same_replica": _same_replica(run, result),
        "foreign": run.foreign,
        "load": run.load,
    }


def _same_replica(run: Recorded, result: Result) -> float:
    """Share of the turns that ran on the replica the simulation said."""
    return mean(
        real.replica == simulated.replica
        for recorded, item in zip(run.records, result.trajectories(), strict=True)
        for real, simulated in zip(recorded.steps, item.steps, strict=True)
    )


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Over runs: absolute makespan errors, their mean with sign, and the absolute errors of all trajectories' ends together."""
    makespan = [abs(row["makespan_error"]) for row in rows]
    finish = np.abs(np.concatenate([row["finish_errors"] for row in rows]))
    return {
        "runs": len(rows),
        "makespan_error_median": median(makespan),
        "makespan_error_max": max(makespan),
        "makespan_bias": mean(row["makespan_error"] for row in rows),
        "finish_error_median": float(np.median(finish)),
        "finish_error_p90": float(np.quantile(finish, 0.9)),
    }


def evaluate(folder: Path, index: dict[str, Any]) -> dict[str, Any]:
    """The experiment's result, JSON-ready: each run, each configuration, all together, and what was learned.

    A round is predicted from its own calibration runs, which are minutes old, as a machine's speed drifts over longer times.
    """
    runs = load(folder, index)
    attempts = [run for run in runs if run.role == "predicted"]
    tested, learned_from = counting(attempts), counting([run for run in runs if run.role == "calibration"])
    rounds = {seed: learn([run for run in learned_from if run.seed == seed]) for seed in sorted({run.seed for run in learned_from})}
    no_overhead = {seed: replace(machine, overheads_s={}) for seed, machine in rounds.items()}

    def errors(some: Sequence[Recorded], known: Mapping[int, Machine] = rounds) -> list[dict[str, Any]]:
        return [compare(run, predict(run.configuration, run.seed, known[run.seed])) for run in some]

    rows = errors(tested)
    names = dict.fromkeys(row["configuration"] for row in rows)
    first = tested[0]
    same = [run for run in runs if (run.configuration, run.seed) == (first.configuration, first.seed)]
    return {
        "overall": summary(rows),
        "configurations": {name: summary([row for row in rows if row["configuration"] == name]) for name in names},
        "runs": rows,
        "all_attempts": summary(errors(attempts)),
        "without_overhead": summary(errors(tested, no_overhead)),
        "repeated": [_facts(run) | {"makespan_s": float(run.finish_s.max())} for run in same],
        "rounds": [
            {"seed": seed, "runs": [_facts(run) for run in learned_from if run.seed == seed]} | _learned(machine)
            for seed, machine in rounds.items()
        ],
    }


def _facts(run: Recorded) -> dict[str, Any]:
    return {"configuration": run.configuration.name, "seed": run.seed, "foreign": run.foreign, "load": run.load}


def _learned(machine: Machine) -> dict[str, Any]:
    engine = machine.latency.engines[1]
    fit = engine.fit
    assert fit is not None
    return {
        "turns": fit.turns,
        "decode_base_s": engine.decode.base_s,
        "decode_per_sequence_s": engine.decode.per_seq_s,
        "decode_per_context_token_s": engine.decode.per_context_s,
        "prefill_per_token_s": engine.prefill.per_token_s,
        "turn_error_median": fit.median_error,
        "turn_error_p90": fit.p90_error,
        "max_batch": fit.max_batch,
        "max_context": fit.max_context,
        "overheads_s": machine.overheads_s,
    }
