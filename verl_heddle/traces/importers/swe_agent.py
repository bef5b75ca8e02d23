"""Import SWE-agent `.traj`: `trajectory` (steps of response, action, observation, execution_time), `history`, `info.model_stats`.

One object per run; a run with several attempts holds them in `attempts`, and each is a trajectory. The prompt is the history before the
model's first message, demonstrations included, or else the first step's query. `tokens_received` is recorded only for the whole run and
is split over the steps by length. Source: SWE-agent's `agents.py`, versions 0.6 to 1.1.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from verl_heddle.traces.importers.conversation import Message, trajectory
from verl_heddle.traces.importers.counting import Tally
from verl_heddle.traces.importers.document import Document
from verl_heddle.traces.importers.fields import count, get, name, real, text
from verl_heddle.trajectory import Trajectory, Turn

NAME, TITLE = "swe_agent", "SWE-agent .traj"

_COMMAND = re.compile(r"[A-Za-z0-9_.][\w.+-]{0,63}", re.ASCII)
_EXIT = re.compile(r"Exit(ing)? due to ")
_LIMITS = ("exit_cost", "exit_context")


def knows(value: Any) -> bool:
    """Whether the first document has this format."""
    run = get(value, "attempts", 0) if get(value, "trajectory") is None else value
    steps, info = get(run, "trajectory"), get(run, "info")
    if not isinstance(run, dict) or not isinstance(steps, list):
        return False
    if not steps:
        return isinstance(run.get("history"), list) and isinstance(info, dict)
    first = steps[0]
    complete = all(isinstance(get(first, key), str) for key in ("action", "observation"))
    return complete and any(isinstance(get(first, key), str) for key in ("response", "thought"))


def read(documents: Iterable[Document], tally: Tally) -> Iterator[Trajectory]:
    """Yield a trajectory per run, or per attempt of a run."""
    for document in documents:
        attempts = get(document.value, "attempts")
        several = isinstance(attempts, list) and bool(attempts)
        for number, run in enumerate(attempts if several else [document.value]):
            item = _run(run, document, f"attempts[{number}]." if several else "", tally)
            if item is not None:
                yield item


def command_name(action: str) -> str | None:
    """The program a command calls: its first word without the folder; None if that may be more than a name, such as a secret."""
    words = action.split(maxsplit=1)
    found = _COMMAND.fullmatch(words[0].rsplit("/", 1)[-1]) if words else None
    return found.group() if found else None


def stem(file: str) -> str:
    """Instance id from the name of a single-instance file: the name without the suffixes that agents append."""
    base = Path(file).name
    for suffix in (".gz", ".jsonl", ".json", ".traj"):
        base = base.removesuffix(suffix)
    return base


def _run(run: Any, document: Document, where: str, tally: Tally) -> Trajectory | None:
    info = get(run, "info")
    steps = document.list_of(get(run, "trajectory"), "steps", f"{where}trajectory")
    messages = _opening(run)
    for number, step in enumerate(steps):
        if not isinstance(step, dict):
            document.fault(f"got {type(step).__name__}", field=f"{where}trajectory[{number}]", allowed="a step")
        messages += _step(step, tally)
    item = trajectory(
        messages,
        tally,
        source=NAME,
        workload="coding",
        prompt_id=name(get(document.value, "instance_id")) or name(get(info, "instance_id")) or stem(document.file),
        reward=real(get(run, "reward")),
        model=name(get(_config(run), "agent", "model", "name")),
        meta={"truncated": True} if any(limit in text(get(info, "exit_status")) for limit in _LIMITS) else {},
    )
    received = count(get(info, "model_stats", "tokens_received"))
    if item is None or not received or not item.output_tokens:
        return item
    tally.known["total output tokens"] += 1
    return replace(item, steps=_shared(item.steps, received))


def _opening(run: Any) -> list[Message]:
    """Messages before the model's first one. Assistant messages of a demonstration are not the model's."""
    history = get(run, "history")
    if not isinstance(history, list) or not history:
        history = get(run, "trajectory", 0, "query") or get(run, "trajectory", 0, "messages")
    opening = []
    for entry in history if isinstance(history, list) else []:
        if get(entry, "role") == "assistant" and not get(entry, "is_demo"):
            break
        opening.append(Message("system" if get(entry, "role") == "system" else "user", text(get(entry, "content"))))
    return opening


def _step(step: dict[str, Any], tally: Tally) -> list[Message]:
    action, response = text(step.get("action")).strip(), text(step.get("response")) or text(step.get("thought"))
    if action.startswith("exit_") or (not action and _EXIT.match(response)):
        tally.left_out["steps not from a model"] += 1  # SWE-agent's own message on why it ends
        return []
    if action not in response:  # the response does not contain function calls
        response = f"{response}\n{action}"
    seconds = real(step.get("execution_time")) or None  # an action that never ran has 0
    return [
        Message("assistant", response, calls=(command_name(action) or "bash",) if action else ()),
        Message("tool", text(step.get("observation")), tool_s=seconds),
    ]


def _config(run: Any) -> Any:
    config = get(run, "replay_config")
    if not isinstance(config, str):
        return config
    try:
        return json.loads(config)
    except (ValueError, RecursionError):
        return None


def _shared(turns: tuple[Turn, ...], total: int) -> tuple[Turn, ...]:
    """Scale the estimated output tokens of the turns to sum to `total`, and shift contexts accordingly."""
    whole = sum(turn.output_tokens or 0 for turn in turns)
    estimated = given = 0
    shared = []
    for turn in turns:
        context = None if turn.ctx_tokens is None else turn.ctx_tokens - estimated + given
        estimated += turn.output_tokens or 0
        share = total * estimated // whole - given
        given += share
        shared.append(replace(turn, output_tokens=share, ctx_tokens=context, output_est=True))
    return tuple(shared)
