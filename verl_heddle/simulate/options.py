"""Settings of the simulated engines, and events of the fleet during a step."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Literal

from verl_heddle.fleet import BATCH_TOKENS, Replica
from verl_heddle.schedule.preempt import Rule


@dataclass(frozen=True, slots=True)
class HostTier:
    """A KV cache in host memory: a context evicted from the GPU is read back instead of being recomputed.

    Reading back adds its time to the engine's steps, as prefill does. This is conservative: vLLM's own connector overlaps the two. Writing
    is assumed to be free, because it overlaps decoding. The least recently used entry is dropped first.

    Raises:
        ValueError: a number is out of range.
    """

    bytes_per_s: float = 25e9
    """Bandwidth from host memory to each GPU while all GPUs read: 70 % of the 35 GB/s that PCIe 5 gives from pinned memory
    (`latency.model`), because KV cache is transferred block by block. An assumption until it is measured."""

    host_bytes: float = inf
    """KV bytes that one host keeps for all its replicas; each replica gets its GPUs' share. inf: unlimited, the ideal case."""

    gpus_per_host: int = 8

    def __post_init__(self) -> None:
        if not (self.bytes_per_s > 0 and self.host_bytes > 0 and self.gpus_per_host >= 1):
            raise ValueError(f"bytes_per_s and host_bytes must be positive and gpus_per_host at least 1, got {self}")

    def tokens(self, kv_bytes: int) -> float:
        """Tokens of a replica that the tier holds, given the KV bytes of a token on each GPU (`Latency.kv_bytes`)."""
        return self.host_bytes / self.gpus_per_host / kv_bytes  # a replica's share and a token's bytes both scale with the degree

    def read_s(self, kv_bytes: int) -> float:
        """Seconds to read one token back; each GPU reads its own part."""
        return kv_bytes / self.bytes_per_s


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """vLLM settings that affect when a turn runs; the defaults are those of verl 0.9.1 with vLLM 0.24 to 0.27 on a GPU.

    Raises:
        ValueError: a number is out of range.
    """

    order: Literal["fcfs", "priority"] = "fcfs"
    """vLLM `scheduling_policy`. `fcfs`: turns wait in order of arrival; KV pressure preempts the turn admitted last, which returns to the
    front of the queue. `priority`: turns wait in order of (priority, arrival); KV pressure preempts the turn with the largest pair."""

    batch_tokens: int | None = BATCH_TOKENS
    """vLLM `max_num_batched_tokens`: tokens a step may compute, decodes first, then prefill chunks. None: no limit."""

    block_tokens: int = 16
    """vLLM `block_size`: a cached prefix is reused in whole blocks. KV *capacity* is counted in tokens, which is optimistic by less than
    a block per turn."""

    prefix_cache: bool = True
    """vLLM `enable_prefix_caching` (verl's default): a turn reuses the context that its trajectory left on the replica."""

    tier: HostTier | None = None
    """KV cache in host memory (vLLM's `kv_offloading_size`); None: evicted tokens are lost, as in stock verl."""

    share_prompts: bool = True
    """Trajectories of one prompt on one replica store and compute its full blocks once, as with vLLM's prefix cache."""

    preempt: Rule | None = None
    """Preemption on arrival and ageing by `schedule.preempt`, the law of the plugin's scheduler; needs `priority` order. None: off, as in
    stock vLLM."""

    turn_overhead_s: float = 0.0
    """Seconds between a trajectory's request for a turn and its arrival at the engine: routing, transport, parsing, tokenising. Every turn
    pays it."""

    def __post_init__(self) -> None:
        if self.order not in ("fcfs", "priority"):
            raise ValueError(f"order must be fcfs or priority, got {self.order!r}")
        if self.batch_tokens is not None and self.batch_tokens < 1:
            raise ValueError(f"batch_tokens must be at least 1 or None, got {self.batch_tokens}")
        if self.block_tokens < 1 or not self.turn_overhead_s >= 0:
            raise ValueError(f"block_tokens must be at least 1 and turn_overhead_s not negative, got {self}")
        if self.preempt is not None and self.order != "priority":
            raise ValueError(f"preempt needs order='priority', got {self.order!r}")


PRIORITY = EngineOptions(order="priority")


@dataclass(frozen=True, slots=True)
class Outage:
    """A replica computes nothing from the first step boundary after `start_s` until `end_s`, for example during a weight sync or a wake-up.

    Turns may queue during the outage. With `keep_cache`, running turns freeze and continue afterwards. Without it, they return to the queue
    and the prefix cache is lost, as in vLLM's sleep.
    """

    replica: str
    start_s: float
    end_s: float
    keep_cache: bool = True


@dataclass(frozen=True, slots=True)
class FleetChange:
    """A reshard: at `at_s` the replicas `remove` leave and `add` join. New replicas accept turns at once and compute from `ready_s` on.

    Running turns on a leaving replica stop at its next step boundary and keep their generated tokens. The policy places them again, and the
    new replica recomputes their context.
    """

    at_s: float
    remove: tuple[str, ...] = ()
    add: tuple[Replica, ...] = ()
    ready_s: float = 0.0
