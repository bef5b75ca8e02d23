"""The plugin's scheduler, whose slots, order and KV cache can be set between runs: one start of the engines serves every configuration.

Imported by the engine-core process (`scheduler_cls`). Nothing of a scheduling step is changed: without its rule `HeddleScheduler` is vLLM's
own scheduler, and on a CPU, where vLLM never schedules asynchronously, the plain one.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.request_queue import SchedulingPolicy, create_request_queue
from vllm.v1.engine.core import EngineCore

from verl_heddle.verl_plugin.vllm_scheduler import HeddleScheduler

PREEMPT = "preempt"
"""The third order beside vLLM's `fcfs` and `priority`: `priority` with the plugin's preemption on arrival."""


class AdjustableScheduler(HeddleScheduler):
    """A smaller KV cache is a part of vLLM's block pool that nobody gets: as if started with fewer blocks (`num_gpu_blocks_override`)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._configured, self.rule = self.rule, None
        self._withheld: list[Any] = []

    def adjust(self, slots: int, order: str, kv_tokens: int | None = None) -> None:
        """Forget the prefix cache; take `slots` (up to the engine's `max_num_seqs`), `order` (`fcfs`, `priority` or `PREEMPT`) and a KV
        cache of `kv_tokens` (None: all there is), as if started with them.

        Raises:
            RuntimeError: requests are in the engine, the rule is off, or there are fewer blocks.
        """
        if self.requests or self._configured is None:
            raise RuntimeError(f"{len(self.requests)} requests in the engine, rule {self._configured} ({self.off})")
        pool = self.kv_cache_manager.block_pool
        pool.free_blocks(self._withheld)
        self._withheld = []
        if not self.kv_cache_manager.reset_prefix_cache():
            raise RuntimeError("the prefix cache was not reset: blocks are in use")
        if kv_tokens is not None:
            too_many = pool.get_num_free_blocks() - kv_tokens // self.block_size
            if too_many < 0:
                raise RuntimeError(f"the engine has {pool.get_num_free_blocks()} blocks of {self.block_size}, not {kv_tokens} tokens")
            self._withheld = pool.get_new_blocks(too_many)
        self.max_num_running_reqs = slots
        self.policy = SchedulingPolicy("fcfs" if order == "fcfs" else "priority")
        self.waiting = create_request_queue(self.policy)
        self.skipped_waiting = create_request_queue(self.policy)
        self.rule = self._configured if order == PREEMPT else None


EngineCore.fidelity_adjust = lambda core, slots, order, kv_tokens=None: core.scheduler.adjust(slots, order, kv_tokens)
"""Utility call, run by the engine core between two steps; vLLM counts its parameters."""
