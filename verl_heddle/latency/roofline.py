"""Roofline step times for any model on any GPU, for pairs without a table, from what a step reads, computes and sends.

Law, on each GPU of a group of `tp`:

    step = matrices + cache + all-reduce + launches
    matrices: the larger of bytes read over bandwidth and operations over FLOPS, computed separately for attention, dense MLPs, shared
        experts, routed experts and the output head. Of `E` experts with `k` per token, `n` tokens read `E * (1 - (1 - k / E)^n)` on
        average, treating each token's experts as drawn at random.
    cache: the larger of KV bytes read, `min(context, window)` tokens per layer, over bandwidth, and attention's operations over FLOPS
    all-reduce: two per layer if tp > 1, each a fixed time plus `2 (tp - 1) / tp` of the hidden states over the link. Without NVLink all
        GPUs share the host's PCIe, and the transfer takes `(tp / 2) ^ shared` times as long.
    launches: a fixed time per layer, plus another per layer with experts

A prefill is a step of `new` tokens, each of which attends to the cached tokens and to half of the new ones. fp8 weights compute in fp8 if
the GPU supports it, other quantised weights in bf16. `Factors` holds the share of the published numbers that kernels achieve, and the
fixed times.

The factors are fitted once, to some of the shipped tables (`bench/latency_export/roofline.py --fit`); `docs/models.md` gives the error
against every table, `HELD_OUT` the error against the tables left out of the fit. Times are non-decreasing in all arguments.
Not modelled: host work, expert and pipeline parallelism, multiple nodes, speculative decoding. Source: derived here (issue 21).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from verl_heddle.latency.gpus import Gpu
from verl_heddle.latency.model import Engine, LatencyModel, Memory
from verl_heddle.latency.shape import Shape
from verl_heddle.latency.surface import Surface

Array = NDArray[np.float64]

TPS = (1, 2, 4, 8)
"""Tensor-parallel degrees within one node."""


@dataclass(frozen=True, slots=True)
class Factors:
    """Share of the published numbers that kernels achieve, and fixed times in seconds."""

    memory: float
    """Share of the bandwidth, for weights and KV."""
    compute: float
    """Share of the FLOPS in attention and dense matrices."""
    experts: float
    """Share of the FLOPS in routed experts, which process small groups of tokens."""
    attention: float
    """Share of the FLOPS in attention over the cache."""
    link: float
    """Share of the link's bandwidth in an all-reduce."""
    shared: float
    """Exponent of PCIe's slowdown in the number of GPUs that share it."""
    all_reduce_s: float
    layer_s: float
    expert_layer_s: float


FACTORS = Factors(
    memory=0.77, compute=0.72, experts=0.30, attention=0.60, link=0.38, shared=1.36, all_reduce_s=10e-6, layer_s=29e-6, expert_layer_s=17e-6
)
"""Fitted values, rounded to two digits."""

HELD_OUT = {
    "dense models": {"decode step": (0.08, 0.17), "prefill": (0.10, 0.25)},
    "experts": {"decode step": (0.10, 0.25), "prefill": (0.21, 0.39)},
}
"""Median and 90th percentile of the relative error against tables left out of the fit."""

BATCHES = tuple(sorted({*range(1, 17), *(round(2 ** (i / 4)) for i in range(16, 37))}))
CONTEXTS = tuple(round(2 ** (i / 2)) for i in range(14, 35))
NEW = tuple(sorted({round(2 ** (i / 4)) for i in range(69)}))
CACHED = (0, *(round(2 ** (i / 2)) for i in range(14, 35)))
"""Grid lines of the surfaces. The law is smooth except for kinks at `max` and the window, so a few lines per octave lose less than 1 %."""


def roofline(gpu: Gpu, shape: Shape, factors: Factors = FACTORS) -> LatencyModel:
    """The latency model of `shape` on `gpu`, at every degree that `Shape.splits` allows."""
    engines = {tp: _engine(gpu, shape, tp, factors) for tp in TPS if shape.splits(tp)}
    return LatencyModel(f"{shape.name} on {gpu.name}", engines, "roofline")


def memory(gpu: Gpu, shape: Shape, tp: int) -> Memory:
    """Memory of one of `tp` GPUs."""
    return Memory(gpu.memory_bytes, shape.weight_bytes(tp), shape.kv_bytes_per_token(tp), shape.overhead_bytes(tp))


def _engine(gpu: Gpu, shape: Shape, tp: int, factors: Factors) -> Engine:
    extra = (shape.window,) if shape.window else ()
    batches = np.array(BATCHES, dtype=np.float64)
    contexts = np.array(sorted({*CONTEXTS, *extra}), dtype=np.float64)
    new, cached = np.array(NEW, dtype=np.float64), np.array(sorted({*CACHED, *extra}), dtype=np.float64)
    decode = decode_s(gpu, shape, tp, batches[:, None], contexts, factors)
    prefill = np.vstack([np.zeros(len(cached)), prefill_s(gpu, shape, tp, new[:, None], cached, factors)])
    held = memory(gpu, shape, tp)
    return Engine(
        decode=Surface.fitted(batches.tolist(), contexts.tolist(), decode),
        prefill=Surface.fitted([0.0, *new.tolist()], cached.tolist(), prefill),
        memory=held,
        load_s=held.load_s,
    )


def decode_s(gpu: Gpu, shape: Shape, tp: int, batch: Array, context: Array, factors: Factors = FACTORS) -> Array:
    """Seconds of a decode step of `batch` sequences of `context` tokens each; the two broadcast."""
    read = batch * _kv_bytes(shape, tp, context)
    compute = 2 * batch * _attention_width(shape, tp) * _seen(shape, context)
    kv = np.maximum(read / (factors.memory * gpu.bandwidth), compute / (factors.attention * gpu.bf16))
    return _matrices_s(gpu, shape, tp, batch, batch, factors) + kv


def prefill_s(gpu: Gpu, shape: Shape, tp: int, new: Array, cached: Array, factors: Factors = FACTORS) -> Array:
    """Seconds to prefill `new` tokens of one sequence after `cached` ones; the two broadcast."""
    pairs = _pairs(shape, new, cached)
    read = _kv_bytes(shape, tp, cached + new)
    attention = np.maximum(
        2 * _attention_width(shape, tp, prefill=True) * pairs / (factors.attention * gpu.bf16), read / (factors.memory * gpu.bandwidth)
    )
    return _matrices_s(gpu, shape, tp, new, np.ones_like(new), factors) + attention


def _matrices_s(gpu: Gpu, shape: Shape, tp: int, tokens: Array, heads: Array, factors: Factors) -> Array:
    """Seconds of everything except attention over the cache; the output head runs on `heads` of the tokens."""
    bandwidth, flops = factors.memory * gpu.bandwidth, factors.compute * (gpu.fp8 if shape.fp8_compute else gpu.bf16)

    def seconds(values: float, size: float, used: Array, share: Array | float = 1.0, rate: float = flops) -> Array:
        return np.maximum(values * size * share / bandwidth, 2 * values * used / rate)

    attention = sum(shape.attention_values(tp))
    dense = 3 * shape.hidden * shape.dense_width / tp
    shared = 3 * shape.hidden * shape.shared_width / tp
    total = shape.layers * seconds(attention, shape.attention_bytes, tokens)
    total = total + shape.dense_layers * seconds(dense, shape.mlp_bytes, tokens)
    if shape.experts:
        touched = 1 - (1 - shape.top_k / shape.experts) ** tokens
        routed = 3 * shape.hidden * shape.expert_width * shape.experts / tp
        used = tokens * shape.top_k / shape.experts
        total = total + shape.expert_layers * (
            factors.expert_layer_s
            + seconds(routed, shape.expert_bytes, used, touched, rate=flops * factors.experts / factors.compute)
            + seconds(shared, shape.mlp_bytes, tokens)
        )
    total = total + seconds(shape.vocab * shape.hidden / tp, 2.0, heads, rate=factors.compute * gpu.bf16)
    if tp > 1:
        sent = 2 * (tp - 1) / tp * 2 * shape.hidden * tokens * (1.0 if gpu.switched else (tp / 2) ** factors.shared)
        total = total + 2 * shape.layers * (factors.all_reduce_s + sent / (factors.link * gpu.link))
    return total + shape.layers * factors.layer_s


def _kv_bytes(shape: Shape, tp: int, context: Array) -> Array:
    """KV bytes per sequence that a step reads on one GPU."""
    return shape.kv_layer_bytes(tp) * _seen(shape, context)


def _seen(shape: Shape, context: Array) -> Array:
    """Tokens attended to, summed over the layers."""
    full = shape.layers - shape.window_layers
    return full * context + shape.window_layers * np.minimum(context, shape.window or np.inf)


def _pairs(shape: Shape, new: Array, cached: Array) -> Array:
    """Pairs of a new token and a token it attends to, summed over the layers."""
    all_pairs = new * (cached + new / 2)
    if not shape.window_layers:
        return shape.layers * all_pairs
    # A new token sees the whole context while that is shorter than the window, and the window afterwards.
    within = np.clip(shape.window - cached, 0, new)
    near = within * (cached + within / 2) + (new - within) * shape.window
    return (shape.layers - shape.window_layers) * all_pairs + shape.window_layers * near


def _attention_width(shape: Shape, tp: int, prefill: bool = False) -> float:
    """Multiply-adds per pair of tokens on one GPU: scores and values of all its heads. With latent attention, decode works in the latent
    and prefill in the heads' own width."""
    heads = shape.heads / tp
    if not shape.latent:
        return 2 * heads * shape.head_dim
    if prefill:
        return heads * (shape.nope_dim + shape.rope_dim + shape.value_dim)
    return heads * (2 * shape.latent - shape.rope_dim)
