"""Arms against each other on the same trajectories, forecast before they are run: what `schedule`, `place` and `shape` share.

A pair is one seed under every arm, one after the other on the same engines, the order of the arms turned by one with every seed. Two
forecasts stand beside each makespan: from the profile's prior, made before anything was measured, and from latencies fitted to a
step of the first arm under another seed, made before the pair was run. A pair is begun only while there is time for it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import mean, median
from typing import Any

from bench.fidelity.disturbance import Mark
from bench.gpu.engines import Handle
from bench.gpu.profiles import Profile, Scenario
from bench.gpu.replay import Play, makespan_s
from bench.gpu.results import Prediction, Row
from verl_heddle.fleet import Replica
from verl_heddle.latency import LatencyModel, calibrate
from verl_heddle.latency.calibrate import MIN_TURNS
from verl_heddle.latency.model import Engine
from verl_heddle.simulate import EngineOptions, Policy, simulate
from verl_heddle.trajectory import Trajectory

CALIBRATION_SEED = 1000
ENOUGH_TURNS = 2 * MIN_TURNS
"""Some of the turns that were played are not fitted: preempted ones."""

SLACK = 1.6
"""A pair may take so much longer than the last one and still be begun."""


@dataclass(frozen=True, slots=True)
class Arm:
    """`order` of the engine's queue: fcfs, priority or preempt. `policy(items, seed, fleet, latency, step)` is fresh each time."""

    name: str
    order: str
    work: Callable[[int], list[Trajectory]]
    policy: Callable[[Sequence[Trajectory], int, Sequence[Replica], LatencyModel, int], Policy]
    engine: EngineOptions = field(default_factory=EngineOptions)


@dataclass(frozen=True, slots=True)
class Slower:
    """A surface, its times multiplied."""

    base: Callable[[Any, Any], Any]
    factor: float

    def __call__(self, first: Any, second: Any) -> Any:
        return self.factor * self.base(first, second)


def slowed(latency: LatencyModel, factor: float) -> LatencyModel:
    """All steps take `factor` times as long."""
    engines = {
        tp: Engine(Slower(one.decode, factor), Slower(one.prefill, factor), one.memory, one.load_s) for tp, one in latency.engines.items()
    }
    return LatencyModel(f"{latency.name}, steps times {factor:g}", engines, latency.source)


def fleet(scenario: Scenario) -> list[Replica]:
    """The engines as policies know them."""
    return [Replica(f"replica_{index}", slots=scenario.slots, kv_tokens=scenario.kv_tokens) for index in range(scenario.replicas)]


def forecast_s(arm: Arm, seed: int, scenario: Scenario, latency: LatencyModel, overhead_s: float = 0.0) -> float:
    """Makespan in the simulator."""
    items, replicas = arm.work(seed), fleet(scenario)
    engine = replace(arm.engine, turn_overhead_s=overhead_s)
    return simulate(items, replicas, latency, arm.policy(items, seed, replicas, latency, 0), engine=engine).makespan_s


def prior(profile: Profile, scenario: Scenario) -> LatencyModel:
    """Step times before anything was measured."""
    return profile.prior() if scenario.replicas == 1 else slowed(profile.prior(), profile.neighbours)


def predict(profile: Profile, scenario: Scenario, arms: Sequence[Arm]) -> Prediction:
    """Makespan of every arm, and the ratio of the first over each other; medians over the scenario's seeds."""
    latency = prior(profile, scenario)
    told = {arm.name: [forecast_s(arm, seed, scenario, latency) for seed in scenario.seeds] for arm in arms}
    source = f"simulated with {profile.prior_source}"
    if scenario.replicas > 1 and profile.neighbours != 1.0:
        source += f", all times x{profile.neighbours:g} for {scenario.replicas} engines taking turns on one card"
    return Prediction(tuple(rows(told)), source, scenario.seeds)


def rows(seconds: dict[str, list[float]]) -> list[Row]:
    """As predictions; of pairs in the same order."""
    first, *others = seconds
    made = [Row(f"{name}, makespan", "s", median(values)) for name, values in seconds.items()]
    for name in others:
        made.append(Row(f"{first} / {name}", "x", median(a / b for a, b in zip(seconds[first], seconds[name], strict=True))))
    return made


class Versus:
    """One experiment on started engines."""

    def __init__(self, run: Any, scenario: Scenario, arms: Sequence[Arm], handles: Sequence[Handle]) -> None:
        self.run, self.scenario, self.arms = run, scenario, arms
        self.engines = {handle.name: handle for handle in handles}
        self.steps = 0

    async def play(
        self, arm: Arm, seed: int, latency: LatencyModel, items: Sequence[Trajectory] | None = None
    ) -> tuple[list[Trajectory], int]:
        """One step of one arm: its records, and how many prewarms there were."""
        self.steps += 1
        work = list(items or arm.work(seed))
        for handle in self.engines.values():
            await handle.prepare(self.scenario.slots, arm.order)
        replicas = fleet(self.scenario)
        policy = arm.policy(work, seed, replicas, latency, self.steps)
        play = Play(self.engines, replicas, policy, self.run.profile.shape.vocabulary, self.steps)
        return await asyncio.wait_for(play.run(work), max(10.0, self.run.left_s())), play.prewarms

    async def learn(self, latency: LatencyModel) -> tuple[LatencyModel, float]:
        """Latencies of these engines, and the seconds a turn spends outside of them, from steps that are not compared."""
        arm = self.arms[0]
        await self.play(arm, 0, latency, arm.work(CALIBRATION_SEED)[: max(4, self.scenario.slots // 4)])  # warm-up
        records: list[Trajectory] = []
        while sum(len(item.steps) for item in records) < ENOUGH_TURNS:
            records += (await self.play(arm, CALIBRATION_SEED + 1 + self.steps, latency))[0]
        outside = [(turn.route_s or 0) + (turn.transport_s or 0) + (turn.between_s or 0) for item in records for turn in item.steps]
        return calibrate(records), mean(outside)

    async def measure(self) -> None:
        """All pairs there is time for; writes rows and the pairs as they come."""
        latency = prior(self.run.profile, self.scenario)
        fitted, overhead_s = await self.learn(latency)
        fit = fitted.engines[1].fit
        self.run.note(scenario=asdict(self.scenario))
        self.run.note(overhead_s=overhead_s, calibration={} if fit is None else {"turns": fit.turns, "error_median": fit.median_error})
        pairs: list[dict[str, Any]] = []
        took = 0.0
        for number, seed in enumerate(self.scenario.seeds):
            if pairs and self.run.left_s() < SLACK * took:
                break
            turn = number % len(self.arms)
            pair: dict[str, Any] = {"seed": seed, "arms": {}}
            for arm in self.arms:  # forecasts first, all of them
                told = forecast_s(arm, seed, self.scenario, latency), forecast_s(arm, seed, self.scenario, fitted, overhead_s)
                pair["arms"][arm.name] = {"table_s": told[0], "fitted_s": told[1]}
            self.run.note(pairs=[*pairs, pair])
            began = time.monotonic()
            for arm in [*self.arms[turn:], *self.arms[:turn]]:
                before = Mark.now()
                records, prewarms = await self.play(arm, seed, fitted)
                told = pair["arms"][arm.name]
                told |= {"makespan_s": makespan_s(records), "foreign": Mark.now().foreign_since(before), "prewarms": prewarms}
                told |= summary(records)
                self.run.note(pairs=[*pairs, pair])
            took = time.monotonic() - began
            pairs.append(pair)
        for row in rows({arm.name: [pair["arms"][arm.name]["makespan_s"] for pair in pairs] for arm in self.arms}):
            self.run.put(row.name, row.predicted, seeds=[pair["seed"] for pair in pairs])


def summary(records: Sequence[Trajectory]) -> dict[str, Any]:
    """What a run was made of: tokens, turns, preemptions, cache hits, moves, and each trajectory's end in seconds."""
    turns = [turn for item in records for turn in item.steps]
    begun = min(item.meta["start_s"] for item in records)
    moves = sum(a.replica != b.replica for item in records for a, b in zip(item.steps, item.steps[1:], strict=False))
    return {
        "tokens": sum(item.output_tokens for item in records),
        "turns": len(turns),
        "preemptions": sum(turn.preemptions or 0 for turn in turns),
        "cached_share": sum(turn.cached_tokens or 0 for turn in turns) / max(1, sum(turn.ctx_tokens or 0 for turn in turns)),
        "moves": moves,
        "cancelled": sum(item.meta["outcome"] == "cancelled" for item in records),
        "finish_s": [round(item.meta["end_s"] - begun, 3) for item in records],
    }
