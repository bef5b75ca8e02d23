"""Reads facts about verl's prompts before their trajectories exist: a digest, the text, and the first turns of a batch.

A `raw_prompt` is whatever the user's dataset produces: chat messages with text, images and videos, a string, token ids, None.

Law: the digest depends only on a prompt's content, never on memory addresses or on how values print, so it is the same in every epoch,
process and run. Text, numbers, lists and mappings are walked. Images, arrays, tensors and buffers are hashed as bytes, with their shape and
type. An object of an unknown class is hashed by its attributes, an unreadable one by its class alone.
Invariant: `facts_of` accepts anything and never raises, because an odd prompt must not fail its group.
Cost: a large buffer is hashed by its length and evenly spaced blocks, so a prompt, even a video, costs at most `BUDGET` bytes of hashing
(about 16 ms).
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
"""Largest buffer, in bytes, that is hashed whole: enough for a compressed image. blake2b hashes a gigabyte per second."""

BUDGET = 16 * WHOLE
"""Bytes hashed per prompt; of each buffer after that, a single block is hashed."""

BLOCK = 2**14
"""Bytes per block of a sampled buffer."""

DIGEST_DEPTH = 12
"""Nesting limit: deeper values, including self-references, are hashed by their class."""

MOST_ITEMS = 200_000
"""Values walked per prompt: more than the tokens of any context. The rest is ignored."""


def prompt_digest(raw_prompt: Any) -> str:
    """16 hex digits, the same for the same content in any epoch, process or run. Never raises."""
    walk = _Walk()
    walk.add(raw_prompt, DIGEST_DEPTH)
    return walk.hash.hexdigest()


def bare(value: Any) -> Any:
    """The value inside tensordict's `NonTensorData`, or the value itself."""
    return value.data if type(value).__name__ == "NonTensorData" else value


def is_list(value: Any) -> bool:
    """Whether a value is a list, tuple or array of objects; text and buffers are not."""
    if isinstance(value, np.ndarray):
        return value.dtype == object
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray | memoryview)


class _Walk:
    """The hash of one prompt in progress, and what is left of its budget."""

    def __init__(self) -> None:
        self.hash = hashlib.blake2b(digest_size=8)
        self._left = BUDGET
        self._items = MOST_ITEMS

    def add(self, value: Any, depth: int) -> None:
        """Hash a value and everything in it; an unreadable value is hashed by its class."""
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
                return self._buffer("integers", array("q", items))  # token ids: 100 times faster than item by item
            except (TypeError, OverflowError):  # some items are not integers, or exceed 64 bits
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
        elif hasattr(value, "tobytes") and hasattr(value, "mode") and hasattr(value, "size"):  # a PIL image
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

        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)  # numpy lacks some of torch's dtypes
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
"""Rough estimate for prompts, used until the agent loop has applied its chat template."""

MAX_DEPTH = 8
"""Nesting limit of chat messages: list, message, content parts, and parts in parts."""

MOST_PARTS = 1000
"""Strings read per prompt; the first one usually reaches MAX_CHARS, and token ids have none."""

OWN_COUNT = "__rollout_n__"
"""verl's column for prompts with a sample count other than `rollout.n`."""


def validates(prompts: Any) -> bool:
    """Whether this batch (verl's TensorDict) is a validation."""
    return bool(prompts["validate"]) if "validate" in prompts else False


def weights_of(prompts: Any) -> int:
    """The training step that produced the weights which sample this batch."""
    step = int(prompts["global_steps"])
    return step if validates(prompts) else step - 1


def own_count(prompts: Any, row: int) -> int | None:
    """The prompt's own number of samples; None if it has none."""
    own = prompts[OWN_COUNT][row] if OWN_COUNT in prompts else None
    return None if own is None else int(own)


def facts_of_batch(prompts: Any) -> list[Facts]:
    """Facts of every row, in order."""
    if "raw_prompt" not in prompts:
        return [facts_of(None)] * len(prompts)
    return [facts_of(prompts["raw_prompt"][row]) for row in range(len(prompts))]


def first_turns(prompts: Any, samples: int, validation_samples: int, facts: Sequence[Facts] | None = None) -> list[TurnStart]:
    """The first turns that verl's workers will start for a batch (`AgentLoopWorkerTQ._run_prompt`); `context_tokens` is a guess.

    `facts`: the result of `facts_of_batch`, if already computed.
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
    """Facts about one prompt, shared by all its samples."""

    digest: str
    text: str | None
    """See `prompt_text`."""


def facts_of(raw_prompt: Any) -> Facts:
    """The facts about a prompt; never raises."""
    return Facts(prompt_digest(raw_prompt), prompt_text(raw_prompt))


def is_plain(raw_prompt: Any) -> bool:
    """Whether a prompt is only text, so that its facts take microseconds; compute those of other prompts in a thread."""
    if raw_prompt is None or isinstance(raw_prompt, str):
        return True
    return isinstance(raw_prompt, list) and all(
        isinstance(message, dict) and isinstance(message.get("content"), str) for message in raw_prompt
    )


def prompt_text(raw_prompt: Any) -> str | None:
    """The prompt's text, up to the length the predictor reads; None if there is none, as for token ids or images."""
    words: list[str] = []
    with suppress(Exception):  # on an unreadable user object, keep the text read before it
        _collect_words(bare(raw_prompt), words, MAX_DEPTH)
    return "\n".join(words)[:MAX_CHARS] or None


def _collect_words(value: Any, words: list[str], depth: int) -> None:
    """Collect the strings of messages: from lists, and from a mapping's `content` or `text`."""
    if isinstance(value, str):
        words.append(value[:MAX_CHARS])
    elif isinstance(value, Mapping) and depth:
        _collect_words(value.get("content", value.get("text")), words, depth - 1)
    elif is_list(value) and depth:
        for item in value:
            if len(words) >= MOST_PARTS or sum(map(len, words)) >= MAX_CHARS:
                return
            _collect_words(bare(item), words, depth - 1)
