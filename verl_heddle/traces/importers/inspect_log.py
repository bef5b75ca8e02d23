"""Import Inspect (UK AISI) logs in JSON: `eval`, `samples` with `messages`, and `events` with times and token counts.

An answer is matched with its model event by message id (logs from 2025 on), else by order if there are equally many of both; there can be
more events, for example from a scorer. A `.eval` file is a zip: `inspect log convert --to json` converts it to JSON. Source:
`log/_log.py`, `event/_model.py`, `event/_tool.py` and `model/_model_output.py` of inspect_ai 0.3, and a log that it wrote.
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

NAME, TITLE = "inspect", "Inspect eval log"
ROLES = ("system", "user", "assistant", "tool")
GRADES = {"C": 1.0, "P": 0.5, "I": 0.0, "N": 0.0}
"""Inspect's letters for correct, partial, incorrect and no answer, with the values it averages."""


def knows(value: object) -> bool:
    """Whether the first document has this format."""
    return (
        isinstance(value, dict)
        and {"version", "status"} <= value.keys()
        and name(get(value, "eval", "task")) is not None
        and name(get(value, "eval", "model")) is not None
    )


def read(documents: Iterable[Document], tally: Tally) -> Iterator[Trajectory]:
    """Yield a trajectory per sample and epoch."""
    for document in documents:
        samples = document.list_of(get(document.value, "samples"), "samples (a header-only log has none)", "samples")
        for number, sample in enumerate(samples):
            field = f"samples[{number}].messages"
            messages = document.list_of(get(sample, "messages"), "messages", field)
            sample_id = get(sample, "id")
            item = trajectory(
                _messages(document, sample, messages, field),
                tally,
                source=NAME,
                workload=name(get(document.value, "eval", "task")) or NAME,
                prompt_id=str(sample_id) if type(sample_id) is int else name(sample_id),
                trial=count(get(sample, "epoch")) or 0,
                reward=_score(sample),
                model=name(get(document.value, "eval", "model")),
            )
            if item is not None:
                yield item


def _messages(document: Document, sample: Any, messages: list[Any], field: str) -> list[Message]:
    answers, tools = _events(sample, [entry for entry in messages if _generated(entry)])
    result: list[Message] = []
    answered = 0
    ended: float | None = None
    for index, entry in enumerate(messages):
        role = get(entry, "role")
        if role not in ROLES:
            document.fault(f"got {role!r}", field=f"{field}[{index}].role", allowed=", ".join(ROLES))
        calls = items(get(entry, "tool_calls"))
        message = Message(role, text([get(entry, "content"), *(get(call, "arguments") for call in calls)]))
        if _generated(entry):
            names = tuple(name(get(call, "function")) or name(get(call, "function", "name")) or "tool" for call in calls)
            message = replace(_measured(message, answers[answered]), calls=names)
            answered += 1
            ended = message.ended_s
        elif role == "assistant":
            message = replace(message, role="system")  # an example in the prompt
        elif role == "tool":
            event = tools.get(get(entry, "tool_call_id")) if isinstance(get(entry, "tool_call_id"), str) else None
            start, end = unix_s(get(event, "timestamp")), unix_s(get(event, "completed"))
            # Parallel calls may run sequentially: their end times give the total time, their own durations do not.
            alone = end - start if ended is None and start is not None and end is not None else None
            message = replace(message, ended_s=end, tool_s=alone)
        result.append(message)
    return result


def _generated(message: Any) -> bool:
    return bool(get(message, "role") == "assistant" and get(message, "source") != "input")


def _events(sample: Any, answers: list[Any]) -> tuple[list[Any], dict[str, Any]]:
    """The model event of each answer (for the last one, else the sample's `output`), and the tool events by call id."""
    events = get(sample, "events")
    if not isinstance(events, list):
        events = get(sample, "transcript", "events")  # logs of 2024
    events = items(events)
    models = [event for event in events if get(event, "event") == "model" and not get(event, "pending") and get(event, "error") is None]
    known = {number: event for event in models if (number := name(get(event, "output", "choices", 0, "message", "id")))}
    found = [known.get(name(get(answer, "id")) or "") for answer in answers]
    if len(models) == len(answers):
        found = [event or models[index] for index, event in enumerate(found)]
    if found and found[-1] is None:
        found[-1] = {"output": get(sample, "output")}
    return found, {event["id"]: event for event in events if get(event, "event") == "tool" and isinstance(get(event, "id"), str)}


def _measured(message: Message, event: Any) -> Message:
    usage = get(event, "output", "usage")
    time = real(get(event, "output", "time"))
    return replace(
        message,
        tokens=count(get(usage, "output_tokens")),
        context_tokens=_context(usage),
        started_s=unix_s(get(event, "timestamp")),
        ended_s=unix_s(get(event, "completed")),
        gen_s=real(get(event, "working_time")) if time is None else time,
    )


def _context(usage: Any) -> int | None:
    """Total tokens read. `input_tokens` excludes cached tokens, except in logs of OpenAI models up to 2024, where it includes them."""
    fresh = count(get(usage, "input_tokens"))
    if fresh is None:
        return None
    gross = fresh + sum(count(get(usage, f"input_tokens_cache_{way}")) or 0 for way in ("read", "write"))
    total, output = count(get(usage, "total_tokens")), count(get(usage, "output_tokens"))
    return count(gross if not total or output is None else min(gross, max(fresh, total - output)))


def _score(sample: Any) -> float | None:
    """Score by the first scorer."""
    scores = get(sample, "scores")
    first = next(iter(scores.values()), None) if isinstance(scores, dict) else get(sample, "score")
    value = get(first, "value")
    return GRADES[value] if isinstance(value, str) and value in GRADES else real(value)
