"""What a batch of verl's prompts says of itself before its trajectories exist.

A `raw_prompt` is whatever the user's dataset makes of it: chat messages with text, images and videos in them, a string, token ids, None.
`facts_of` takes anything and never raises; its cost is bounded (`prompt_digest`).

A prompt's name: a digest of its content, the same in every epoch, process and run.

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
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np

from verl_heddle.predict.prompts import MAX_CHARS
from verl_heddle.trajectory import TrajectoryId, TurnStart

WHOLE = 2**20
"""Bytes of one buffer that are hashed whole: a compressed image; blake2b reads a gigabyte a second."""

BUDGET = 16 * WHOLE
"""Bytes of one prompt that are hashed; what comes later is read in single blocks."""

BLOCK = 2**14
"""Bytes of a block where a buffer is sampled."""

DIGEST_DEPTH = 12
"""Deeper values, and those that contain themselves, count by their class."""

MOST_ITEMS = 200_000
"""Values of a prompt that are walked: more than the tokens of any context. What follows is left out."""


def prompt_digest(raw_prompt: Any) -> str:
    """16 hex digits that are the same whenever the same content comes again, in any epoch or run. Never raises."""
    walk = _Walk()
    walk.add(raw_prompt, DIGEST_DEPTH)
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


CHARS_PER_TOKEN = 4
"""Of prompts, roughly: what is planned with until the agent loop has applied its chat template."""

MAX_DEPTH = 8
"""Nesting of chat messages: list, message, content parts, and parts in parts."""

MOST_PARTS = 1000
"""Strings read of a prompt; token ids have none, and MAX_CHARS are mostly reached by the first."""

OWN_COUNT = "__rollout_n__"
"""verl's column for prompts that are not sampled `rollout.n` times."""


def validates(prompts: Any) -> bool:
    """Whether this batch (verl's TensorDict) is a validation."""
    return bool(prompts["validate"]) if "validate" in prompts else False


def weights_of(prompts: Any) -> int:
    """After which training step the weights were made that a batch is sampled with."""
    step = int(prompts["global_steps"])
    return step if validates(prompts) else step - 1


def own_count(prompts: Any, row: int) -> int | None:
    """How often a prompt is to be sampled where it says so itself."""
    own = prompts[OWN_COUNT][row] if OWN_COUNT in prompts else None
    return None if own is None else int(own)


def facts_of_batch(prompts: Any) -> list[Facts]:
    """Of every row, in order."""
    if "raw_prompt" not in prompts:
        return [facts_of(None)] * len(prompts)
    return [facts_of(prompts["raw_prompt"][row]) for row in range(len(prompts))]


def first_turns(prompts: Any, samples: int, validation_samples: int, facts: Sequence[Facts] | None = None) -> list[TurnStart]:
    """The first turns that verl's workers are about to start for a batch (`AgentLoopWorkerTQ._run_prompt`); `context_tokens` is a guess.

    `facts`: `facts_of_batch`, where they are known already.
    """
    validate, step = validates(prompts), int(prompts["global_steps"])
    usual = validation_samples if validate else samples
    found = []
    for row, (prompt, text) in enumerate(facts_of_batch(prompts) if facts is None else facts):
        uid, own = str(prompts["uid"][row]), own_count(prompts, row)
        for sample in range(usual if own is None else own):
            identity = TrajectoryId(prompt, uid, sample, step, validate)
            found.append(TurnStart(identity, identity.key, 0, len(text or "") // CHARS_PER_TOKEN, 0, text=text))
    return found


class Facts(NamedTuple):
    """Of one prompt, for all its samples."""

    digest: str
    text: str | None
    """See `prompt_text`."""


def facts_of(raw_prompt: Any) -> Facts:
    """What is known of a prompt; never raises."""
    return Facts(prompt_digest(raw_prompt), prompt_text(raw_prompt))


def is_plain(raw_prompt: Any) -> bool:
    """Whether a prompt is text alone, so that its facts take microseconds; others are for a thread."""
    if raw_prompt is None or isinstance(raw_prompt, str):
        return True
    return isinstance(raw_prompt, list) and all(isinstance(one, dict) and isinstance(one.get("content"), str) for one in raw_prompt)


def prompt_text(raw_prompt: Any) -> str | None:
    """The words of a prompt, as many as the predictor reads; None if there are none, as in token ids or images."""
    words: list[str] = []
    with suppress(Exception):  # an object of the user's that cannot be read: what was read before it does
        _collect_words(bare(raw_prompt), words, MAX_DEPTH)
    return "\n".join(words)[:MAX_CHARS] or None


def _collect_words(value: Any, words: list[str], depth: int) -> None:
    """The strings of messages: of a list, of a mapping's `content` or `text`."""
    if isinstance(value, str):
        words.append(value[:MAX_CHARS])
    elif isinstance(value, Mapping) and depth:
        _collect_words(value.get("content", value.get("text")), words, depth - 1)
    elif is_list(value) and depth:
        for item in value:
            if len(words) >= MOST_PARTS or sum(map(len, words)) >= MAX_CHARS:
                return
            _collect_words(bare(item), words, depth - 1)
