"""Lists what the scheduler subclass relies on inside vLLM, and checks it against the installed release.

vLLM's scheduler interface is not public. So every name that `vllm_scheduler` overrides or calls is listed with its parameters in the
releases of `compat.SUPPORTED`. Anything else is a mismatch, and the subclass then leaves scheduling to vLLM.
"""

from __future__ import annotations

import dis
import inspect
from importlib import import_module
from typing import Any

SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
ASYNC = "vllm.v1.core.sched.async_scheduler:AsyncScheduler"
QUEUE = "vllm.v1.core.sched.request_queue:PriorityRequestQueue"

SIGNATURES = {
    f"{SCHEDULER}.schedule": ("self throttle_prefills",),
    f"{SCHEDULER}.add_request": ("self request",),
    f"{SCHEDULER}._preempt_request": ("self request timestamp", "self request timestamp drop_stale_output"),
    f"{SCHEDULER}._is_blocked_waiting_status": ("status",),
    f"{ASYNC}._update_after_schedule": ("self scheduler_output",),
    f"{ASYNC}._update_request_with_output": ("self request new_token_ids", "self request new_token_ids is_stale"),
    f"{QUEUE}.add_request": ("self request",),
    f"{QUEUE}.peek_request": ("self",),
    f"{QUEUE}.remove_requests": ("self requests",),
    "vllm.v1.core.sched.request_queue:create_request_queue": ("policy",),
    "vllm.v1.core.kv_cache_manager:KVCacheManager.get_blocks": ("self request_id",),
    "vllm.v1.core.block_pool:BlockPool.get_num_free_blocks": ("self",),
}
"""Callable -> its parameters, one entry per variant in the supported releases."""

ASYNC_METHODS = {"__init__", "_update_after_schedule", "_update_request_with_output"}
"""Everything that `AsyncScheduler` adds to `Scheduler`, which must be bypassed if vLLM schedules synchronously."""

ATTRIBUTES = (
    "cache_config",
    "connector",
    "kv_cache_config",
    "kv_cache_manager",
    "max_num_running_reqs",
    "num_spec_tokens",
    "num_waiting_for_streaming_input",
    "parallel_config",
    "pause_state",
    "policy",
    "requests",
    "running",
    "scheduler_config",
    "use_v2_model_runner",
    "waiting",
)
"""Attributes that a scheduler object must have: set by its `__init__`, or properties of its class."""

REQUEST_ATTRIBUTES = ("arrival_time", "max_tokens", "num_computed_tokens", "num_tokens", "priority", "request_id", "status", "__dict__")
"""Attributes that a request object must have; `__dict__`, because heddle attaches its own record to it."""


def attribute(path: str) -> Any:
    """The object at "module:a.b"."""
    module, _, names = path.partition(":")
    thing = import_module(module)
    for name in names.split("."):
        thing = getattr(thing, name)
    return thing


def mismatch() -> str | None:
    """A message about the first mismatch with the supported releases; None if there is none."""
    try:
        for path, releases in SIGNATURES.items():
            found = " ".join(inspect.signature(attribute(path)).parameters)
            if found not in releases:
                return f"{path.partition(':')[2]} takes ({found.replace(' ', ', ')})"
        added = {name for name, thing in vars(attribute(ASYNC)).items() if inspect.isfunction(thing)}
        if added != ASYNC_METHODS:
            return f"AsyncScheduler overrides {', '.join(sorted(added))}"
        scheduler = attribute(SCHEDULER)
        known = {step.argval for step in dis.get_instructions(scheduler.__init__) if step.opname == "STORE_ATTR"} | set(dir(scheduler))
        if lost := [name for name in ATTRIBUTES if name not in known]:
            return f"the scheduler has no {', '.join(lost)}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def missing(scheduler: Any) -> str | None:
    """A message about the first attribute that a scheduler object lacks; None if it has all."""
    for name in ATTRIBUTES:
        if not hasattr(scheduler, name):
            return f"the scheduler has no {name}"
    return None
