"""vLLM replicas that tell how long each request queued and how often it was preempted. Registered over verl's `vllm` replica by `gate`.

verl returns neither (`num_preempted` is None on current vLLM), yet both arrive in the server process: the engine core sends
timestamped QUEUED / SCHEDULED / PREEMPTED events with its outputs when statistics are on (`rollout.disable_log_stats=False`, set
by the flag). The server reads them as they pass and puts the sums into `TokenOutput.extra_fields["heddle"]`; the client takes
them out again, so that agent loops see what stock verl gives them.
"""

from __future__ import annotations

import time
from typing import Any

import ray
from verl.workers.rollout.replica import RolloutReplicaRegistry
from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer, vLLMReplica

from verl_heddle.verl_plugin.request_life import RequestLives
from verl_heddle.verl_plugin.voice import say_once

FIELD = "heddle"
"""Key of `TokenOutput.extra_fields` that carries the sums from server to client."""


class HeddleHttpServer(vLLMHttpServer):
    """verl's server, with one ear on the engine's request events."""

    _lives: RequestLives | None = None

    async def run_server(self, args: Any) -> None:
        await super().run_server(args)
        try:
            self._lives = RequestLives()
            self._lives.listen(self.engine.output_processor)
        except Exception as error:
            self._lives = None
            say_once(f"vLLM's request events are out of reach ({error}); queueing counts as generation")

    async def generate(self, prompt_ids: list[int], sampling_params: dict[str, Any], request_id: str, **kwargs: Any) -> Any:
        started = time.monotonic()
        life = None
        try:
            output = await super().generate(prompt_ids, sampling_params, request_id, **kwargs)
        finally:
            if self._lives is not None:
                life = self._lives.pop(request_id)
        told: dict[str, Any] = {"server_s": time.monotonic() - started}
        if life is not None:
            told |= {"queue_s": life.queue_s, "preemptions": life.preemptions}
        output.extra_fields[FIELD] = told
        return output

    async def heddle_priorities(self, table: dict[str, int]) -> int:
        """Give open requests new priorities by the id the client gave; returns how many there still were. 0 without our scheduler."""
        try:
            return await self.engine.engine_core.call_utility_async("heddle_set_priorities", table)
        except Exception as error:
            say_once(f"requests under way keep their priority ({type(error).__name__}: {error})")
            return 0

    async def heddle_counts(self) -> dict[str, int]:
        """Counts of our scheduler since the engine's start; empty without it."""
        try:
            return await self.engine.engine_core.call_utility_async("heddle_counts")
        except Exception as error:
            say_once(f"the engine does not count preemptions on arrival ({type(error).__name__}: {error})")
            return {}

    async def heddle_status(self) -> dict[str, int]:
        """Requests the engine still works on or has queued, as the server sees it."""
        return {"unfinished": self.engine.output_processor.get_num_unfinished_requests()}


class HeddleReplica(vLLMReplica):
    """verl's replica, launching our server for the policy; reward and teacher models keep verl's own."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not (self.is_reward_model or self.is_teacher_model):
            self.server_class = ray.remote(HeddleHttpServer)


def register() -> None:
    """Make `rollout.name=vllm` mean `HeddleReplica` in this process."""
    RolloutReplicaRegistry.register("vllm", lambda: HeddleReplica)
