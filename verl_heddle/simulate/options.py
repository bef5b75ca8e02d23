"""How the simulated engines behave, and what happens to the fleet while a step runs."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Literal

from verl_heddle.fleet import BATCH_TOKENS, Replica
from verl_heddle.schedule.preempt import Rule


@dataclass(frozen=True, slots=True)
class HostTier:
    """KV cache kept in the host's memory: a context evicted from the GPU is read back instead of being computed again.

    Reading back takes its time out of the steps of the engine, as prefill does, which is the careful side: vLLM's own connector overlaps
    the two. Writing is taken to be free, as it happens beside decoding. Used least recently is dropped first.

    Raises:
        ValueError: a number is out of range.
    """

    bytes_per_s: float = 25e9
    """From the host's memory to each GPU, all GPUs at once. PCIe 5 gives 35 GB/s from pinned memory (`latency.model`); 70 % of it, because
    KV cache moves block by block. An assumption until it is measured."""

    host_bytes: float = inf
    """KV cache that one host keeps for all its replicas, each getting its GPUs' share; inf: all of it, the ideal."""

    gpus_per_host: int = 8

    def __post_init__(self) -> None:
        if not (self.bytes_per_s > 0 and self.host_bytes > 0 and self.gpus_per_host >= 1):
            raise ValueError(f"bytes_per_s and host_bytes must be positive and gpus_per_host at least 1, got {self}")

    def tokens(self, kv_bytes: int) -> float:
        """Tokens of a replica that the tier holds; `kv_bytes` of a token on each of its GPUs (`Latency.kv_bytes`)."""
        return self.host_bytes / self.gpus_per_host / kv_bytes  # a replica's share and a token's bytes grow alike with its degree

    def read_s(self, kv_bytes: int) -> float:
        """Seconds to read one token back, each GPU its part."""
        return kv_bytes / self.bytes_per_s


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """vLLM's settings that change when a turn runs; defaults are those of verl 0.9.1 with vLLM 0.24 to 0.27 on a GPU.

    Raises:
        ValueError: a number is out of range.
    """

    order: Literal["fcfs", "priority"] = "fcfs"
    """vLLM `scheduling_policy`. `fcfs`: waiting turns by arrival, the victim of KV pressure is the turn admitted last and returns
    to the queue's
    front. `priority`: waiting turns by (priority, arrival), the victim is the largest such pair."""

    batch_tokens: int | None = BATCH_TOKENS
    """vLLM `max_num_batched_tokens`: tokens a step may compute, decodes first, then prefill chunks. None: no limit."""

    block_tokens: int = 16
    """vLLM `block_size`: a cached prefix is reused in whole blocks. KV *capacity* is counted in tokens, optimistic by less than a block
    per turn."""

    prefix_cache: bool = True
    """vLLM `enable_prefix_caching` (verl's default): a turn finds what its trajectory left on the replica."""

    tier: HostTier | None = None
    """KV cache in the host's memory (vLLM's `kv_offloading_size`); None: what is evicted is lost, as in stock verl."""

    share_prompts: bool = True
    """Trajectories of one prompt on one replica hold and compute its full blocks once, as vLLM's prefix cache does."""

    preempt: Rule | None = None
    """Preemption on arrival and ageing by `schedule.preempt`, the law of the plugin's scheduler; needs `priority` order. None: off, as in
    stock vLLM."""

    turn_overhead_s: float = 0.0
    """Seconds between wanting a turn and the engine seeing it: routing, transport, parsing, tokenising. Paid by every turn."""

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
    """A replica computes nothing from the first step boundary after `start_s` until `end_s`: a weight sync, a wake-up.

    Turns may queue meanwhile. With `keep_cache` running turns freeze and go on afterwards; without, they return to the queue and the prefix
    cache is lost (what vLLM's sleep does).
    """

    replica: str
    start_s: float
    end_s: float
    keep_cache: bool = True


@dataclass(frozen=True, slots=True)
class FleetChange:
    """At `at_s` the replicas `remove` leave and `add` join: a reshard. New replicas accept turns at once and compute from `ready_s` on.

    Running turns on a leaving replica stop at its next step boundary, keep the tokens they have, and start anew wherever the
    policy says; their context is computed again there.
    """

    at_s: float
    remove: tuple[str, ...] = ()
    add: tuple[Replica, ...] = ()
    ready_s: float = 0.0
