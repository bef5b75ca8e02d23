"""Replay trajectories of given lengths on real engines: verl's vLLM server, our client and router, our recorder.

Every turn is one `generate` with `min_tokens = max_tokens = output_tokens`; the conversation grows by what was generated and by
`input_tokens` new ids, so vLLM's prefix cache works as in a rollout; a tool is a sleep. The result is an ordinary trace of the plugin.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import ray
from omegaconf import OmegaConf

from bench.fidelity.model import FIRST_WORD, VOCABULARY
from bench.fidelity.server import EngineArguments, EngineServer
from verl_heddle.latency import LatencyModel
from verl_heddle.options import Options
from verl_heddle.traces.recorder import Recorder
from verl_heddle.trajectory import Outcome, Trajectory, TrajectoryEnd, TrajectoryId, TurnStart
from verl_heddle.verl_plugin.client import HeddleClient
from verl_heddle.verl_plugin.live import CURRENT
from verl_heddle.verl_plugin.router import HeddleRouter, uniform_fleet

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {
    "VERL_PLATFORM": "cpu",
    "VERL_ENGINE_DEVICE": "cuda",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": str(ROOT),
    "PYTHONDONTWRITEBYTECODE": "",
}
"""As in `+machine=cpu`; and the engine-core process has to find our scheduler."""

START_TIMEOUT_S = 900
"""A start takes half a minute of both cores; a machine with neighbours takes its time."""
CONFIG = OmegaConf.create({"actor_rollout_ref": {"rollout": {"name": "vllm", "scheduling_policy": "priority"}}})


def words(key: str, number: int) -> list[int]:
    """`number` token ids that depend on `key` only: no special tokens, no two keys with a common beginning."""
    return Random(key).choices(range(FIRST_WORD + 10, VOCABULARY), k=number)


def identity(item: Trajectory, step: int) -> TrajectoryId:
    """Who it is in this step."""
    return TrajectoryId(item.prompt_id, f"{step}:{item.prompt_id}", item.trial, step)


def first_turn(item: Trajectory, step: int) -> TurnStart:
    """As a run's manager announces it."""
    who = identity(item, step)
    return TurnStart(who, who.key, 0, item.prompt_tokens or 1, 0)


async def episode(client: HeddleClient, item: Trajectory, step: int) -> Trajectory:
    """One trajectory from its first turn to its last tool; the record of it."""
    who = identity(item, step)
    recorder = Recorder(who, time.monotonic(), time.time(), prompt_tokens=item.prompt_tokens)
    CURRENT.set(recorder)
    context = words(f"{step} {item.prompt_id}", item.prompt_tokens or 1)
    for index, turn in enumerate(item.steps):
        context += words(f"{step} {who.key} {index}", turn.input_tokens or 0)
        length = turn.output_tokens or 1
        sampling = {"temperature": 1.0, "ignore_eos": True, "min_tokens": length, "max_tokens": length}
        output = await client.generate(who.key, prompt_ids=list(context), sampling_params=sampling)
        context += output.token_ids
        if turn.tool_latency_s:
            start = time.monotonic()
            await asyncio.sleep(turn.tool_latency_s)
            recorder.tool_ran(turn.tool or "sleep", start, time.monotonic())
    client.trajectory_ended(TrajectoryEnd(who, Outcome.FINISHED, recorder.output_tokens, len(item.steps)))
    return recorder.finish(Outcome.FINISHED, time.monotonic(), time.time(), "replay", item.workload, "random")


@dataclass
class Engines:
    """Real replicas with their router, ready to replay. Use as a context manager; one at a time on a machine."""

    arguments: EngineArguments
    cores: Sequence[int | None] = (0, 1)
    """One replica each: the core it is bound to, None for any."""
    router_class: type[HeddleRouter] = HeddleRouter

    def __enter__(self) -> Engines:
        ray.init(
            num_cpus=len(self.cores) + 1,
            include_dashboard=False,
            object_store_memory=200_000_000,
            log_to_driver=False,
            runtime_env={"env_vars": ENVIRONMENT},
        )
        server = ray.remote(num_cpus=1, max_concurrency=1000)(EngineServer)
        self.servers = {f"replica_{number}": server.remote(self.arguments, core) for number, core in enumerate(self.cores)}
        self.processes: list[int] = ray.get([one.start.remote() for one in self.servers.values()], timeout=START_TIMEOUT_S)
        self.router = ray.remote(num_cpus=0)(self.router_class).remote(self.servers, {})
        return self

    def __exit__(self, *_: Any) -> None:
        ray.shutdown()

    def replay(
        self,
        trajectories: Sequence[Trajectory],
        options: Options,
        slots: int,
        order: str,
        history: Iterable[TrajectoryEnd] = (),
        step: int = 0,
        step_times: LatencyModel | None = None,
        kv_tokens: int | None = None,
    ) -> list[Trajectory]:
        """Run one step of rollouts, all trajectories submitted at once in the given order; returns their records in that order.

        Args:
            history: what the router is told to have seen before.
            step: training step; token ids depend on it, so that steps share no prefixes.
            kv_tokens: KV cache of a replica; None: all it has. Needs a scheduler that can (`bench.fidelity.scheduler`).
            step_times: what the router is told of the engines, to plan placement with, and then the batch ahead, as a run's manager does.
        """
        held = () if kv_tokens is None else (kv_tokens,)
        ray.get([server.prepare.remote(slots, order, *held) for server in self.servers.values()], timeout=60)
        ray.get(self.router.configure.remote(options, False, uniform_fleet(self.servers, slots=slots, kv_tokens=kv_tokens)), timeout=60)
        ray.get([self.router.trajectory_ended.remote(end) for end in history], timeout=60)
        if step_times is not None:
            ray.get(self.router.step_times_known.remote(step_times), timeout=60)
            ray.get(self.router.batch_expected.remote([first_turn(item, step) for item in trajectories]), timeout=60)
        client = HeddleClient(CONFIG, self.router, self.servers, options)

        async def together() -> list[Trajectory]:
            return await asyncio.gather(*(asyncio.create_task(episode(client, item, step)) for item in trajectories))

        records = asyncio.run(together())
        stats = ray.get(self.router.stats.remote(), timeout=60)
        failures = {name: count for name, count in client.counts.items() if name != "prewarm/done"} | {
            name: count for name, count in stats.items() if name.startswith("failed_")
        }
        if failures:
            raise RuntimeError(f"the plugin fell back during the run: {failures}")
        return records
