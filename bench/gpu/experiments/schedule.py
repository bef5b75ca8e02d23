"""The order inside one engine with few slots and little KV cache: FCFS, vLLM's priority, the plugin's scheduler. Makespans, paired.

Arms, options and history are those of bench/schedule: `priority` and `heddle` are told every true length, so this is the scheduler alone.
"""

from __future__ import annotations

from dataclasses import replace

from bench.gpu.engines import started
from bench.gpu.one import Run
from bench.gpu.profiles import Profile
from bench.gpu.results import Prediction
from bench.gpu.versus import Arm, Versus
from bench.gpu.versus import predict as forecast
from bench.schedule import work
from verl_heddle.orchestrator import Orchestrator
from verl_heddle.traces import generate

TITLE = "One engine, few slots, heavy tail: FCFS, vLLM priority, heddle"
CAVEATS = (
    "True lengths are known to the arms with priorities: the scheduler alone, not the predictor.",
    "A place where order can help: four trajectories for each slot. With a slot for everybody all arms are alike.",
)


def arms(profile: Profile) -> list[Arm]:
    """As in bench/schedule, with the profile's sizes."""
    place = profile.schedule

    def arm(name: str) -> Arm:
        def policy(items, seed, fleet, latency, step):  # type: ignore[no-untyped-def]
            options = work.options(name, seed)
            options.priority.quantum_tokens = profile.quantum_tokens
            made = Orchestrator(options)
            for end in work.known(name, list(items)):
                made.trajectory_ended(end, 0.0)
            return made

        engine = replace(work.engine(name, 0.0), batch_tokens=profile.batch_tokens, block_tokens=profile.block_tokens)
        return Arm(name, work.ARMS[name], lambda seed: generate(place.workload, place.prompts, place.samples, seed), policy, engine)

    return [arm(name) for name in work.ARMS]


def predict(profile: Profile) -> Prediction:
    """Simulated."""
    return forecast(profile, profile.schedule, arms(profile))


async def measure(run: Run) -> None:
    """All pairs there is time for."""
    place = run.profile.schedule
    async with started(run.profile, run.scratch, place.slots, place.kv_tokens) as handles:
        await Versus(run, place, arms(run.profile), handles).measure()
