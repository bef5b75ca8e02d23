"""Import tau2-bench results (one object with `info`, `tasks` and `simulations`) and tau-bench results (a list of tasks with `traj`).

A turn is a generation of the agent. The agent does not see the simulated user's own tool calls; their time counts as user time.
The greeting that opens a tau2 conversation is fixed text, not a generation. Source: `data_model/simulation.py` and
`data_model/message.py` of sierra-research/tau2-bench; `agents/` and the historical trajectories of sierra-research/tau-bench.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from verl_heddle.traces.importers import openai_chat
from verl_heddle.traces.importers.conversation import Message, trajectory
from verl_heddle.traces.importers.counting import Tally
from verl_heddle.traces.importers.document import Document
from verl_heddle.traces.importers.fields import count, get, items, name, real, text, unix_s
from verl_heddle.trajectory import Trajectory

NAME, TITLE = "tau2", "tau2-bench or tau-bench results"
ROLES = ("system", "user", "assistant", "tool")

_REACT_RESULT = "API output: "
"""Prefix of tool results for agents without tool calls; their other inputs are user messages."""


def knows(value: object) -> bool:
    """Whether the first document has this format."""
    if isinstance(value, list):
        return isinstance(get(value, 0, "traj"), list) and get(value, 0, "task_id") is not None
    return (
        isinstance(get(value, "simulations"), list)
        and isinstance(get(value, "info"), dict)
        and (get(value, "info", "environment_info") is not None or get(value, "simulations", 0, "task_id") is not None)
    )


def read(documents: Iterable[Document], tally: Tally) -> Iterator[Trajectory]:
    """Yield a trajectory per simulation."""
    for document in documents:
        for item in (_tau_bench if isinstance(document.value, list) else _simulations)(document, tally):
            if item is not None:
                yield item


def _simulations(document: Document, tally: Tally) -> Iterator[Trajectory | None]:
    about = get(document.value, "info")
    preamble = "\n".join(text(get(about, "environment_info", key)) for key in ("policy", "tool_defs"))
    for number, run in enumerate(document.list_of(get(document.value, "simulations"), "simulations", "simulations")):
        if isinstance(run, dict) and run.get("messages") is None:  # a voice run has audio ticks instead
            tally.left_out["without messages"] += 1
            continue
        field = f"simulations[{number}].messages"
        yield trajectory(
            _messages(document, document.list_of(get(run, "messages"), "messages", field), field),
            tally,
            source=NAME,
            workload=name(get(about, "environment_info", "domain_name")) or "tau2-bench",
            prompt_id=_task(run),
            trial=count(get(run, "trial")) or 0,
            reward=real(get(run, "reward_info", "reward")),
            model=name(get(about, "agent_info", "llm")),
            preamble=preamble,
        )


def _messages(document: Document, entries: list[Any], field: str) -> list[Message]:
    """The messages that the agent writes and reads."""
    messages: list[Message] = []
    for index, entry in enumerate(entries):
        role = get(entry, "role")
        if role not in ROLES:
            document.fault(f"got {role!r}", field=f"{field}[{index}].role", allowed=", ".join(ROLES))
        calls = items(get(entry, "tool_calls"))
        if (role == "tool" and get(entry, "requestor") == "user") or (role == "user" and calls):
            continue
        words = text([get(entry, "content"), *(get(call, "arguments") for call in calls)])
        if not messages and role == "assistant" and not calls and get(entry, "usage") is None:
            role = "system"  # the greeting
        message = Message(role, words, ended_s=unix_s(get(entry, "timestamp")))
        if role == "assistant":
            message = replace(
                message,
                tokens=count(get(entry, "usage", "completion_tokens")),
                context_tokens=count(get(entry, "usage", "prompt_tokens")),
                calls=tuple(name(get(call, "name")) or "tool" for call in calls),
                gen_s=real(get(entry, "generation_time_seconds")),
            )
        messages.append(message)
    return messages


def _tau_bench(document: Document, tally: Tally) -> Iterator[Trajectory | None]:
    """Trajectories of tau-bench, which uses OpenAI API messages."""
    for number, run in enumerate(document.value):
        field = f"[{number}].traj"
        entries = document.list_of(get(run, "traj"), "messages", field)
        messages = [openai_chat.message(entry, document, f"{field}[{index}]") for index, entry in enumerate(entries)]
        for index, message in enumerate(messages[1:], 1):
            before = messages[index - 1]
            if message.role == "user" and before.role == "assistant" and message.text.startswith(_REACT_RESULT):
                messages[index - 1] = replace(before, calls=(_action(before.text),))
                messages[index] = replace(message, role="tool")
        yield trajectory(
            messages,
            tally,
            source=NAME,
            workload="tau-bench",
            prompt_id=_task(run),
            trial=count(get(run, "trial")) or 0,
            reward=real(get(run, "reward")),
        )


def _action(words: str) -> str:
    """The tool that an agent without tool calls names at the end of its message."""
    try:
        return name(get(json.loads(words.rpartition("Action:")[2]), "name")) or "tool"
    except (ValueError, RecursionError):
        return "tool"


def _task(run: object) -> str | None:
    task = get(run, "task_id")
    return str(task) if type(task) is int else name(task)
