"""vLLM's own scheduler, whose slots and order can be set between runs: one start of the engines serves every configuration.

Imported by the engine-core process (`scheduler_cls`). Nothing of a scheduling step is changed.
"""

from __future__ import annotations

from vllm.v1.core.sched.request_queue import SchedulingPolicy, create_request_queue
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.core import EngineCore


class AdjustableScheduler(Scheduler):
    """On CPU vLLM never schedules asynchronously, so the plain `Scheduler` is the one it would choose itself."""

    def adjust(self, slots: int, order: str) -> None:
        """Take `slots` (up to the engine's `max_num_seqs`) and `order` (`fcfs` or `priority`), as if started with them.

        Raises:
            RuntimeError: requests are in the engine.
        """
        if self.requests:
            raise RuntimeError(f"{len(self.requests)} requests in the engine: adjust it between runs")
        self.max_num_running_reqs = slots
        self.policy = SchedulingPolicy(order)
        self.waiting = create_request_queue(self.policy)
        self.skipped_waiting = create_request_queue(self.policy)


def adjust(core: EngineCore, slots: int, order: str) -> None:
    """Utility call, run by the engine core between two steps."""
    core.scheduler.adjust(slots, order)


EngineCore.fidelity_adjust = adjust
