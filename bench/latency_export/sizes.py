"""Bytes of a model from its shape: weights and KV cache per GPU of a tensor-parallel group."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

BF16_BYTES = 2
"""Weights and KV cache are bf16, what verl rolls out in."""

STEP_TOKENS = 8192
"""Tokens of one engine step that activations are sized for: vLLM's `max_num_batched_tokens` as verl sets it."""


def weight_bytes(shape: Mapping[str, Any], tp: int) -> int:
    """Weight bytes on one of `tp` GPUs.

    Embeddings, output head, attention and (expert) MLP are split `tp` ways. KV heads are split as far as they go and copied beyond;
    norms and the router of a mixture of experts are copied. `shape` is a Hugging Face config of the Qwen3 family (no biases).
    """
    hidden, head = shape["hidden_size"], shape["head_dim"]
    query, keys = shape["num_attention_heads"] * head, _kv_heads(shape, tp) * head
    tables = shape["vocab_size"] * hidden * (1 if shape["tie_word_embeddings"] else 2)
    attention = 2 * hidden * query // tp + 2 * hidden * keys
    experts = shape.get("num_experts", 0)
    if experts:
        mlp = 3 * hidden * shape["moe_intermediate_size"] * experts // tp + hidden * experts
    else:
        mlp = 3 * hidden * shape["intermediate_size"] // tp
    norms = 2 * hidden + 2 * head
    return BF16_BYTES * (tables // tp + shape["num_hidden_layers"] * (attention + mlp + norms) + hidden)


def kv_bytes_per_token(shape: Mapping[str, Any], tp: int) -> int:
    """Bytes that one token takes in the KV cache of one of `tp` GPUs: a key and a value for each of its KV heads, in every layer."""
    return 2 * shape["num_hidden_layers"] * _kv_heads(shape, tp) * shape["head_dim"] * BF16_BYTES


def _kv_heads(shape: Mapping[str, Any], tp: int) -> int:
    """KV heads per GPU; vLLM copies a head where there are more GPUs than heads."""
    return max(1, shape["num_key_value_heads"] // tp)
