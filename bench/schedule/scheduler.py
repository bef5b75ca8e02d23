"""The plugin's scheduler, switched between runs from stock over priority only to preemption: one engine serves every arm of a pair.

Imported by the engine-core process (`scheduler_cls`). Nothing of a scheduling step is changed.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.request_queue import SchedulingPolicy, create_request_queue
from vllm.v1.engine.core import EngineCore

from verl_heddle.verl_plugin.vllm_scheduler import HeddleScheduler

PREEMPT = "preempt"
"""The third order beside vLLM's `fcfs` and `priority`: `priority` with preemption on arrival."""


class SwitchedScheduler(HeddleScheduler):
    """Without its rule `HeddleScheduler` is vLLM's own scheduler."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._configured = self.rule

    def adjust(self, slots: int, order: str) -> None:
        """Take `slots` (up to the engine's `max_num_seqs`) and `order`, as if started with them.

        Raises:
            RuntimeError: requests are in the engine, or the rule was switched off.
        """
        if self.requests or self._configured is None:
            raise RuntimeError(f"{len(self.requests)} requests in the engine, rule {self._configured} ({self.off})")
        self.max_num_running_reqs = slots
        self.policy = SchedulingPolicy("fcfs" if order == "fcfs" else "priority")
        self.waiting = create_request_queue(self.policy)
        self.skipped_waiting = create_request_queue(self.policy)
        self.rule = self._configured if order == PREEMPT else None


EngineCore.fidelity_adjust = lambda core, slots, order: core.scheduler.adjust(slots, order)
