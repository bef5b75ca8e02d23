"""What a batch of verl's prompts says of itself before its trajectories exist."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from verl_heddle.predict.text import MAX_CHARS
from verl_heddle.trajectory import TrajectoryId, TurnStart

CHARS_PER_TOKEN = 4
"""Of prompts, roughly: what is planned with until the agent loop has applied its chat template."""

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


def first_turns(prompts: Any, samples: int, validation_samples: int) -> list[TurnStart]:
    """The first turns that verl's workers are about to start for a batch (`AgentLoopWorkerTQ._run_prompt`); `context_tokens` is a guess."""
    validate, step = validates(prompts), int(prompts["global_steps"])
    usual = validation_samples if validate else samples
    found = []
    for row in range(len(prompts)):
        raw_prompt, uid, own = prompts["raw_prompt"][row], str(prompts["uid"][row]), own_count(prompts, row)
        prompt, text = prompt_digest(raw_prompt), prompt_text(raw_prompt)
        for sample in range(usual if own is None else own):
            identity = TrajectoryId(prompt, uid, sample, step, validate)
            found.append(TurnStart(identity, identity.key, 0, len(text or "") // CHARS_PER_TOKEN, 0, text=text))
    return found


def prompt_text(raw_prompt: Any) -> str | None:
    """The words of a prompt's chat messages, as many as the predictor reads; None if there are none."""
    contents = [str(message.get("content", "")) for message in raw_prompt] if raw_prompt is not None else []
    return "\n".join(contents)[:MAX_CHARS] or None


def prompt_digest(raw_prompt: Any) -> str:
    """16 hex digits that are the same whenever the same chat messages come again, in any epoch or run."""
    messages = [dict(message) for message in raw_prompt] if raw_prompt is not None else []
    text = json.dumps(messages, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
