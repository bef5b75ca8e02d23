"""Models made on the spot: real shapes with random weights, because nothing can be downloaded where they run.

Lengths are replayed (`ignore_eos`, fixed token counts), so weights do not matter for time. The engine experiments need a config only: vLLM
fills the weights itself (`load_format=dummy`). End to end, the trainer reads real files, and trajectories must end by themselves:
`write_policy` gives the model so many end-of-sequence ids that a uniform draw ends a trajectory with probability 1 / `mean_tokens` a token,
which makes lengths geometric (longest of 128 about five times the mean).

Source of the Qwen3 shapes: the models' public config.json, written by hand.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VOCABULARY = 151_936
MAX_CONTEXT = 40_960


@dataclass(frozen=True, slots=True)
class Shape:
    """What decides the time of a step. `heads` and `kv_heads` have `head_dim` each."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool
    vocabulary: int = VOCABULARY

    @property
    def parameters(self) -> int:
        """Weights of all layers and of the embeddings, norms left out."""
        attention = self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate) + self.vocabulary * self.hidden * (1 if self.tied else 2)

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of all layers in bf16."""
        return 2 * 2 * self.layers * self.kv_heads * self.head_dim


QWEN3 = {
    one.name: one
    for one in (
        Shape("Qwen3-0.6B", 28, 1024, 3072, 16, 8, 128, True),
        Shape("Qwen3-4B", 36, 2560, 9728, 32, 8, 128, True),
        Shape("Qwen3-8B", 36, 4096, 12288, 32, 8, 128, False),
    )
}
TINY = Shape("tiny", 12, 128, 384, 4, 4, 32, False, vocabulary=1280)
"""For rehearsals: deep and narrow as bench/fidelity's model, whose steps cost milliseconds of the engine's own work."""

TINY_POLICY = Shape("tiny-policy", 2, 64, 128, 2, 2, 32, False, vocabulary=1280)
"""For the rehearsal end to end, where a trainer and an engine share two cores."""


def config(shape: Shape, max_context: int = MAX_CONTEXT) -> dict[str, Any]:
    """config.json of a Qwen3 of this shape."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": max_context,
        "max_window_layers": shape.layers,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000,
        "rope_scaling": None,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "use_sliding_window": False,
        "sliding_window": None,
        "tie_word_embeddings": shape.tied,
        "torch_dtype": "bfloat16",
        "bos_token_id": None,
        "eos_token_id": shape.vocabulary - 1,
        "pad_token_id": shape.vocabulary - 2,
    }


def write_config(shape: Shape, folder: Path) -> Path:
    """A folder that vLLM can start from with `load_format=dummy` and `skip_tokenizer_init`; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config(shape), indent=1))
    return folder


def ending_ids(shape: Shape, mean_tokens: int) -> list[int]:
    """The last ids of the vocabulary, as many as make a uniform draw end after `mean_tokens` tokens on average, less the padding id.

    Raises:
        ValueError: the mean is outside 2 to the vocabulary's size.
    """
    if not 2 <= mean_tokens <= shape.vocabulary:
        raise ValueError(f"mean_tokens must lie in 2 to {shape.vocabulary}, got {mean_tokens}")
    number = max(1, round(shape.vocabulary / mean_tokens))
    return [one for one in range(shape.vocabulary - 1 - number, shape.vocabulary) if one != shape.vocabulary - 2]


def write_policy(shape: Shape, folder: Path, mean_tokens: int, device: str, seed: int = 0) -> Path:
    """Weights, tokenizer and generation config of a random policy, made on `device`; returns the folder. 0.6B: seconds on a GPU.

    The output layer is zero, so every id is equally likely. len(tokenizer) equals the vocabulary, as verl and vLLM mask differently else.
    """
    import torch
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    tokenizer = _tokenizer(shape.vocabulary)
    torch.manual_seed(seed)
    made = {**config(shape), "tie_word_embeddings": False}
    with torch.device(device):
        model = Qwen3ForCausalLM(Qwen3Config(**made)).to(torch.bfloat16)
    torch.nn.init.zeros_(model.lm_head.weight)
    model.generation_config = GenerationConfig(eos_token_id=ending_ids(shape, mean_tokens), pad_token_id=made["pad_token_id"])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def _tokenizer(vocabulary: int) -> Any:
    """Bytes, then words nobody writes; the chat format of the recipes' tiny models."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    from recipes.tiny.chat import CHAT_TEMPLATE

    special = ["<|im_start|>", "<|endoftext|>", "<|im_end|>"]
    words = [*sorted(ByteLevel.alphabet())]
    words += [f"w{number}" for number in range(vocabulary - len(special) - len(words))]
    tokenizer = Qwen2Tokenizer(
        vocab={word: index for index, word in enumerate([*words, *special])},
        merges=[],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=special[:1],
    )
    if len(tokenizer) != vocabulary:
        raise RuntimeError(f"the tokenizer has {len(tokenizer)} ids, the model {vocabulary}")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
