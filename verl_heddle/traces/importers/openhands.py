"""OpenHands: its event streams (a JSON list, JSON Lines, or a downloaded `trajectory`), and the `output.jsonl` of its evaluations.

What an agent does is an assistant's message, and all events of one model response are one message with parallel calls; what is observed is
their result. Usage is told by the response in `tool_call_metadata`, by `metrics.token_usages` of an evaluation under the response's id, or
as the growth of `llm_metrics`. An event's time is when it was there. Source: OpenHands' `events/serialization` of version 0 (`action`,
`observation`; not the oldest, which have no `source`) and the events of its software-agent SDK, version 1 (`kind`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from verl_heddle.traces.importers.conversation import Message, trajectory
from verl_heddle.traces.importers.counting import Tally
from verl_heddle.traces.importers.document import Document
from verl_heddle.traces.importers.fields import count, get, items, name, real, text, unix_s
from verl_heddle.trajectory import Trajectory

NAME, TITLE = "openhands", "OpenHands events or evaluation output"

_SOURCES = ("agent", "user", "environment")
_KINDS = ("SystemPromptEvent", "MessageEvent", "ActionEvent", "ObservationEvent", "AgentErrorEvent", "UserRejectObservation")
_RESULTS = _KINDS[3:]
_NOT_SAID = (
    "change_agent_state",
    "recall",
    "condensation",
    "condensation_request",
    "loop_recovery",
    "start",
    "stop",
    "pause",
    "resume",
    "null",
)
"""What the program does itself, also under the agent's name."""

_NOT_HEARD = ("null", "agent_state_changed")
_LAST = ("finish", "reject")
"""These calls lead to nothing."""

_ARGUMENTS = ("thought", "final_thought", "content", "command", "code", "path", "url", "message")
"""What a model may have written of an action whose response was not kept."""


def knows(value: Any) -> bool:
    """Whether the first document is of this format."""
    first = value[0] if isinstance(value, list) and value else value
    return _is_event(first) or _is_episode(first)


def read(documents: Iterable[Document], tally: Tally) -> Iterator[Trajectory]:
    """A trajectory for every line of an evaluation, and one for a stream."""
    stream: list[Any] = []
    last = None
    for document in documents:
        value = document.value
        if isinstance(value, list) and not any(_has_events(one) for one in value):
            yield from _episode(value, {}, document, "", tally)
        elif isinstance(value, list) or _has_events(value):
            for number, one in enumerate(value if isinstance(value, list) else [value]):
                where = f"[{number}]." if isinstance(value, list) else ""
                key = "history" if get(one, "history") is not None else "trajectory"
                events = get(one, key)
                events = [] if events is None else document.list_of(events, "events", where + key)
                yield from _episode(events, one, document, where + key, tally)
        elif isinstance(value, dict):
            stream.append(value)
            last = document
        else:
            document.fault(f"got {type(value).__name__}", allowed="an event, a list of events, or the output of an evaluation")
    if last is not None:
        yield from _episode(stream, {}, replace(last, line=0), "", tally)


def _is_event(value: Any) -> bool:
    if not isinstance(value, dict) or value.get("source") not in _SOURCES:
        return False
    acts = isinstance(value.get("action"), str) and isinstance(value.get("args"), dict)
    sees = isinstance(value.get("observation"), str) and "content" in value
    return acts or sees or value.get("kind") in _KINDS or (name(value.get("kind")) or "").endswith("Event")


def _has_events(value: Any) -> bool:
    return isinstance(value, dict) and ("history" in value or "trajectory" in value)


def _is_episode(value: Any) -> bool:
    if not _has_events(value):
        return False
    first = get(value, "history", 0) or get(value, "trajectory", 0)
    first = first[0] if isinstance(first, list) and first else first
    return _is_event(first) or (first is None and name(value.get("instance_id")) is not None and isinstance(value.get("test_result"), dict))


def _episode(events: Sequence[Any], episode: Any, document: Document, where: str, tally: Tally) -> Iterator[Trajectory]:
    """One trajectory, or none."""
    usages = get(episode, "metrics", "token_usages")
    known = {get(one, "response_id"): one for one in items(usages) if name(get(one, "response_id"))}
    heard = _Heard(known)
    for number, event in enumerate(events):
        for one in event if isinstance(event, list) else [event]:  # old outputs pair an action with what it led to
            if not isinstance(one, dict):
                document.fault(f"got {type(one).__name__}", field=f"{where}[{number}]", allowed="an event")
            heard.event(one)
    verdict = get(episode, "report", "resolved")
    verdict = get(episode, "test_result", "report", "resolved") if verdict is None else verdict
    item = trajectory(
        heard.messages,
        tally,
        source=NAME,
        workload="coding",
        prompt_id=name(get(episode, "instance_id")),
        reward=real(verdict),
        model=name(get(episode, "metadata", "llm_config", "model")) or name(get(episode, "metadata", "llm", "model")) or heard.model,
        preamble=heard.tools,
    )
    if item is not None:
        yield item


@dataclass
class _Heard:
    """The messages of a stream so far."""

    usages: Mapping[Any, Any]
    messages: list[Message] = field(default_factory=list)
    tools: str = ""
    model: str | None = None
    places: dict[str, int] = field(default_factory=dict)
    """Where the message of a response stands."""
    total: tuple[int, int] | None = (0, 0)
    """Read and generated up to the agent's last event, where it says so."""

    def event(self, event: dict[str, Any]) -> None:
        kind, action, observation = (name(event.get(key)) for key in ("kind", "action", "observation"))
        source, ended = event.get("source"), unix_s(event.get("timestamp"))
        if kind == "SystemPromptEvent" or action == "system":
            self.tools = text(event.get("tools")) or text(get(event, "args", "tools"))
            said = [event.get("system_prompt"), event.get("dynamic_context"), get(event, "args", "content")]
            self.messages.append(Message("system", text(said), ended_s=ended))
        elif kind in _RESULTS:
            said = [event.get(key) for key in ("observation", "extended_content", "error", "rejection_reason")]
            self.messages.append(Message("tool", text(said), ended_s=ended))
        elif kind == "MessageEvent" and source != "agent":
            said = [get(event, "llm_message", "content"), event.get("extended_content")]
            self.messages.append(Message("user" if source == "user" else "system", text(said), ended_s=ended))
        elif kind in ("MessageEvent", "ActionEvent"):
            call = None if kind == "MessageEvent" else name(event.get("tool_name")) or "tool"
            self._said(event, call, ended)
        elif observation == "recall":  # the program puts it beside what the user said
            said = [event.get("content"), get(event, "extras", "repo_instructions"), get(event, "extras", "microagent_knowledge")]
            self.messages.append(Message("system", text(said), ended_s=ended))
        elif observation is not None and observation not in _NOT_HEARD:
            self.messages.append(Message("tool", text(event.get("content")), ended_s=ended))
        elif action == "message" and source == "user":
            self.messages.append(Message("user", text(get(event, "args", "content")), ended_s=ended))
        elif action is not None and source == "agent" and action not in _NOT_SAID:
            call = None if action == "message" else name(get(event, "tool_call_metadata", "function_name")) or action
            self._said(event, call, ended)

    def _said(self, event: dict[str, Any], call: str | None, ended: float | None) -> None:
        response = get(event, "tool_call_metadata", "model_response")
        answer = get(response, "choices", 0, "message")
        grown = self._grown(event)
        calls = () if call is None or call in _LAST else (call,)
        key = name(get(response, "id")) or name(event.get("llm_response_id"))
        if key is not None and key in self.places:
            first = self.messages[self.places[key]]
            more = "" if answer is not None else _written(event)  # the response holds all its calls
            self.messages[self.places[key]] = replace(first, text=text([first.text, more]), calls=first.calls + calls)
            return
        if key is not None:
            self.places[key] = len(self.messages)
        self.model = self.model or name(get(response, "model"))
        usage = get(response, "usage") or self.usages.get(key) or grown
        self.messages.append(
            Message(
                "assistant",
                _answered(answer) if answer is not None else _written(event),
                tokens=count(get(usage, "completion_tokens")) or None,  # 0 is what providers write that do not count
                context_tokens=count(get(usage, "prompt_tokens")) or None,
                ended_s=ended,
                calls=calls,
            )
        )

    def _grown(self, event: dict[str, Any]) -> dict[str, int]:
        usage = get(event, "llm_metrics", "accumulated_token_usage")
        read, made = count(get(usage, "prompt_tokens")), count(get(usage, "completion_tokens"))
        before, self.total = self.total, None if read is None or made is None else (read, made)
        if before is None or self.total is None:
            return {}
        return {"prompt_tokens": self.total[0] - before[0], "completion_tokens": self.total[1] - before[1]}


def _answered(answer: Any) -> str:
    asked = [get(call, "function", "arguments") for call in items(get(answer, "tool_calls"))]
    return text([get(answer, "reasoning_content"), get(answer, "content"), *asked])


def _written(event: dict[str, Any]) -> str:
    said = [event.get("reasoning_content"), event.get("thought"), get(event, "llm_message", "reasoning_content")]
    said += [get(event, "llm_message", "content"), get(event, "tool_call", "arguments")]
    return text(said + [get(event, "args", key) for key in _ARGUMENTS])
