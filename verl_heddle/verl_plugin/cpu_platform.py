"""Runs verl, which supports only accelerators, and real vLLM engines on a CPU. Selected by `+machine=cpu`.

1. `PlatformCPU` is registered in verl's own table; auto-detection never picks it.
2. Process-group backend: verl passes "cpu:gloo,cpu:gloo", which torch refuses (patches/cpu_process_group.md).
3. Plain linear layers in vLLM: its CPU kernels repack weights, so verl could not write new ones (patches/cpu_plain_linear.md).
4. An idle vLLM worker sleeps between polls of its queue instead of keeping a core busy (patches/cpu_quiet_worker.md).
"""

from __future__ import annotations

import sys
import time
import types
from contextlib import contextmanager
from typing import Any

PRETENDED_MEMORY = 1 << 34
"""Reported device memory in bytes; verl only compares and logs it."""
NAP_S = 0.0002
"""Seconds between polls of the queue: short against a tiny model's step (milliseconds), and a few per cent of a core."""


class _Event:
    """Replaces `torch.cuda.Event`: on a CPU every event has already completed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def record(self, *args: Any) -> None: ...
    def wait(self, *args: Any) -> None: ...
    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


class _Stream:
    """Replaces `torch.cuda.Stream`: a CPU has a single stream."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def synchronize(self) -> None: ...
    def wait_stream(self, *args: Any) -> None: ...
    def wait_event(self, *args: Any) -> None: ...

    def record_event(self, *args: Any) -> _Event:
        return _Event()

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *args: Any) -> bool:
        return False


def _device_module() -> types.ModuleType:
    """Replaces `torch.cuda`: implements the calls that verl makes, for a CPU."""
    import torch

    module: Any = types.ModuleType("verl_heddle_cpu_device")
    for name in ["set_device", "synchronize", "empty_cache", "ipc_collect", "reset_peak_memory_stats", "set_per_process_memory_fraction"]:
        setattr(module, name, lambda *args, **kwargs: None)
    for name in ["memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved"]:
        setattr(module, name, lambda *args, **kwargs: 0)
    module.is_available = lambda: False
    module.is_initialized = lambda: True
    module.device_count = lambda: 1
    module.current_device = lambda: "cpu"
    module.get_device_name = lambda *args, **kwargs: "CPU"  # verl's FLOP counter looks it up
    module.mem_get_info = lambda *args, **kwargs: (PRETENDED_MEMORY, PRETENDED_MEMORY)
    module.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    module.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    module.Stream, module.Event = _Stream, _Event
    module.current_stream = lambda *args, **kwargs: _Stream()
    module.stream = lambda stream: _Stream()
    return module


def _platform_class() -> type:
    import torch
    from verl.plugin.platform.platform_base import PlatformBase

    class PlatformCPU(PlatformBase):
        """verl's platform interface for a machine without an accelerator."""

        _device = _device_module()
        device_name = property(lambda self: "cpu")
        vendor_name = property(lambda self: "generic")
        device_module = property(lambda self: self._device)

        def is_available(self):
            return True

        def is_platform_available(self, use_smi_check=False):
            return False  # only VERL_PLATFORM=cpu selects it

        def current_device(self):
            return "cpu"  # a string: verl writes `.to(get_device_id())`

        def device_count(self):
            return 1

        def set_device(self, device_index): ...
        def synchronize(self, device_index=None): ...
        def set_allocator_settings(self, settings): ...
        def empty_cache(self): ...
        def profiler_start(self): ...
        def profiler_stop(self): ...

        def manual_seed(self, seed):
            torch.manual_seed(seed)

        def manual_seed_all(self, seed):
            torch.manual_seed(seed)

        def get_device_capability(self, device_index=0):
            return (None, None)

        def communication_backend_name(self):
            return "gloo"

        def visible_devices_envvar(self):
            return "CUDA_VISIBLE_DEVICES"

        @contextmanager
        def nvtx_range(self, msg):
            yield

        def ray_resource_name(self):
            return "GPU"  # Ray is started with fake GPUs

        def ray_noset_envvars(self):
            return ["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"]

        def is_ipc_supported(self):
            return False  # verl then sends weights to the engines through shared memory

        def cudart(self):
            return None

    return PlatformCPU


def _accept_doubled_gloo() -> None:
    """Make `torch.distributed.init_process_group` treat verl's "cpu:gloo,cpu:gloo" as "cpu:gloo"."""
    import torch.distributed as dist

    original = dist.init_process_group
    if getattr(original, "heddle", False):
        return

    def init_process_group(backend=None, *args, **kwargs):
        return original("cpu:gloo" if backend == "cpu:gloo,cpu:gloo" else backend, *args, **kwargs)

    init_process_group.heddle = True  # type: ignore[attr-defined]
    dist.init_process_group = init_process_group


def _keep_plain_linear() -> None:
    """In a vLLM worker (which imports vLLM before verl), clear the flag that makes vLLM repack its linear weights."""
    ops = sys.modules.get("vllm._custom_ops")
    if ops is not None and hasattr(ops, "_supports_onednn"):
        ops._supports_onednn = False  # type: ignore[attr-defined]


def _sleep_while_waiting() -> None:
    """In a vLLM worker (which imports vLLM before verl), sleep between polls during the second that vLLM busy-polls for messages."""
    queue: Any = sys.modules.get("vllm.distributed.device_communicators.shm_broadcast")
    if queue is not None and hasattr(queue, "sched_yield"):
        queue.sched_yield = lambda: time.sleep(NAP_S)


def install() -> None:
    """Register the platform and apply the patches; idempotent."""
    from verl.plugin.platform.platform_manager import PlatformRegistry

    if PlatformRegistry.get("cpu") is None:
        PlatformRegistry.register(platform="cpu")(_platform_class())
    _accept_doubled_gloo()
    _keep_plain_linear()
    _sleep_while_waiting()


def select_here() -> None:
    """Make this process use the CPU platform even if verl has already chosen one (the driver reads the flag after `import verl`)."""
    from verl.plugin.platform.platform_manager import PlatformRegistry, set_platform

    install()
    set_platform(PlatformRegistry.get("cpu")())
