"""Two real vLLM engines and trajectories that move between them: what the tests of it share."""

from __future__ import annotations

import asyncio
import time
from contextlib import contextmanager
from pathlib import Path

import ray
from engine_server import SLOTS, EngineServer
from engines import CPU_ENVIRONMENT
from omegaconf import OmegaConf

from verl_heddle.latency.model import LatencyModel
from verl_heddle.options import Options, Place, Residents
from verl_heddle.traces.recorder import Recorder
from verl_heddle.trajectory import Outcome, TrajectoryEnd, TrajectoryId
from verl_heddle.verl_plugin.client import HeddleClient
from verl_heddle.verl_plugin.live import CURRENT
from verl_heddle.verl_plugin.router import RouterActor, uniform_fleet

CONFIG = OmegaConf.create({"actor_rollout_ref": {"rollout": {"name": "vllm", "scheduling_policy": "priority"}}})
PROMPT, OUTPUT, TOOL = 1200, 30, 10
TRAJECTORIES = 6
STEP_TIMES = LatencyModel.affine(0.02, 0.01, prefill_per_token_s=1e-5)


@contextmanager
def engines(model: str, **settings):
    """Two engines by name; `settings` are further arguments of vLLM's."""
    environment = CPU_ENVIRONMENT | {"PYTHONPATH": str(Path(__file__).parent)}
    ray.init(
        num_cpus=4, include_dashboard=False, object_store_memory=200_000_000, log_to_driver=False, runtime_env={"env_vars": environment}
    )
    try:
        server = ray.remote(num_cpus=1, max_concurrency=1000)(EngineServer)
        handles = {f"s{number}": server.remote(model, **settings) for number in range(2)}
        ray.get([handle.start.remote() for handle in handles.values()], timeout=300)
        yield handles
    finally:
        ray.shutdown()


async def episode(client, name: str, first: int, tool_s: float):
    """Two turns with a tool between them; returns (tokens, record). `first`: token that makes its prompt like nobody's."""
    recorder = Recorder(TrajectoryId(name, name, 0, 1), time.monotonic(), time.time())
    CURRENT.set(recorder)
    context, said = [first] * PROMPT, []
    for turn in range(2):
        if turn:
            await asyncio.sleep(tool_s)
        sampling = {"temperature": 0.0, "ignore_eos": True, "max_tokens": OUTPUT}
        output = await client.generate(name, prompt_ids=list(context), sampling_params=sampling)
        said.append(list(output.token_ids))
        context += [*output.token_ids, *[8] * TOOL]
    client.trajectory_ended(TrajectoryEnd(recorder.id, Outcome.FINISHED, recorder.output_tokens, 2))
    return said, recorder.finish(Outcome.FINISHED, time.monotonic(), time.time(), "t", "w", None)


async def play(servers, place: Place, prompts: int, tool_s: float = 3.0):
    """Everybody's first turn on s0 while it is alone; s1 joins during it. Returns (tokens, records, counts of the client)."""
    options = Options(place=place, residents=Residents(enable=False))
    router = RouterActor.options(max_restarts=0).remote({"s0": servers["s0"]}, {})
    ray.get(router.configure.remote(options, False, uniform_fleet({"s0": servers["s0"]}, slots=SLOTS), 1500), timeout=60)
    ray.get(router.step_times_known.remote(STEP_TIMES), timeout=60)
    client = HeddleClient(CONFIG, router, servers, options)
    tasks = [asyncio.create_task(episode(client, f"t{number}", prompts + number, tool_s)) for number in range(TRAJECTORIES)]
    while ray.get(router.get_total_inflight.remote(), timeout=30) < TRAJECTORIES:
        assert not any(task.done() for task in tasks), "a trajectory ended before all had begun"
        await asyncio.sleep(0.01)
    ray.get(router.add_servers.remote({"s1": servers["s1"]}), timeout=30)
    results = await asyncio.wait_for(asyncio.gather(*tasks), 120)
    limit = time.monotonic() + 20
    while ray.get(router.get_total_inflight.remote(), timeout=30):
        assert time.monotonic() < limit, "a turn's end was not told"
        await asyncio.sleep(0.05)
    ray.kill(router)
    return [said for said, _ in results], [record for _, record in results], client.counts


def second_turns(records, reason):
    return [record.steps[1] for record in records if record.steps[1].reason == reason]
