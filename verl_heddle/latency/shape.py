"""Model sizes from a Hugging Face config.json: parameters, and weight and KV bytes per GPU.

Supported: dense models and mixtures of experts (routed and shared), grouped and multi-head latent attention (DeepSeek), sliding windows,
tied embeddings, and `quantization_config` (fp8, mxfp4, nvfp4, int4/int8, compressed-tensors). For a multimodal config only `text_config`,
the language model, is read. Speculative-decoding layers (`num_nextn_predict_layers`) are not counted, because engines do not load them.
Biases are not counted (at most 0.03 %).

Unsupported architectures are rejected, not guessed: state-space and linear-attention layers, sparse (indexed) attention, layers of
different widths. Source: the config classes of transformers; `tests/unit/test_latency_shape.py` checks parameter counts against published
ones.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from verl_heddle.latency.gpus import GIB
from verl_heddle.latency.shipped import plain

KV_CONTEXT = 8192
"""Context length at which `kv_bytes_per_token` is computed for models with sliding windows: a window's KV is averaged over this many
tokens."""

BYTES = {"bf16": 2.0, "fp8": 1.0}
"""Bytes per value of the precisions that `in_precision` accepts."""

STEP_TOKENS = 8192
"""Tokens per engine step that activations are sized for: vLLM's `max_num_batched_tokens` as verl sets it."""

RESERVED_BYTES, COMMUNICATION_BYTES = int(3.5 * GIB), int(0.38 * GIB)
"""CUDA context and graphs; buffers of a tensor-parallel group. AIConfigurator 0.12.0's values, "for safer deployment"."""

ACTIVATIONS, EXPERT_ACTIVATIONS = 11, 44
"""bf16 hidden states of a full step that are live at once: AIConfigurator 0.12.0's numbers at tp=1 for dense models and for experts."""

REFUSED = {
    "index_topk": "sparse attention",
    "compress_ratios": "compressed attention",
    "linear_attn_config": "linear attention",
    "full_attention_interval": "linear attention",
    "hybrid_override_pattern": "state-space layers",
    "mamba_d_state": "state-space layers",
    "ssm_cfg": "state-space layers",
    "block_configs": "layers of different widths",
    "global_head_dim": "layers of different widths",
}
"""Config fields of unsupported architectures, whose cost would be computed wrongly, and what each indicates."""


@dataclass(frozen=True)
class Shape:
    """A model's sizes: widths in values, precisions in bytes per value. `config` is the source it was read from."""

    name: str
    hidden: int
    layers: int
    vocab: int
    tied: bool
    heads: int
    kv_heads: int
    head_dim: int
    dense_layers: int
    dense_width: int
    """MLP width in layers without experts."""
    experts: int = 0
    top_k: int = 0
    expert_width: int = 0
    shared_width: int = 0
    """Total width of a layer's shared experts."""
    latent: int = 0
    """Values cached per token and layer (latent and rotary) with multi-head latent attention; 0: keys and values per head."""
    rope_dim: int = 0
    query_rank: int = 0
    nope_dim: int = 0
    value_dim: int = 0
    window: int = 0
    window_layers: int = 0
    """Layers that attend only to the last `window` tokens."""
    attention_bytes: float = 2.0
    mlp_bytes: float = 2.0
    expert_bytes: float = 2.0
    kv_value_bytes: float = 2.0
    fp8_compute: bool = False
    """Matrix products run in fp8 on GPUs that have it."""
    weights: str = "bf16"
    """Name of the weights' precision."""
    block: int = 0
    """Width of a block that shares a quantisation scale; a GPU's slice of an MLP must be a multiple of it. 0: none."""
    config: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def kv(self) -> str:
        """Name of the KV cache's precision."""
        return "bf16" if self.kv_value_bytes == 2.0 else "fp8"

    @property
    def expert_layers(self) -> int:
        return self.layers - self.dense_layers

    def splits(self, tp: int) -> bool:
        """Whether vLLM can split the model over `tp` GPUs: heads and quantisation blocks must divide evenly."""
        if self.heads % tp or (self.kv_heads % tp and tp % self.kv_heads):
            return False
        return not self.block or all(width % (tp * self.block) == 0 for width in (self.expert_width, self.dense_width) if width)

    @property
    def parameters(self) -> int:
        """Total parameters, without biases and speculative-decoding layers."""
        return round(self._parameters(self.experts))

    @property
    def active_parameters(self) -> int:
        """Parameters used per token. Counts both embedding tables, or the single tied one."""
        return round(self._parameters(self.top_k))

    def _parameters(self, experts: float) -> float:
        split, copied = self.attention_values(1)
        tables = self.vocab * self.hidden * (1 if self.tied else 2)
        per_layer = split + copied + 2 * self.hidden
        moe = self.expert_layers * (3 * self.hidden * (experts * self.expert_width + self.shared_width) + self.hidden * self.experts)
        return tables + self.layers * per_layer + self.dense_layers * 3 * self.hidden * self.dense_width + moe + self.hidden

    def attention_values(self, tp: int) -> tuple[float, float]:
        """Attention weights of one layer on one of `tp` GPUs: (split, replicated or belonging to KV heads)."""
        if self.latent:
            rank = self.latent - self.rope_dim
            query = self.heads * (self.nope_dim + self.rope_dim)
            into = self.query_rank or self.hidden
            parts = into * query + rank * self.heads * (self.nope_dim + self.value_dim) + self.heads * self.value_dim * self.hidden
            copied = self.hidden * (self.query_rank + self.latent) + self.query_rank + rank
            return parts / tp, float(copied)
        split = 2 * self.hidden * self.heads * self.head_dim / tp
        return split, 2.0 * self.hidden * self.kv_heads_per_gpu(tp) * self.head_dim

    def kv_heads_per_gpu(self, tp: int) -> int:
        """KV heads on each GPU; vLLM replicates heads if there are more GPUs than heads."""
        return max(1, self.kv_heads // tp)

    def weight_bytes(self, tp: int) -> int:
        """Weight bytes on one of `tp` GPUs. Embeddings, attention and MLPs are split; norms, routers and shared KV heads are replicated."""
        tables = 2.0 * self.vocab * self.hidden * (1 if self.tied else 2) / tp
        attention = self.attention_bytes * sum(self.attention_values(tp))
        dense = self.mlp_bytes * 3 * self.hidden * self.dense_width / tp
        routed = self.expert_bytes * 3 * self.hidden * self.expert_width * self.experts / tp
        moe = routed + self.mlp_bytes * 3 * self.hidden * self.shared_width / tp + 2.0 * self.hidden * self.experts
        norms = 2.0 * 2 * self.hidden
        layers = self.layers * (attention + norms) + self.dense_layers * dense + self.expert_layers * moe
        return round(tables + layers + 2.0 * self.hidden)

    def kv_layer_bytes(self, tp: int) -> float:
        """KV bytes per token and layer on one of `tp` GPUs; a latent is replicated on all of them."""
        return self.kv_value_bytes * (self.latent or 2 * self.kv_heads_per_gpu(tp) * self.head_dim)

    def kv_bytes_per_token(self, tp: int) -> int:
        """KV bytes per token on one of `tp` GPUs; with sliding windows, the average over a sequence of `KV_CONTEXT` tokens."""
        kept = min(1.0, self.window / KV_CONTEXT)
        return round(self.kv_layer_bytes(tp) * (self.layers - self.window_layers * (1 - kept)))

    def overhead_bytes(self, tp: int) -> int:
        """GPU memory used for neither weights nor KV cache."""
        alive = EXPERT_ACTIVATIONS if self.experts else ACTIVATIONS
        return RESERVED_BYTES + (COMMUNICATION_BYTES if tp > 1 else 0) + alive * 2 * STEP_TOKENS * self.hidden

    def in_precision(self, weights: str | None = None, kv: str | None = None) -> Shape:
        """A copy with all matrices, or the KV cache, in "bf16" or "fp8"; None leaves them unchanged.

        Embeddings, output head, norms and routers stay bf16, as in the engines.
        """
        shape = self
        if weights is not None and weights != self.weights:
            size = BYTES[weights]
            shape = replace(
                shape,
                attention_bytes=size, mlp_bytes=size, expert_bytes=size, fp8_compute=weights == "fp8", weights=weights, block=0,
            )  # fmt: skip
        return shape if kv is None else replace(shape, kv_value_bytes=BYTES[kv])


@cache
def known() -> dict[str, Shape]:
    """Shapes of the models in `verl_heddle/data/models.json`, by name."""
    return {name: read_shape(entry["config"], name) for name, entry in _models().items()}


@cache
def _models() -> dict[str, Any]:
    entries: dict[str, Any] = json.loads(files("verl_heddle").joinpath("data/models.json").read_text())
    return entries


def shape_of(model: str) -> Shape:
    """The shape of a known model, a config.json, or a folder that contains one.

    An existing path takes precedence; otherwise its last part is looked up among the known names: "Qwen/Qwen3-8B", "qwen3-8b".

    Raises:
        ValueError: unknown model, or an unusable config; one line.
    """
    path = Path(model)
    file = path / "config.json" if path.is_dir() else path
    if file.is_file():
        try:
            config = json.loads(file.read_text())
        except ValueError as error:
            raise ValueError(f"{file} is not JSON: {error}") from None
        if not isinstance(config, dict):
            raise ValueError(f"{file} is not a model config: no JSON object")
        return read_shape(config, _name(file.absolute().parent), str(file))
    wanted = plain(re.split(r"[/\\]", model.rstrip("/\\"))[-1])
    for name, entry in _models().items():
        if wanted in {plain(alias) for alias in (name, *entry["aliases"])}:
            return known()[name]
    if path.is_dir() or model.endswith(".json"):
        raise ValueError(f"no config.json at {model}")
    raise ValueError(
        f"unknown model {model!r}. Known by name: {', '.join(_models())}; for any other, pass its config.json or a folder containing one"
    )


def _name(folder: Path) -> str:
    """The folder's name, or the model's name for a snapshot in the hub cache (models--owner--name/snapshots/revision)."""
    return folder.parent.parent.name.rsplit("--", 1)[-1] if folder.parent.name == "snapshots" else folder.name


def read_shape(config: Mapping[str, Any], name: str, where: str = "") -> Shape:
    """Parse a Hugging Face config.

    Raises:
        ValueError: a field is missing, or the model has unsupported parts; one line that names the field.
    """
    where = where or f"config of {name}"
    outer, text = config, config.get("text_config")
    if isinstance(text, Mapping):
        config = {**text, **{key: outer[key] for key in ("quantization_config",) if key in outer}}
    for key, why in REFUSED.items():
        if config.get(key) is not None:
            raise ValueError(f"{where}: {key} indicates {why}, which is not modelled")

    def number(*keys: str, default: int | None = None) -> int:
        for key in keys:
            value = config.get(key)
            if isinstance(value, int | float) and not isinstance(value, bool) and value >= 0 and value == int(value):
                return int(value)
            if value is not None:
                raise ValueError(f"{where}: {key} must be a whole number, got {value!r}")
        if default is None:
            raise ValueError(f"{where} lacks {' or '.join(keys)}")
        return default

    layers, hidden, heads = number("num_hidden_layers"), number("hidden_size"), number("num_attention_heads")
    if min(layers, hidden, heads) < 1:
        raise ValueError(f"{where}: num_hidden_layers, hidden_size and num_attention_heads must be positive")
    experts = number("num_experts", "n_routed_experts", "num_local_experts", default=0)
    moe = _expert_layers(config, layers) if experts else 0
    width = number("intermediate_size", default=0 if moe == layers else None)
    expert_width = number("moe_intermediate_size", default=width) if experts else 0
    shared = number("shared_expert_intermediate_size", default=number("n_shared_experts", "num_shared_experts", default=0) * expert_width)
    latent: dict[str, Any] = {}
    if config.get("kv_lora_rank"):
        rope = number("qk_rope_head_dim")
        latent = {"latent": number("kv_lora_rank") + rope, "rope_dim": rope, "query_rank": number("q_lora_rank", default=0)}
        latent |= {"nope_dim": number("qk_nope_head_dim"), "value_dim": number("v_head_dim")}
    shape = Shape(
        name=name,
        hidden=hidden,
        layers=layers,
        vocab=number("vocab_size"),
        tied=bool(config.get("tie_word_embeddings", outer.get("tie_word_embeddings", str(config.get("model_type")).startswith("gemma")))),
        heads=heads,
        kv_heads=heads if latent else max(1, number("num_key_value_heads", default=heads)),
        head_dim=number("head_dim", default=hidden // heads),
        dense_layers=layers - moe,
        dense_width=width if moe < layers else 0,
        experts=experts if moe else 0,
        top_k=number("num_experts_per_tok", "experts_per_token", "top_k_experts", "num_experts_per_token") if moe else 0,
        expert_width=expert_width,
        shared_width=shared if moe else 0,
        **latent,
        **_windows(config, layers, where),
        config=config,
    )
    return _quantised(shape, config.get("quantization_config"), where)


def _expert_layers(config: Mapping[str, Any], layers: int) -> int:
    """Number of layers with experts: every n-th one, except the first `first_k_dense_replace` and those in `mlp_only_layers`."""
    every = int(config.get("decoder_sparse_step") or config.get("interleave_moe_layer_step") or config.get("moe_layer_freq") or 1)
    first, named = int(config.get("first_k_dense_replace") or 0), set(config.get("mlp_only_layers") or ())
    return sum(index >= first and index not in named and (index + 1) % every == 0 for index in range(layers))


def _windows(config: Mapping[str, Any], layers: int, where: str) -> dict[str, Any]:
    """Window size and number of sliding layers, from `layer_types` or else the model family's pattern."""
    kinds = config.get("layer_types")
    window = config.get("sliding_window") or config.get("attention_chunk_size") or 0
    if kinds:
        unsupported = sorted(set(kinds) - {"full_attention", "sliding_attention", "chunked_attention"})
        if unsupported:
            raise ValueError(f"{where}: layer_types has {unsupported[0]}, which is not modelled")
        sliding = sum(kind != "full_attention" for kind in kinds[:layers])
        if sliding and not window:
            raise ValueError(f"{where} lacks sliding_window, but layer_types has sliding_attention")
        return {"window": int(window), "window_layers": sliding} if sliding else {}
    family = str(config.get("model_type"))
    enabled = config.get("use_sliding_window", not family.startswith("qwen"))  # off by default for Qwen, whose configs still set a window
    if not window or not enabled:
        return {}
    if family.startswith("qwen"):
        return {"window": int(window), "window_layers": max(0, layers - int(config.get("max_window_layers") or 0))}
    pattern = int(config.get("sliding_window_pattern") or {"gemma2": 2, "gemma3_text": 6, "cohere2": 4}.get(family, 0))
    return {"window": int(window), "window_layers": layers - (layers // pattern if pattern else 0)}


def _quantised(shape: Shape, quantised: Any, where: str) -> Shape:
    """Apply the precisions of a `quantization_config`."""
    if not isinstance(quantised, Mapping):
        return shape
    method = str(quantised.get("quant_method") or quantised.get("quant_algo") or "").lower()
    groups = quantised.get("config_groups") or {}
    first: Any = next(iter(groups.values()), {}) if isinstance(groups, Mapping) else {}
    stored = (first.get("weights") or {}) if isinstance(first, Mapping) else {}
    algorithm = str(quantised.get("quant_algo") or "").lower()
    fp8 = "fp8" in method or "fp8" in algorithm
    bits = 8 if fp8 else 4 if "fp4" in method + algorithm else stored.get("num_bits") or quantised.get("bits") or quantised.get("w_bit")
    if bits is None and method == "bitsandbytes":
        bits = 4 if quantised.get("load_in_4bit") else 8
    if not isinstance(bits, int | float) or not 1 <= bits <= 16:
        raise ValueError(f"{where}: quantization_config does not give the bits per weight (quant_method {method or 'missing'})")
    fp8 = fp8 or (stored.get("type") == "float" and bits == 8)
    name = "fp8" if fp8 else "mxfp4" if method == "mxfp4" else "nvfp4" if "fp4" in method + algorithm else f"int{int(bits)}"
    # Scales: 8 bits per 32 values (mxfp4) or 16 values (nvfp4), 16 bits per 128 values (integers), negligible for fp8.
    size = bits / 8 + {"mxfp4": 1 / 32, "nvfp4": 1 / 16, "int4": 1 / 64}.get(name, 0.0)
    kept = " ".join(map(str, quantised.get("modules_to_not_convert") or quantised.get("ignore") or quantised.get("ignored_layers") or ()))
    block = quantised.get("weight_block_size")
    cache = str(quantised.get("kv_cache_quant_algo") or "").lower() == "fp8" or quantised.get("kv_cache_scheme") is not None
    whole = re.search(r"self_attn(?!\.)|attn\.\*|\*attn", kept) or kept.count("self_attn") >= shape.layers
    attention = 2.0 if whole or method == "mxfp4" else size
    return replace(
        shape,
        attention_bytes=attention,
        mlp_bytes=2.0 if method == "mxfp4" else size,
        expert_bytes=size,
        kv_value_bytes=1.0 if cache else 2.0,
        fp8_compute=bool(fp8),
        weights=name,
        block=int(max(block)) if isinstance(block, list | tuple) and block else 0,
    )
