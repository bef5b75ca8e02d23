"""Import W&B Weave calls, JSON Lines or a JSON list: `op_name`, `trace_id`, `started_at`, `ended_at`, `inputs`, `output`, `summary`.

The turns of a trace are its model calls (inputs with `messages`, an output with `choices` or with Anthropic's `content` and `usage`), in
start order; the time from the end of one to the start of the next is tool time. A call nested in a model call is the same call seen by
a different layer. The calls of a trace may be anywhere in the file, so all are held until its end, as numbers and names. Source:
`CallSchema` of the Weave documentation, and the integrations of weave 0.54 for OpenAI and Anthropic.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from math import inf
from typing import Any

from verl_heddle.traces.importers.conversation import Message, trajectory
from verl_heddle.traces.importers.counting import Tally
from verl_heddle.traces.importers.document import Document
from verl_heddle.traces.importers.fields import count, get, items, name, text, unix_s
from verl_heddle.trajectory import Trajectory

NAME, TITLE = "weave", "W&B Weave calls"


@dataclass(frozen=True, slots=True)
class _Call:
    """A model call. `user_last`: its last input has role `user`: a person's message or, for Anthropic, a tool result."""

    message: Message
    prompt: str
    user_last: bool
    model: str | None
    context_recorded: bool
    output_recorded: bool


@dataclass(slots=True)
class _Trace:
    calls: list[tuple[str | None, _Call]] = field(default_factory=list)
    parents: dict[str, str | None] = field(default_factory=dict)
    workload: str | None = None


def knows(value: object) -> bool:
    """Whether the first document has this format."""
    first = value[0] if isinstance(value, list) and value else value
    return (
        isinstance(first, dict)
        and {"op_name", "trace_id", "started_at", "inputs"} <= first.keys()
        and name(first["op_name"]) is not None
        and name(first["trace_id"]) is not None
    )


def read(documents: Iterable[Document], tally: Tally) -> Iterator[Trajectory]:
    """Yield a trajectory per trace."""
    traces: dict[str, _Trace] = {}
    for document in documents:
        rows = document.value if isinstance(document.value, list) else [document.value]
        for number, row in enumerate(rows):
            key = name(get(row, "trace_id"))
            if key is None:
                where = f"[{number}]." if isinstance(document.value, list) else ""
                document.fault(f"got {type(get(row, 'trace_id')).__name__}", field=f"{where}trace_id", allowed="text")
            _add_call(traces.setdefault(key, _Trace()), row, tally)
    for trace in traces.values():
        item = _trajectory(trace, tally)
        if item is not None:
            yield item


def _add_call(trace: _Trace, row: Any, tally: Tally) -> None:
    key, parent = name(get(row, "id")), name(get(row, "parent_id"))
    if key is not None:
        trace.parents[key] = parent
    if parent is None:
        trace.workload = _op(get(row, "op_name"))
    call = _call(row, tally)
    if call is None:
        tally.left_out["non-model calls"] += 1
    else:
        trace.calls.append((key, call))


def _op(reference: object) -> str | None:
    """The name in `weave:///entity/project/op/name:digest`."""
    return (name(reference) or "").rpartition("/")[2].partition(":")[0] or None


def _call(row: Any, tally: Tally) -> _Call | None:
    inputs, output = get(row, "inputs", "messages"), get(row, "output")
    choices, content = get(output, "choices"), get(output, "content")
    if not isinstance(inputs, list):
        return None
    if isinstance(choices, list):
        answer = get(choices, 0, "message")
        calls = [get(call, "function") for call in items(get(answer, "tool_calls"))]
        words = [get(answer, key) for key in ("reasoning_content", "reasoning", "content")]
    elif isinstance(content, list) and get(output, "usage") is not None:
        calls = [part for part in content if get(part, "type") == "tool_use"]
        words = [part for part in content if get(part, "type") != "tool_use"]
    else:
        return None
    context, generated = _usage(row)
    system, tools = text(get(row, "inputs", "system")), text(get(row, "inputs", "tools"))
    if context is None:
        estimate = sum(tally.tokens(text(get(item, "content")) + text(get(item, "tool_calls"))) for item in inputs)
        estimate += tally.tokens(system) + tally.tokens(tools)
    words += [text(get(call, "arguments")) + text(get(call, "input")) for call in calls]
    return _Call(
        Message(
            "assistant",
            tokens=tally.tokens(text(words)) if generated is None else generated,
            context_tokens=estimate if context is None else context,
            started_s=unix_s(get(row, "started_at")),
            ended_s=unix_s(get(row, "ended_at")),
            calls=tuple(name(get(call, "name")) or "tool" for call in calls),
        ),
        prompt=blake2b(
            "\0".join([system, *(text(get(item, "content")) for item in inputs)]).encode("utf-8", "replace"), digest_size=8
        ).hexdigest(),
        user_last=get(inputs, -1, "role") == "user",
        model=name(get(output, "model")) or name(get(row, "inputs", "model")),
        context_recorded=context is not None,
        output_recorded=generated is not None,
    )


def _usage(row: Any) -> tuple[int | None, int | None]:
    """Tokens read and generated, None if not recorded.

    Anthropic's `input_tokens` exclude cached tokens, except in the summary, where Weave has added them.
    """
    usage = get(row, "output", "usage")
    made = _first(usage, "completion_tokens", "output_tokens")
    context = count(get(usage, "prompt_tokens"))
    if context is None and (fresh := count(get(usage, "input_tokens"))) is not None:
        context = count(fresh + sum(count(get(usage, f"cache_{way}_input_tokens")) or 0 for way in ("read", "creation")))
    models = get(row, "summary", "usage")
    if isinstance(models, dict) and len(models) == 1:  # for several models it would be a sum
        (only,) = models.values()
        context = _first(only, "prompt_tokens", "input_tokens") if context is None else context
        made = _first(only, "completion_tokens", "output_tokens") if made is None else made
    return context, made


def _first(usage: Any, *keys: str) -> int | None:
    return next((number for key in keys if (number := count(get(usage, key))) is not None), None)


def _trajectory(trace: _Trace, tally: Tally) -> Trajectory | None:
    of_models = {key for key, _ in trace.calls if key is not None}
    calls = [call for key, call in trace.calls if not _inside(key, trace.parents, of_models)]
    if len(trace.calls) > len(calls):
        tally.left_out["calls nested in a model call"] += len(trace.calls) - len(calls)
    calls.sort(key=lambda call: inf if call.message.started_s is None else call.message.started_s)
    messages: list[Message] = []
    for call in calls:
        if messages and call.user_last:
            messages.append(Message("user"))
        messages.append(call.message)
    counted = Tally()
    item = trajectory(
        messages,
        counted,
        source=NAME,
        workload=trace.workload or NAME,
        prompt_id=calls[0].prompt if calls else None,
        model=calls[0].model if calls else None,
    )
    if item is None:
        return None
    # All these messages carry counts, so `counted` treats them as known; only `calls` says which ones the file recorded.
    for what in ("known", "missing"):
        if number := getattr(counted, what)["tool seconds"]:
            getattr(tally, what)["tool seconds"] += number
    for call in calls:
        (tally.known if call.context_recorded or tally.exact else tally.estimated)["context"] += 1
        (tally.known if call.output_recorded or tally.exact else tally.estimated)["output tokens"] += 1
    return replace(
        item,
        steps=tuple(
            replace(turn, output_est=not call.output_recorded and not tally.exact) for turn, call in zip(item.steps, calls, strict=True)
        ),
    )


def _inside(key: str | None, parents: dict[str, str | None], of_models: set[str]) -> bool:
    """Whether an ancestor is a model call. A cycle of parents ends the search."""
    seen = set()
    above = None if key is None else parents.get(key)
    while above is not None and above not in seen:
        if above in of_models and above != key:
            return True
        seen.add(above)
        above = parents.get(above)
    return False
