"""vLLM engines in this process's care: random weights of a given shape, the plugin's scheduler, token ids in and out.

No Ray and no verl: where those are missing or fail, everything but the end-to-end experiment still runs. Each engine has its own
engine-core process; several may share a card, each with its part of the memory. They start one after the other, because vLLM measures free
memory as it starts and another engine's start would disturb that.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from bench.gpu.profiles import Profile
from bench.gpu.shapes import Shape, write_config
from verl_heddle.verl_plugin.request_life import RequestLives

FIRST_WORD = 300
"""Ids below may be special in some tokenizer; prompts are made of those above."""

SWITCHED = "bench.schedule.scheduler.SwitchedScheduler"
"""The plugin's scheduler, which takes slots and order anew between runs."""

START_S, CALL_S = 240.0, 60.0
"""Longest start, longest call between runs: nothing waits forever."""

EAGER = "HEDDLE_BENCH_EAGER"
"""Set to 1 where CUDA graphs or compilation failed in the smoke test: engines then start without."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One generation. Seconds; `first_s` from its slot to its first token, `decode_s` from there to its last, by the engine's own clock."""

    token_ids: list[int]
    cached_tokens: int
    call_s: float
    queue_s: float
    preemptions: int
    first_s: float
    decode_s: float
    first_at: float
    last_at: float


class Handle:
    """One engine."""

    def __init__(self, engine: Any, name: str, start_s: float) -> None:
        self.engine, self.name, self.start_s = engine, name, start_s
        self._lives = RequestLives()
        self._lives.listen(engine.output_processor)

    async def generate(self, prompt: Sequence[int], tokens: int, request: str, priority: int = 0, temperature: float = 1.0) -> Answer:
        """`tokens` new tokens after `prompt`; cancelling the task aborts the request in the engine."""
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        kind = RequestOutputKind.FINAL_ONLY
        sampling = SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=temperature, detokenize=False, output_kind=kind)
        began, output = time.monotonic(), None
        try:
            async for told in self.engine.generate(TokensPrompt(prompt_token_ids=list(prompt)), sampling, request, priority=priority):
                output = told
        finally:
            life = self._lives.pop(request)
        if output is None or len(output.outputs[0].token_ids) != tokens:
            made = 0 if output is None else len(output.outputs[0].token_ids)
            raise RuntimeError(f"engine {self.name} ended request {request} after {made} of {tokens} tokens")
        stats = output.metrics
        return Answer(
            list(output.outputs[0].token_ids),
            output.num_cached_tokens or 0,
            time.monotonic() - began,
            life.queue_s if life else 0.0,
            life.preemptions if life else 0,
            stats.first_token_ts - stats.scheduled_ts,
            stats.last_token_ts - stats.first_token_ts,
            stats.first_token_ts,
            stats.last_token_ts,
        )

    async def utility(self, method: str, *args: Any) -> Any:
        """A call into the engine core, run between two steps."""
        return await asyncio.wait_for(self.engine.engine_core.call_utility_async(method, *args), CALL_S)

    async def prepare(self, slots: int, order: str) -> None:
        """Between runs: empty the prefix cache, set slots and order (`fcfs`, `priority` or `preempt`)."""
        end = time.monotonic() + CALL_S
        while (await self.counts())["requests"] and time.monotonic() < end:  # what was aborted leaves a step later
            await asyncio.sleep(0.01)
        await asyncio.wait_for(self.engine.reset_prefix_cache(), CALL_S)
        await self.utility("fidelity_adjust", slots, order)

    async def counts(self) -> dict[str, int]:
        """The scheduler's counts."""
        told: dict[str, int] = await self.utility("heddle_counts")
        return told

    async def workers(self, method: str, *args: Any) -> Any:
        """A call into the worker process that holds the weights."""
        return await asyncio.wait_for(self.engine.collective_rpc(method, args=args), START_S)


def words(key: str, number: int, vocabulary: int) -> list[int]:
    """`number` token ids that depend on `key` only; no two keys have a common beginning."""
    return Random(key).choices(range(min(FIRST_WORD, vocabulary // 2), vocabulary - 10), k=number)


def arguments(profile: Profile, shape: Shape, folder: Path, slots: int, kv_tokens: int, share: float, **more: Any) -> dict[str, Any]:
    """What vLLM's `AsyncEngineArgs` takes."""
    return {
        "model": str(write_config(shape, folder / f"model-{shape.name}")),
        "skip_tokenizer_init": True,
        "load_format": "dummy",
        "dtype": profile.dtype,
        "max_model_len": min(profile.max_model_len, kv_tokens),
        "max_num_seqs": slots,
        "max_num_batched_tokens": profile.batch_tokens,
        "block_size": profile.block_tokens,
        "num_gpu_blocks_override": kv_tokens // profile.block_tokens,
        "gpu_memory_utilization": share,
        "enable_prefix_caching": True,
        "scheduling_policy": "priority",
        "scheduler_cls": SWITCHED,
        "distributed_executor_backend": "mp" if profile.device == "cpu" else None,
        "enforce_eager": profile.device == "cpu" or os.environ.get(EAGER) == "1",
        "generation_config": "vllm",
        "disable_log_stats": False,
        "seed": 0,
        **more,
    }


@asynccontextmanager
async def started(
    profile: Profile, folder: Path, slots: int, kv_tokens: int, number: int = 1, shape: Shape | None = None, **more: Any
) -> AsyncIterator[list[Handle]]:
    """`number` engines, shut down at the end whatever happens.

    Raises:
        RuntimeError, TimeoutError: an engine does not start.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    os.environ["HEDDLE_PREEMPT"] = json.dumps({"tokens_per_unit": profile.quantum_tokens})  # of the engines' processes
    handles: list[Handle] = []
    try:
        for index in range(number):
            asked = arguments(profile, shape or profile.shape, folder, slots, kv_tokens, profile.memory_share / number, **more)
            began = time.monotonic()
            engine = await asyncio.wait_for(asyncio.to_thread(AsyncLLM.from_engine_args, AsyncEngineArgs(**asked)), START_S)
            handles.append(Handle(engine, f"replica_{index}", time.monotonic() - began))
            print(f"engine {index} up after {handles[-1].start_s:.0f} s", flush=True)
        yield handles
    finally:
        for handle in handles:
            with suppress(Exception):
                handle.engine.shutdown()
