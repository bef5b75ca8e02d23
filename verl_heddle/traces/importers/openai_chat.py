"""Import OpenAI-style chats: each line or list element has `messages` with `tool_calls`, and optionally `usage` and `timestamp`.

Also accepts fine-tuning files and responses logged as `{"request": {"messages"}, "response": {"choices"}}`. A conversation ends with
its last message. Source: the OpenAI API reference, chat completions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from verl_heddle.traces.importers.conversation import Message, trajectory
from verl_heddle.traces.importers.counting import Tally
from verl_heddle.traces.importers.document import Document
from verl_heddle.traces.importers.fields import count, get, items, name, real, text, unix_s
from verl_heddle.trajectory import Trajectory

NAME, TITLE = "openai", "OpenAI-style chat with tool calls"
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool", "function": "tool"}


def knows(value: Any) -> bool:
    """Whether the first document has this format."""
    first = value[0] if isinstance(value, list) and value else value
    messages = get(first, "messages") if get(first, "messages") is not None else get(first, "request", "messages")
    return isinstance(messages, list) and bool(messages) and get(messages, 0, "role") in ROLES


def read(documents: Iterable[Document], tally: Tally) -> Iterator[Trajectory]:
    """Yield a trajectory per conversation."""
    for document in documents:
        rows = document.value if isinstance(document.value, list) else [document.value]
        for number, row in enumerate(rows):
            where = f"[{number}]" if isinstance(document.value, list) else ""
            entries = get(row, "messages") if get(row, "messages") is not None else get(row, "request", "messages")
            entries = document.list_of(entries, "messages", f"{where}messages")
            answer = get(row, "response", "choices", 0, "message")
            messages = [
                message(entry, document, f"{where}messages[{index}]")
                for index, entry in enumerate([*entries, *([answer] if answer else [])])
            ]
            usage = get(row, "usage") or get(row, "response", "usage")
            if usage and sum(entry.role == "assistant" for entry in messages) == 1:  # for several calls it would be a sum
                last = next(index for index, entry in enumerate(messages) if entry.role == "assistant")
                messages[last] = _with_usage(messages[last], usage)
            item = trajectory(
                messages,
                tally,
                source=NAME,
                workload=name(get(row, "task")) or name(get(row, "dataset")) or "chat",
                prompt_id=name(get(row, "prompt_id")) or name(get(row, "task_id")) or name(get(row, "instance_id")),
                reward=real(get(row, "reward")),
                model=name(get(row, "model")) or name(get(row, "response", "model")),
                preamble=text(get(row, "tools")) or text(get(row, "request", "tools")),
            )
            if item is not None:
                yield item


def message(value: Any, document: Document, field: str) -> Message:
    """Convert one API message.

    Raises:
        TraceError: its role is missing or unknown.
    """
    role = ROLES.get(get(value, "role")) if isinstance(get(value, "role"), str) else None
    if role is None:
        document.fault(f"got {get(value, 'role')!r}", field=f"{field}.role", allowed=", ".join(ROLES))
    calls = get(value, "tool_calls") or ([value["function_call"]] if get(value, "function_call") else [])
    functions = [get(call, "function") or call for call in items(calls)]
    parts = [get(value, key) for key in ("reasoning_content", "reasoning", "content")] + [get(call, "arguments") for call in functions]
    converted = Message(
        role,  # type: ignore[arg-type]
        text(parts),
        started_s=unix_s(get(value, "started_at")),
        ended_s=unix_s(get(value, "timestamp")) or unix_s(get(value, "created_at")),
        calls=tuple(name(get(call, "name")) or "tool" for call in functions),
        tool_s=real(get(value, "duration_s")) if role == "tool" else None,
    )
    usage = get(value, "usage")
    return _with_usage(converted, usage) if role == "assistant" and usage else converted


def _with_usage(message: Message, usage: Any) -> Message:
    tokens = count(get(usage, "completion_tokens"))
    context = count(get(usage, "prompt_tokens"))
    return replace(
        message,
        tokens=count(get(usage, "output_tokens")) if tokens is None else tokens,
        context_tokens=count(get(usage, "input_tokens")) if context is None else context,
    )
