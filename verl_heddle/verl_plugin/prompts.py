"""What a batch of verl's prompts says of itself before its trajectories exist.

A `raw_prompt` is whatever the user's dataset makes of it: chat messages with text, images and videos in them, a string, token ids, None.
`facts_of` takes anything and never raises; its cost is bounded (`prompt_digest`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from verl_heddle.predict.text import MAX_CHARS
from verl_heddle.trajectory import TrajectoryId, TurnStart
from verl_heddle.verl_plugin.prompt_digest import bare, is_list, prompt_digest

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
