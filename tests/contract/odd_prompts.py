"""Prompts of every kind that a dataset may hold, without verl."""

from __future__ import annotations

import numpy as np
import torch


class Unreadable:
    @property
    def __dict__(self):
        raise OSError("no")

    def __len__(self):
        raise OSError("no")

    def __repr__(self):
        raise OSError("no")


def photo(seed):
    from PIL import Image

    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (24, 24, 3), dtype=np.uint8))


def message(*content):
    return [{"role": "user", "content": list(content)}]


circle: list = []
circle.append(circle)

ODD = {
    "a string": "What is 2 + 2?",
    "token ids": [5, 6, 7],
    "an array of ids": np.array([5, 6, 7]),
    "a tensor of ids": torch.tensor([5, 6, 7]),
    "messages in an array": np.array([{"role": "user", "content": "hi"}], dtype=object),
    "strings": ["one", "two"],
    "nothing": None,
    "no messages": [],
    "content that is none": [{"role": "user", "content": None}],
    "parts in parts": message({"type": "text", "text": "look"}, {"content": [{"text": "there"}]}),
    "an image": message({"type": "image", "image": photo(1)}, {"type": "text", "text": "what is it?"}),
    "bytes": message({"type": "image", "image": b"\x00\xff" * 50}),
    "a bfloat16 tensor": message({"type": "image", "image": torch.ones(2, 3, dtype=torch.bfloat16)}),
    "a number": 7,
    "lone surrogates": "\ud800",
    "an unreadable object": [Unreadable()],
    "itself": circle,
}
