"""Import verl dumps: `<step>.jsonl` in `trainer.rollout_data_dir` or `validation_data_dir` (`input`, `output`, `gts`, `score`, `step`).

The output is one text, tool results included, without special tokens. With Qwen and Hermes templates the role names remain as lines
`user` and `assistant`, where the text is cut into turns. Other templates give one turn. Dumps hold no times and no token counts.
Source: `_write_generations` of verl 0.9, `trainer/ppo/v1/trainer_base.py` and `trainer/ppo/ray_trainer.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator

from verl_heddle.traces.importers.conversation import Message, trajectory
from verl_heddle.traces.importers.counting import Tally
from verl_heddle.traces.importers.document import Document
from verl_heddle.traces.importers.fields import count, get, name, real
from verl_heddle.trajectory import Trajectory

NAME, TITLE = "verl_dump", "verl rollout or validation dump"

_START = re.compile(r"<\|im_start\|>(\w+)\n?")
_GLUED = re.compile(r"(?<!\n)(user|tool)(?=\n\s*<tool_response>)")
"""verl appends the result's tokens to those of the call without a line break."""
_FUNCTION = re.compile(r"<function=([^>\s]+)>")
_INPUT_ROLES = ("user", "tool")


def knows(value: object) -> bool:
    """Whether the first document has this format."""
    keys = {"input", "output", "score", "step"}
    return isinstance(value, dict) and keys <= value.keys() and isinstance(value["input"], str) and isinstance(value["output"], str)


def read(documents: Iterable[Document], tally: Tally) -> Iterator[Trajectory]:
    """Yield a trajectory per line."""
    for document in documents:
        row = document.value
        for key in ("input", "output"):
            if not isinstance(get(row, key), str):
                document.fault(f"got {type(get(row, key)).__name__}", field=key, allowed="text")
        messages = _messages(row["output"])
        if not any(message.role == "assistant" for message in messages):
            tally.left_out["without output"] += 1
            continue
        step = count(get(row, "step"))
        item = trajectory(
            [Message("user", row["input"]), *messages],
            tally,
            source=NAME,
            workload=name(get(row, "data_source")) or "verl",
            reward=real(get(row, "score")),
            meta={} if step is None else {"step": step},
        )
        if item is not None:
            yield item


def _messages(output: str) -> list[Message]:
    parts = [part for part in (_marked(output) if "<|im_start|>" in output else _bare(output)) if part[1].strip()]
    messages: list[Message] = []
    for index, (role, text) in enumerate(parts):
        if role != "assistant":
            messages.append(Message("tool" if _is_result(role, text) else "user", text))
            continue
        answered = index + 1 < len(parts) and _is_result(*parts[index + 1])
        messages.append(Message("assistant", text, calls=_calls(text) or (("tool",) if answered else ())))
    return messages


def _is_result(role: str, text: str) -> bool:
    return role == "tool" or "<tool_response>" in text


def _marked(output: str) -> list[tuple[str, str]]:
    """Roles and texts of an output that still has its special tokens."""
    first, *rest = _START.split(output)
    parts = [("assistant", first), *zip(rest[::2], rest[1::2], strict=True)]
    return [(role, text.replace("<|im_end|>", "").replace("<|endoftext|>", "")) for role, text in parts]


def _bare(output: str) -> list[tuple[str, str]]:
    """Roles and texts of an output in which only the role names remain.

    A line `user` without a later line `assistant` is the model's own text, unless a tool result follows it: then the output ended there
    because it reached its limit.
    """
    parts: list[tuple[str, str]] = []
    answer: list[str] = []
    reply: list[str] = []
    results = open_results = 0
    for line in _GLUED.sub(r"\n\1", output).split("\n"):
        if reply and line == "assistant" and not open_results:
            parts += [("assistant", "\n".join(answer)), (reply[0], "\n".join(reply))]
            answer, reply, results = [], [], 0
        elif line in _INPUT_ROLES and not results:
            answer += reply
            reply = [line]
        elif reply:
            reply.append(line)
            results += line.count("<tool_response>")
            open_results = max(0, open_results + line.count("<tool_response>") - line.count("</tool_response>"))
        else:
            answer.append(line)
    if not results:
        return [*parts, ("assistant", "\n".join(answer + reply))]
    return [*parts, ("assistant", "\n".join(answer)), (reply[0], "\n".join(reply))]


def _calls(text: str) -> tuple[str, ...]:
    """Names of the called tools, in JSON (Hermes) or XML (Qwen3-Coder); verl does not treat anything else as a call."""
    names = []
    for piece in text.split("<tool_call>")[1:]:
        body, closed, _ = piece.partition("</tool_call>")
        try:
            called = name(get(json.loads(body), "name"))
        except (ValueError, RecursionError):
            called = match.group(1) if (match := _FUNCTION.search(body)) else None
        if closed and called:
            names.append(called)
    return tuple(names)
