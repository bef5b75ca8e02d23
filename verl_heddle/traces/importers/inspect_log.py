"""Logs of Inspect (UK AISI) in JSON: `eval`, `samples` with `messages`, and `events` that time and count them.

An answer is matched with its model event by the message's id (logs from 2025 on), else in order where there are as many of one as of the
other: there may be more, a scorer's for one. A `.eval` file is a zip: `inspect log convert --to json` makes JSON of it. Source:
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
"""Inspect's letters for correct, partly, incorrect and no answer, as it averages them."""


def knows(value: object) -> bool:
    """Whether the first document is of this format."""
    return (
        isinstance(value, dict)
        and {"version", "status"} <= value.keys()
        and name(get(value, "eval", "task")) is not None
        and name(get(value, "eval", "model")) is not None
    )


def read(documents: Iterable[Document], tally: Tally) -> Iterator[Trajectory]:
    """A trajectory for every sample in every epoch."""
    for document in documents:
        samples = document.list_of(get(document.value, "samples"), "samples: a header alone has none", "samples")
        for number, sample in enumerate(samples):
            field = f"samples[{number}].messages"
            said = document.list_of(get(sample, "messages"), "messages", field)
            sample_id = get(sample, "id")
            item = trajectory(
                _messages(document, sample, said, field),
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


def _messages(document: Document, sample: Any, said: list[Any], field: str) -> list[Message]:
    answers, tools = _events(sample, [one for one in said if _generated(one)])
    made: list[Message] = []
    spoken = 0
    ended: float | None = None
    for index, one in enumerate(said):
        role = get(one, "role")
        if role not in ROLES:
            document.fault(f"got {role!r}", field=f"{field}[{index}].role", allowed=", ".join(ROLES))
        calls = items(get(one, "tool_calls"))
        message = Message(role, text([get(one, "content"), *(get(call, "arguments") for call in calls)]))
        if _generated(one):
            names = tuple(name(get(call, "function")) or name(get(call, "function", "name")) or "tool" for call in calls)
            message = replace(_told(message, answers[spoken]), calls=names)
            spoken += 1
            ended = message.ended_s
        elif role == "assistant":
            message = replace(message, role="system")  # an example in the prompt
        elif role == "tool":
            event = tools.get(get(one, "tool_call_id")) if isinstance(get(one, "tool_call_id"), str) else None
            start, end = unix_s(get(event, "timestamp")), unix_s(get(event, "completed"))
            # Parallel calls may run one after the other: their ends say how long all of them took, their own times do not.
            alone = end - start if ended is None and start is not None and end is not None else None
            message = replace(message, ended_s=end, tool_s=alone)
        made.append(message)
    return made


def _generated(message: Any) -> bool:
    return bool(get(message, "role") == "assistant" and get(message, "source") != "input")


def _events(sample: Any, answers: list[Any]) -> tuple[list[Any], dict[str, Any]]:
    """What is known of each answer: its model event or, of the last one, the sample's `output`; and the tool events by the call's id."""
    events = get(sample, "events")
    if not isinstance(events, list):
        events = get(sample, "transcript", "events")  # logs of 2024
    events = items(events)
    models = [one for one in events if get(one, "event") == "model" and not get(one, "pending") and get(one, "error") is None]
    known = {number: one for one in models if (number := name(get(one, "output", "choices", 0, "message", "id")))}
    found = [known.get(name(get(answer, "id")) or "") for answer in answers]
    if len(models) == len(answers):
        found = [one or models[index] for index, one in enumerate(found)]
    if found and found[-1] is None:
        found[-1] = {"output": get(sample, "output")}
    return found, {one["id"]: one for one in events if get(one, "event") == "tool" and isinstance(get(one, "id"), str)}


def _told(message: Message, event: Any) -> Message:
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
    """Everything that was read: `input_tokens` is without what came out of the cache, but was with it in logs of OpenAI models to 2024."""
    fresh = count(get(usage, "input_tokens"))
    if fresh is None:
        return None
    gross = fresh + sum(count(get(usage, f"input_tokens_cache_{way}")) or 0 for way in ("read", "write"))
    total, output = count(get(usage, "total_tokens")), count(get(usage, "output_tokens"))
    return count(gross if not total or output is None else min(gross, max(fresh, total - output)))


def _score(sample: Any) -> float | None:
    """Of the first scorer."""
    scores = get(sample, "scores")
    first = next(iter(scores.values()), None) if isinstance(scores, dict) else get(sample, "score")
    value = get(first, "value")
    return GRADES[value] if isinstance(value, str) and value in GRADES else real(value)
