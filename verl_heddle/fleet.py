"""`Replica`: what a policy knows of a rollout server."""

from __future__ import annotations

from dataclasses import dataclass

BATCH_TOKENS = 8192
"""verl's default `rollout.max_num_batched_tokens`: maximum tokens per engine step."""


@dataclass(frozen=True, slots=True)
class Replica:
    """One rollout server.

    `name`: its address, as in verl's router; `tp`: tensor-parallel degree; `slots`: requests it decodes at once (vLLM `max_num_seqs`);
    `kv_tokens`: tokens its KV cache holds (None: not limiting or not known).
    """

    name: str
    tp: int = 1
    slots: int = 256
    kv_tokens: int | None = None
    calls: int | None = None
    """Calls its server actor takes at a time (verl: `RolloutReplica.max_concurrency`); None: not limited."""
    caches: bool = True
    """Whether it has a prefix cache, in which a turn finds the context of the turn before (vLLM: `enable_prefix_caching`)."""
    tier: bool = False
    """Whether it has a host tier: KV cache that it evicts is kept in host memory and read back (vLLM: `kv_offloading_size`)."""

    def __post_init__(self) -> None:
        if self.tp < 1 or self.slots < 1 or (self.kv_tokens is not None and self.kv_tokens < 1):
            raise ValueError(f"replica {self.name}: tp, slots and kv_tokens must be positive, got {self}")
