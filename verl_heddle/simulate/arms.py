"""Several policies on the same trajectories: the rows of a table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from verl_heddle.fleet import Replica
from verl_heddle.simulate.baselines import (
    AffinityMargin,
    Continuum,
    DualThreshold,
    Lfs,
    LptOracle,
    Plas,
    RoundRobin,
    Slime,
    Stock,
    ThunderAgent,
    TrajectoryFcfs,
    UniBoost,
    VerlStar,
    WaveAdmission,
)
from verl_heddle.simulate.layouts import DEFAULT_SLOTS, make_fleet
from verl_heddle.simulate.options import EngineOptions, HostTier
from verl_heddle.simulate.policy import Latency, Policy
from verl_heddle.simulate.result import Result
from verl_heddle.simulate.run import simulate
from verl_heddle.simulate.workload import most_kv
from verl_heddle.trajectory import Trajectory

PRIORITY = EngineOptions(order="priority")


@dataclass(frozen=True, slots=True)
class Arm:
    """One row: a policy made fresh from a seed, the fleet it runs on, the engines' settings."""

    policy: Callable[[int], Policy]
    fleet: Sequence[Replica]
    engine: EngineOptions = field(default_factory=EngineOptions)


def run_arms(
    trajectories: Sequence[Trajectory], arms: Mapping[str, Arm], latency: Latency, *, seeds: Sequence[int] = (0,), **common: Any
) -> dict[str, list[Result]]:
    """Simulate every arm with every seed, each time with a fresh policy; results by arm name, in the order of `seeds`.

    `common` goes to `simulate` (`spread_s`, `arrivals_s`, `changes`, `step`); errors as there.
    """
    return {
        name: [simulate(trajectories, arm.fleet, latency, arm.policy(seed), engine=arm.engine, seed=seed, **common) for seed in seeds]
        for name, arm in arms.items()
    }


def peer_arms(trajectories: Sequence[Trajectory], fleet: Sequence[Replica]) -> dict[str, Arm]:
    """Stock verl, the same with an ideal host tier, every peer's rule, and LPT with true lengths, on one fleet.

    Where KV cache is limited, the tier needs a latency model that tells the bytes of a token.
    """
    return {
        "stock": Arm(Stock, fleet),
        "stock_tier": Arm(Stock, fleet, EngineOptions(tier=HostTier())),
        "trajectory_fcfs": Arm(TrajectoryFcfs, fleet, PRIORITY),
        "round_robin": Arm(RoundRobin, fleet),
        "slime": Arm(Slime, fleet),
        "verl_star": Arm(VerlStar, fleet),
        "dual_threshold": Arm(DualThreshold, fleet),
        "affinity_margin": Arm(AffinityMargin, fleet),
        "plas": Arm(Plas, fleet, PRIORITY),
        "thunder_agent": Arm(ThunderAgent, fleet),
        "continuum": Arm(Continuum, fleet, PRIORITY),
        "wave_admission": Arm(WaveAdmission, fleet),
        "lfs": Arm(Lfs, fleet),
        "uniboost": Arm(UniBoost, fleet, PRIORITY),
        "lpt_oracle": Arm(lambda seed: LptOracle(trajectories, seed), fleet, PRIORITY),
    }


def fixed_tp_arms(
    trajectories: Sequence[Trajectory],
    gpus: int,
    latency: Latency,
    tps: Iterable[int],
    slots: int | Mapping[int, int] = DEFAULT_SLOTS,
    kv_tokens: Mapping[int, int | None] | None = None,
) -> dict[str, Arm]:
    """Stock verl at every fixed tensor-parallel degree that works, named `stock tp=<degree>`.

    Left out: degrees that do not divide `gpus`, do not hold the model, or whose KV cache cannot hold the longest turn.
    """
    needed = most_kv(trajectories)
    arms = {}
    for tp in tps:
        if gpus % tp or not latency.fits(tp):
            continue
        fleet = make_fleet(gpus, tp, latency, slots, kv_tokens)
        if fleet[0].kv_tokens is None or fleet[0].kv_tokens >= needed:
            arms[f"stock tp={tp}"] = Arm(Stock, fleet)
    return arms


def best(results: Mapping[str, Sequence[Result]]) -> str:
    """Name of the arm with the smallest median makespan."""
    return min(results, key=lambda name: median(result.makespan_s for result in results[name]))
