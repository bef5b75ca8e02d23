"""`simulate` runs one step of rollouts on a fleet under a policy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import inf

import numpy as np

from verl_heddle.fleet import Replica
from verl_heddle.simulate.cluster import Cluster
from verl_heddle.simulate.options import EngineOptions, FleetChange, Outage
from verl_heddle.simulate.policy import Latency, Policy
from verl_heddle.simulate.result import ReplicaResult, Result
from verl_heddle.simulate.workload import TrajectoryState, states
from verl_heddle.trajectory import Trajectory


def simulate(
    trajectories: Sequence[Trajectory],
    fleet: Sequence[Replica],
    latency: Latency,
    policy: Policy,
    *,
    engine: EngineOptions | None = None,
    seed: int = 0,
    spread_s: float = 0.0,
    arrivals_s: Sequence[float] | None = None,
    changes: Iterable[Outage | FleetChange] = (),
    step: int = 0,
    tools_at_once: float = inf,
) -> Result:
    """Run all `trajectories` on `fleet`. Equal arguments and policy state give bit-identical results.

    Args:
        trajectories: with known lengths (`verl_heddle.traces.replayable`), submitted in this order.
        policy: an `Orchestrator`, a baseline, or any object with the same methods. It may be reused for the next step.
        engine: vLLM's settings; None: those of stock verl.
        seed: for `spread_s` only; policies have their own seeds.
        spread_s: each trajectory is submitted at a random time in [0, spread_s), to measure how much of a result is chance.
        arrivals_s: submit time of each trajectory, seconds; not together with `spread_s`. Default: all at 0.
        changes: outages and fleet changes during the step.
        step: training step, part of the trajectories' ids.
        tools_at_once: how many tools may run concurrently, at least 1. The others wait first come first served, which counts as tool time.

    Raises:
        ValueError: invalid input (empty, duplicate names, missing lengths, more context than the chosen replica holds, a replica that does
            not exist); the message says which.
    """
    options = engine or EngineOptions()
    work = states(trajectories, options, step)
    times = _submit_times(len(work), seed, spread_s, arrivals_s)
    if not tools_at_once >= 1:
        raise ValueError(f"tools_at_once must be at least 1, got {tools_at_once}")
    cluster = Cluster(fleet, latency, policy, options, work, tools_at_once)
    cluster.schedule(changes)
    cluster.run(times)
    return _result(cluster, work, trajectories, options.turn_overhead_s, step)


def _submit_times(number: int, seed: int, spread_s: float, arrivals_s: Sequence[float] | None) -> Sequence[float]:
    if not 0 <= spread_s < inf:
        raise ValueError(f"spread_s must be finite and not negative, got {spread_s}")
    if arrivals_s is not None:
        if spread_s or len(arrivals_s) != number or not all(0 <= time < inf for time in arrivals_s):
            raise ValueError(f"arrivals_s needs one time from 0 for each of {number} trajectories, and no spread_s")
        return arrivals_s
    times: list[float] = (np.random.default_rng(seed).random(number) * spread_s).tolist()
    return times


def _result(cluster: Cluster, work: list[TrajectoryState], trajectories: Sequence[Trajectory], overhead_s: float, step: int) -> Result:
    """Sum the rows of the turns by trajectory."""
    log, number = cluster.log, len(work)
    owner = log.column("trajectory")

    def total(column: str) -> np.ndarray:
        return np.bincount(owner, weights=log.column(column), minlength=number)

    start, finish = np.array([state.start_s for state in work]), np.array([state.end_s for state in work])
    queue, prefill, generate, tool = (total(name) for name in ("queue_s", "prefill_s", "generate_s", "tool_s"))
    tool = tool + np.array([state.tool_wait_s for state in work])
    other = overhead_s * np.bincount(owner, minlength=number)
    cancelled = np.array([state.cancelled for state in work])  # a cancellation may cut a tool or the overhead short
    away = np.maximum(finish - start - queue - prefill - generate, 0.0)
    tool = np.where(cancelled, np.clip(away - other, 0.0, tool), tool)
    other = np.where(cancelled, away - tool, other)
    return Result(
        start_s=start,
        finish_s=finish,
        queue_s=queue,
        prefill_s=prefill,
        generate_s=generate,
        tool_s=tool,
        other_s=np.asarray(other, dtype=np.float64),
        output_tokens=np.array([state.generated for state in work], dtype=np.int64),
        outcomes=tuple(str(state.outcome) for state in work),
        replicas=tuple(
            ReplicaResult(engine.replica, tuple(engine.busy), engine.preemptions, engine.prefilled, engine.recomputed, engine.restored)
            for engine in cluster.engines
        ),
        migrations=cluster.migrations,
        turns=log,
        source=trajectories,
        step=step,
    )
