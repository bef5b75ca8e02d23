"""A Qwen2 with random weights and a tokenizer: what it says does not matter, how long a step takes does.

Shape: deep and narrow. A step then costs milliseconds of the engine's own work (many small kernels), more for a larger batch and a
longer context, while the weights (about 9 MB in float32) stay in cache, so that two engines on two cores do not compete for memory
bandwidth. A toy of two layers would measure the Python around the engine instead.
"""

from __future__ import annotations

import json
from pathlib import Path

LAYERS, HIDDEN, HEADS, INTERMEDIATE = 12, 128, 4, 384
FIRST_WORD = 256
"""Ids below are the byte alphabet and special tokens, from here on whole words: prompts are made of words only."""
VOCABULARY = 1280
MAX_CONTEXT = 4096
STAMP = "fidelity.json"


def make_model(folder: Path) -> Path:
    """Write model and tokenizer into `folder` unless they are there; returns it. About 3 s."""
    shape = {"layers": LAYERS, "hidden": HIDDEN, "heads": HEADS, "intermediate": INTERMEDIATE, "vocabulary": VOCABULARY}
    stamp = folder / STAMP
    if stamp.exists() and json.loads(stamp.read_text()) == shape:
        return folder
    import torch
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

    tokenizer = Qwen2Tokenizer(
        vocab={letter: index for index, letter in enumerate(sorted(ByteLevel.alphabet()))},
        merges=[],
        eos_token="<|end|>",
        pad_token="<|pad|>",
    )
    tokenizer.add_tokens([f" w{number}" for number in range(VOCABULARY - len(tokenizer))])
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=HIDDEN,
            intermediate_size=INTERMEDIATE,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS,
            max_position_embeddings=MAX_CONTEXT,
            tie_word_embeddings=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
        )
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    stamp.write_text(json.dumps(shape))
    return folder
