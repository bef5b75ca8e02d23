"""verl's vLLM server with the plugin's ear on it, as a Ray actor without a trainer, bound to one core.

Only the launch is replaced (no weights to sync, no HTTP): `run_server` builds the engine and nothing else.
"""

from __future__ import annotations

import asyncio
import os
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any

from omegaconf import OmegaConf

from bench.fidelity.model import MAX_CONTEXT


@dataclass(frozen=True, slots=True)
class EngineArguments:
    """What the engine is started with."""

    model: str
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    distributed_executor_backend: str = "mp"
    scheduling_policy: str = "priority"
    scheduler_cls: str = "bench.fidelity.scheduler.AdjustableScheduler"
    dtype: str = "float32"
    max_model_len: int = MAX_CONTEXT
    enforce_eager: bool = True
    gpu_memory_utilization: float = 0.1
    disable_log_stats: bool = False


def bind(core: int) -> None:
    """Bind this process to one core, all its threads; processes it starts inherit that."""
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), {core})


def _server(arguments: EngineArguments) -> Any:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    from verl_heddle.verl_plugin.replicas import HeddleHttpServer, vLLMHttpServer

    class EngineOnly(vLLMHttpServer):
        async def run_server(self, args: Any) -> None:
            self.engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**asdict(arguments)))

    class Server(HeddleHttpServer, EngineOnly):
        lora_as_adapter = False

        def __init__(self) -> None:
            limits = {"max_model_len": MAX_CONTEXT, "response_length": MAX_CONTEXT, "prompt_length": MAX_CONTEXT, "full_determinism": False}
            self.config = OmegaConf.create(limits | {"mtp": None, "enable_rollout_routing_replay": False})
            self.model_config = SimpleNamespace(processor=None)
            self._disaggregation_role, self._pd_decode_peers = None, None
            self._submission_paused, self._rejecting, self._admitting = False, False, 0
            self.node_rank = self.replica_rank = self.global_steps = 0

    return Server()


class EngineServer:
    """The actor. Builds the server inside, where the engine's environment is set, and stands for it."""

    def __init__(self, arguments: EngineArguments, core: int | None) -> None:
        if core is not None:
            bind(core)
        self._server = _server(arguments)

    async def start(self) -> int:
        """Start the engine; returns the id of this process, ancestor of all processes of the replica."""
        self._server._resume_event = asyncio.Event()
        await self._server.run_server(None)
        return os.getpid()

    async def generate(self, **kwargs: Any) -> Any:
        return await self._server.generate(**kwargs)

    async def heddle_priorities(self, table: dict[str, int]) -> int:
        return await self._server.heddle_priorities(table)

    async def heddle_status(self) -> dict[str, int]:
        return await self._server.heddle_status()

    async def prepare(self, slots: int, order: str, *kv_tokens: int) -> None:
        """Between runs: forget the prefix cache, set slots, order and, where it is given, the size of the KV cache."""
        await self._server.engine.reset_prefix_cache()
        await self._server.engine.engine_core.call_utility_async("fidelity_adjust", slots, order, *kv_tokens)
