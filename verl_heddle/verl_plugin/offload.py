"""How much of the host's memory vLLM gets for what a replica's KV cache evicts (`heddle.offload`)."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

GIB = 2**30
LEAST_GIB = 1.0
"""A smaller tier holds a handful of contexts."""


def size_gib(told: Mapping[str, Any], tp: int, free_bytes: int) -> float:
    """GiB for one replica of degree `tp`, all its ranks together. `told`: `gib`, `host_share`, `gpus_per_host`."""
    if told.get("gib") is not None:
        return float(told["gib"])
    replicas = max(1, int(told["gpus_per_host"]) // tp)
    return float(told["host_share"]) * free_bytes / GIB / replicas


def set_up(told: Mapping[str, Any], tp: int, args: Namespace) -> str:
    """Put the size into vLLM's arguments; returns a line that says what was done, or why not."""
    import psutil

    free = psutil.virtual_memory().available
    size = size_gib(told, tp, free)
    if not hasattr(args, "kv_offloading_size"):
        return "KV offload is OFF: this vLLM has no kv_offloading_size"
    if size < LEAST_GIB or size * GIB > 0.9 * free:
        there = f"{size:.1f} GiB would be its part, of {free / GIB:.1f} GiB that the host has free"
        return f"KV offload is OFF: {there}; set heddle.offload.gib"
    args.kv_offloading_size = size
    return f"evicted KV cache is kept in {size:.1f} GiB of the host's memory"
