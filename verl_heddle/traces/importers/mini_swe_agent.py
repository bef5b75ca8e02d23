"""Import mini-swe-agent `.traj.json`: `messages`, `info` with exit_status, model_stats and config, `trajectory_format`.

The only tool is bash, so a turn's tool is the command it runs. A user message after the first answer is a tool result, unless an
interrupted session marks it as a person's. `extra` holds the usage and the time at which a message arrived. Source: mini-swe-agent's
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
    """Whether the first document has this format."""
    if not isinstance(value, dict):
        return False
    if (name(value.get("trajectory_format")) or "").startswith(_FORMAT):
        return True
    ran = any(get(value, "info", key) is not None for key in ("exit_status", "model_stats"))
    return ran and isinstance(value.get("messages"), list)


def read(documents: Iterable[Document], tally: Tally) -> Iterator[Trajectory]:
    """Yield a trajectory per run."""
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
    entries = document.list_of(get(document.value, "messages"), "messages", "messages")
    messages: list[Message] = []
    answered = False
    for number, entry in enumerate(entries):
        role = _role(entry, answered)
        if role is None:
            document.fault(f"got {get(entry, 'role')!r}", field=f"messages[{number}].role", allowed=", ".join(_ROLES))
        if role == "exit":  # the submission, or why the run ended: no model reads it
            continue
        ended = unix_s(get(entry, "extra", "timestamp"))
        ended = unix_s(get(entry, "timestamp")) if ended is None else ended
        if role != "assistant":
            content = get(entry, "output") if get(entry, "content") is None else get(entry, "content")
            messages.append(Message(role, text(content), ended_s=ended))
            continue
        answered = True
        usage = get(entry, "extra", "response", "usage") or get(entry, "usage")
        messages.append(
            Message(
                role,
                _answer_text(entry),
                tokens=_usage_count(usage, "completion_tokens", "output_tokens"),
                context_tokens=_usage_count(usage, "prompt_tokens", "input_tokens"),
                ended_s=ended,
                calls=tuple(command_name(command) or "bash" for command in _commands(entry)),
            )
        )
    return messages


def _role(entry: Any, answered: bool) -> Literal["system", "user", "assistant", "tool", "exit"] | None:
    if get(entry, "object") == "response":
        return "assistant"
    if get(entry, "type") == "function_call_output":
        return "tool"
    role = get(entry, "role")
    if role == "user" and answered:
        person = text(get(entry, "extra", "interrupt_type")).startswith("User")
        return "user" if person else "tool"
    if role == "developer":
        return "system"
    return role if isinstance(role, str) and role in _ROLES else None  # type: ignore[return-value]


def _commands(entry: Any) -> list[str]:
    """Commands of an assistant message; one empty command if none can be found."""
    if actions := items(get(entry, "extra", "actions")):
        return [text(get(action, "command")) for action in actions]
    if calls := items(get(entry, "tool_calls")):
        return [_argument(get(call, "function", "arguments")) for call in calls]
    blocks = _BLOCK.findall(text(get(entry, "content")))
    return blocks[-1:] or [""]


def _argument(arguments: Any) -> str:
    try:
        return text(get(json.loads(arguments), "command"))
    except (ValueError, TypeError):
        return ""


def _answer_text(entry: Any) -> str:
    parts = [get(entry, key) for key in ("reasoning_content", "content")]
    parts += [get(call, "function", "arguments") for call in items(get(entry, "tool_calls"))]
    parts += [get(part, key) for part in items(get(entry, "output")) for key in ("summary", "content", "arguments")]
    return text(parts)


def _usage_count(usage: Any, *keys: str) -> int | None:
    """The first positive count; providers that do not count write 0."""
    return next((number for key in keys if (number := count(get(usage, key)))), None)
