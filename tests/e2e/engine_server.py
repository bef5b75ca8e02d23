"""verl's vLLM server with our ear on it, as a Ray actor without a trainer.

Only the launch is replaced (no weights to sync, no HTTP): `run_server` builds the engine and nothing else.
"""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

from omegaconf import OmegaConf

SLOTS = 2


def server_class(model: str, **more):
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    from verl_heddle.verl_plugin.replicas import HeddleHttpServer, vLLMHttpServer

    class EngineOnly(vLLMHttpServer):
        async def run_server(self, args):
            settings = {
                "model": model,
                "dtype": "float32",
                "max_model_len": 2048,
                "enforce_eager": True,
                "max_num_seqs": SLOTS,
                "scheduling_policy": "priority",
                "gpu_memory_utilization": 0.1,
                "disable_log_stats": False,
                "scheduler_cls": "verl_heddle.verl_plugin.vllm_scheduler.HeddleScheduler",
            } | more
            self.engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**settings))

    class Server(HeddleHttpServer, EngineOnly):
        lora_as_adapter = False

        def __init__(self):
            limits = {"max_model_len": 2048, "response_length": 1500, "prompt_length": 500, "full_determinism": False}
            self.config = OmegaConf.create(
                limits | {"custom": {"heddle": {"preempt": {"enable": False}}}, "mtp": None, "enable_rollout_routing_replay": False}
            )
            self.model_config = SimpleNamespace(processor=None)
            self._disaggregation_role, self._pd_decode_peers = None, None
            self._submission_paused, self._rejecting, self._admitting = False, False, 0
            self.node_rank = self.replica_rank = self.global_steps = 0

        async def start(self):
            self._resume_event = asyncio.Event()
            await self.run_server(None)

    return Server


class EngineServer:
    """Builds the server inside the actor, where the engine's environment is set, and stands for it."""

    def __init__(self, model: str, **settings):
        self._server = server_class(model, **settings)()

    async def start(self):
        await self._server.start()

    async def generate(self, **kwargs):
        return await self._server.generate(**kwargs)

    async def heddle_status(self):
        return await self._server.heddle_status()

    async def heddle_limits(self, table):
        return await self._server.heddle_limits(table)

    async def forget(self):
        """Its prefix cache."""
        assert await self._server.engine.reset_prefix_cache()

    async def external_hits(self):
        """Tokens that a KV connector brought since the start."""
        from vllm.v1.metrics.reader import get_metrics_snapshot

        return sum(one.value for one in get_metrics_snapshot() if one.name == "vllm:external_prefix_cache_hits")
