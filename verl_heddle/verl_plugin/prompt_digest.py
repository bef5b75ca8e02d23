"""A prompt's name: a digest of its content, the same in every epoch, process and run.

Law: values are told apart by what they hold, never by where they lie in memory or how they print. Text, numbers, lists and mappings are
walked; images, arrays, tensors and buffers are read as bytes, with their shape and type; an object of an unknown class counts by its
attributes, one that cannot be read by its class alone. Of a large buffer, evenly spaced blocks and its length stand for the whole, so that
a prompt costs `BUDGET` bytes of hashing at most (about 16 ms), a video as well.

Never raises: a prompt that is odd must not fail its group.
"""

from __future__ import annotations

import hashlib
import math
import os
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

WHOLE = 2**20
"""Bytes of one buffer that are hashed whole: a compressed image; blake2b reads a gigabyte a second."""

BUDGET = 16 * WHOLE
"""Bytes of one prompt that are hashed; what comes later is read in single blocks."""

BLOCK = 2**14
"""Bytes of a block where a buffer is sampled."""

MAX_DEPTH = 12
"""Deeper values, and those that contain themselves, count by their class."""

MOST_ITEMS = 200_000
"""Values of a prompt that are walked: more than the tokens of any context. What follows is left out."""


def prompt_digest(raw_prompt: Any) -> str:
    """16 hex digits that are the same whenever the same content comes again, in any epoch or run. Never raises."""
    walk = _Walk()
    walk.add(raw_prompt, MAX_DEPTH)
    return walk.hash.hexdigest()


def bare(value: Any) -> Any:
    """The value inside tensordict's `NonTensorData`, or the value itself."""
    return value.data if type(value).__name__ == "NonTensorData" else value


def is_list(value: Any) -> bool:
    """Whether a value's items come in order: lists, tuples, arrays of objects; not text, not buffers."""
    if isinstance(value, np.ndarray):
        return value.dtype == object
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray | memoryview)


class _Walk:
    """One prompt."""

    def __init__(self) -> None:
        self.hash = hashlib.blake2b(digest_size=8)
        self._left = BUDGET
        self._items = MOST_ITEMS

    def add(self, value: Any, depth: int) -> None:
        """A value and all that is in it; one that cannot be read counts by its class."""
        if not self._items:
            return
        self._items -= 1
        try:
            self._add(bare(value), depth)
        except Exception:
            self._mark("unreadable", type(value).__qualname__)

    def _add(self, value: Any, depth: int) -> None:
        if value is None or isinstance(value, bool | int | float | complex | np.generic):
            self._mark("value", repr(value.item() if isinstance(value, np.generic) else value))
        elif isinstance(value, str):
            self._buffer("text", value.encode(errors="surrogatepass"))
        elif isinstance(value, bytes | bytearray | memoryview):
            self._buffer("bytes", value)
        elif depth == 0:
            self._mark("deep", type(value).__qualname__)
        elif isinstance(value, Mapping):
            self._mark("mapping", str(len(value)))
            for key, item in sorted(value.items(), key=lambda pair: str(pair[0])):
                self._mark("key", str(key))
                self.add(item, depth - 1)
        elif is_list(value):
            self._list(value, depth)
        else:
            self._object(value, depth)

    def _list(self, items: Any, depth: int) -> None:
        self._mark("list", str(len(items)))
        if len(items) and type(items[0]) is int:
            try:
                return self._buffer("integers", array("q", items))  # token ids: a hundred times faster than one by one
            except (TypeError, OverflowError):  # not all of them, or large ones
                pass
        for item in items:
            self.add(item, depth - 1)

    def _object(self, value: Any, depth: int) -> None:
        if isinstance(value, os.PathLike):
            self._mark("path", str(os.fspath(value)))
        elif isinstance(value, np.ndarray):
            self._array(value)
        elif hasattr(value, "detach") and hasattr(value, "element_size"):  # a tensor
            self._tensor(value)
        elif hasattr(value, "tobytes") and hasattr(value, "mode") and hasattr(value, "size"):  # an image of PIL's
            self._buffer(f"image {value.mode} {value.size}", value.tobytes())
        elif hasattr(value, "getbuffer"):  # io.BytesIO
            self._buffer("bytes", value.getbuffer())
        else:
            self._mark("object", type(value).__qualname__)
            names = getattr(type(value), "__slots__", ())
            fields = getattr(value, "__dict__", None) or {name: getattr(value, name, None) for name in names if isinstance(name, str)}
            self.add({name: item for name, item in fields.items() if not callable(item)}, depth - 1)

    def _array(self, values: np.ndarray) -> None:
        self._buffer(f"array {values.dtype} {values.shape}", np.ascontiguousarray(values).reshape(-1).view(np.uint8))

    def _tensor(self, tensor: Any) -> None:
        import torch

        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)  # not every dtype of torch has one of numpy
        self._buffer(f"tensor {tensor.dtype} {tuple(tensor.shape)}", flat.numpy())

    def _mark(self, kind: str, text: str) -> None:
        content = text.encode(errors="surrogatepass")
        self.hash.update(f"{kind} {len(content)}:".encode())
        self.hash.update(content)

    def _buffer(self, kind: str, content: Any) -> None:
        data = memoryview(content).cast("B")
        self._mark(kind, str(len(data)))
        if len(data) <= min(WHOLE, max(self._left, BLOCK)):
            self._left -= len(data)
            self.hash.update(data)
            return
        blocks = max(1, min(WHOLE, self._left) // BLOCK)
        stride = (len(data) - BLOCK) / max(1, blocks - 1)
        for number in range(blocks):
            start = math.floor(number * stride)
            self.hash.update(data[start : start + BLOCK])
        self._left = max(0, self._left - blocks * BLOCK)
