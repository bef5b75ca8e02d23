"""Engines sharing the card: verl's rule (sticky, least in-flight) against the planner, which moves trajectories in tool gaps and prewarms.

`heddle` is `simulate.planned.Planned` in the bench's own client: first placements and moves by `place.replan`, the target warmed by a
one-token request while the tool runs. It knows true lengths (quality 1), so this is placement alone. No priorities in either arm but the
prewarm's, which comes last.
"""

from __future__ import annotations

from random import Random

from bench.gpu.engines import started
from bench.gpu.one import Run
from bench.gpu.profiles import Profile
from bench.gpu.results import Prediction
from bench.gpu.versus import Arm, Versus
from bench.gpu.versus import predict as forecast
from verl_heddle.options import Options
from verl_heddle.orchestrator import Orchestrator
from verl_heddle.place.replan import Replanner
from verl_heddle.simulate import EngineOptions
from verl_heddle.simulate.foresight import Foresight
from verl_heddle.simulate.planned import Planned
from verl_heddle.traces import generate

TITLE = "Two engines on one card: sticky least in-flight against the planner with prewarmed moves"
CAVEATS = (
    "The engines share SMs and bandwidth: one that idles makes the other faster, so imbalance costs less than on cards of their own.",
    "The forecast lets every step take as long as if all engines always worked.",
    "True lengths are known to the planner.",
)


def arms(profile: Profile) -> list[Arm]:
    """Both on first come, first served queues; the planner's uses the priority queue, with all turns alike and prewarms last."""
    place = profile.place
    common = {"batch_tokens": profile.batch_tokens, "block_tokens": profile.block_tokens}

    def items(seed: int):  # type: ignore[no-untyped-def]
        return generate(place.workload, place.prompts, place.samples, seed)

    def sticky(items, seed, fleet, latency, step):  # type: ignore[no-untyped-def]
        return Orchestrator(Options(observe=True, seed=seed))

    def planned(items, seed, fleet, latency, step):  # type: ignore[no-untyped-def]
        policy = Planned(Replanner(latency, Random(seed)), Foresight(items, 1.0, seed), prewarm=True)
        policy.replicas_added(fleet)
        policy.announce(items, step)
        return policy

    return [
        Arm("sticky", "fcfs", items, sticky, EngineOptions("fcfs", **common)),
        Arm("heddle", "priority", items, planned, EngineOptions("priority", **common)),
    ]


def predict(profile: Profile) -> Prediction:
    """Simulated, every step slowed by the neighbours."""
    return forecast(profile, profile.place, arms(profile))


async def measure(run: Run) -> None:
    """All pairs there is time for."""
    place = run.profile.place
    async with started(run.profile, run.scratch, place.slots, place.kv_tokens, number=place.replicas) as handles:
        await Versus(run, place, arms(run.profile), handles).measure()
