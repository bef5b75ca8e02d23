"""mini-swe-agent `.traj.json`: `messages`, `info` with exit_status, model_stats and config, `trajectory_format`.

The one tool is bash, so a turn's tool is the command that it runs. What stands as a user's after the first answer is a result, but for what
an interrupted session marks as a person's. `extra` has the usage and the time at which a message was there. Source: mini-swe-agent's
documentation of its output files and `default.py`, formats 1 and 1.1, with chat, tool calls and the responses API.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any, Literal

from verl_heddle.traces.importers.conversation import Message, trajectory
from verl_heddle.traces.importers.counting import Tally
from verl_heddle.traces.importers.document import Document
from verl_heddle.traces.importers.fields import count, get, items, name, real, text, unix_s
from verl_heddle.traces.importers.swe_agent import command_name, stem
from verl_heddle.trajectory import Trajectory

NAME, TITLE = "mini_swe_agent", "mini-swe-agent .traj.json"

_FORMAT = "mini-swe-agent"
_ROLES = ("system", "developer", "user", "assistant", "tool", "exit")
_BLOCK = re.compile(r"```(?:bash|mswea_bash_command|sh|shell)[ \t]*\r?\n(.*?)```", re.DOTALL)


def knows(value: Any) -> bool:
    """Whether the first document is of this format."""
    if not isinstance(value, dict):
        return False
    if (name(value.get("trajectory_format")) or "").startswith(_FORMAT):
        return True
    told = any(get(value, "info", key) is not None for key in ("exit_status", "model_stats"))
    return told and isinstance(value.get("messages"), list)


def read(documents: Iterable[Document], tally: Tally) -> Iterator[Trajectory]:
    """A trajectory for every run."""
    for document in documents:
        value, info = document.value, get(document.value, "info")
        item = trajectory(
            _messages(document),
            tally,
            source=NAME,
            workload="coding",
            prompt_id=name(get(value, "instance_id")) or name(get(info, "instance_id")) or stem(document.file),
            reward=real(get(value, "reward")),
            model=name(get(info, "config", "model", "model_name")),
            meta={"truncated": True} if get(info, "exit_status") == "LimitsExceeded" else {},
        )
        if item is not None:
            yield item


def _messages(document: Document) -> list[Message]:
    said = document.list_of(get(document.value, "messages"), "messages", "messages")
    messages: list[Message] = []
    answered = False
    for number, one in enumerate(said):
        role = _role(one, answered)
        if role is None:
            document.fault(f"got {get(one, 'role')!r}", field=f"messages[{number}].role", allowed=", ".join(_ROLES))
        if role == "exit":  # what was submitted, or why it ended: no model reads it
            continue
        ended = unix_s(get(one, "extra", "timestamp"))
        ended = unix_s(get(one, "timestamp")) if ended is None else ended
        if role != "assistant":
            content = get(one, "output") if get(one, "content") is None else get(one, "content")
            messages.append(Message(role, text(content), ended_s=ended))
            continue
        answered = True
        usage = get(one, "extra", "response", "usage") or get(one, "usage")
        messages.append(
            Message(
                role,
                _said(one),
                tokens=_told(usage, "completion_tokens", "output_tokens"),
                context_tokens=_told(usage, "prompt_tokens", "input_tokens"),
                ended_s=ended,
                calls=tuple(command_name(command) or "bash" for command in _commands(one)),
            )
        )
    return messages


def _role(one: Any, answered: bool) -> Literal["system", "user", "assistant", "tool", "exit"] | None:
    if get(one, "object") == "response":
        return "assistant"
    if get(one, "type") == "function_call_output":
        return "tool"
    role = get(one, "role")
    if role == "user" and answered:
        person = text(get(one, "extra", "interrupt_type")).startswith("User")
        return "user" if person else "tool"
    if role == "developer":
        return "system"
    return role if isinstance(role, str) and role in _ROLES else None  # type: ignore[return-value]


def _commands(one: Any) -> list[str]:
    """The commands of an assistant message; one that nobody knows where none can be found."""
    if actions := items(get(one, "extra", "actions")):
        return [text(get(action, "command")) for action in actions]
    if calls := items(get(one, "tool_calls")):
        return [_argument(get(call, "function", "arguments")) for call in calls]
    blocks = _BLOCK.findall(text(get(one, "content")))
    return blocks[-1:] or [""]


def _argument(arguments: Any) -> str:
    try:
        return text(get(json.loads(arguments), "command"))
    except (ValueError, TypeError):
        return ""


def _said(one: Any) -> str:
    parts = [get(one, key) for key in ("reasoning_content", "content")]
    parts += [get(call, "function", "arguments") for call in items(get(one, "tool_calls"))]
    parts += [get(part, key) for part in items(get(one, "output")) for key in ("summary", "content", "arguments")]
    return text(parts)


def _told(usage: Any, *keys: str) -> int | None:
    """0 is what providers write that do not count."""
    return next((number for key in keys if (number := count(get(usage, key)))), None)
