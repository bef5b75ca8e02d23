"""The nouns of the serving side: what a rollout replica is to a policy."""

from __future__ import annotations

from dataclasses import dataclass

BATCH_TOKENS = 8192
"""verl's default `rollout.max_num_batched_tokens`: tokens that an engine step computes at most."""


@dataclass(frozen=True, slots=True)
class Replica:
    """One rollout server.

    `name` is how verl's router knows it (its address), `tp` the tensor-parallel degree, `slots` how many requests it decodes at once
    (vLLM `max_num_seqs`), `kv_tokens` how many tokens its KV cache holds (None: not limiting or not known).
    """

    name: str
    tp: int = 1
    slots: int = 256
    kv_tokens: int | None = None
    calls: int | None = None
    """Calls that its server actor takes at a time (verl: `RolloutReplica.max_concurrency`); None: not limited."""
    caches: bool = True
    """Whether a turn finds the context that the turn before it left (vLLM: `enable_prefix_caching`)."""
    tier: bool = False
    """Whether what its KV cache evicts is kept in the host's memory, and read back from there (vLLM: `kv_offloading_size`)."""

    def __post_init__(self) -> None:
        if self.tp < 1 or self.slots < 1 or (self.kv_tokens is not None and self.kv_tokens < 1):
            raise ValueError(f"replica {self.name}: tp, slots and kv_tokens must be positive, got {self}")
