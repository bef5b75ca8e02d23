"""Import OpenHands event streams (a JSON list, JSON Lines, or a downloaded `trajectory`) and the `output.jsonl` of its evaluations.

An agent action is an assistant message, and all events of one model response form one message with parallel calls; observations are their
results. Usage comes from the response in `tool_call_metadata`, from `metrics.token_usages` of an evaluation under the response's id, or
from the growth of `llm_metrics`. An event's time is when it arrived. Source: OpenHands' `events/serialization` of version 0 (`action`,
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
_PROGRAM_ACTIONS = (
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
"""Actions of the program itself, even if attributed to the agent."""

_STATE_OBSERVATIONS = ("null", "agent_state_changed")
_FINAL_CALLS = ("finish", "reject")
"""These calls end the run and have no result."""

_ARGUMENTS = ("thought", "final_thought", "content", "command", "code", "path", "url", "message")
"""Action fields that the model may have written, used if its response was not kept."""


def knows(value: Any) -> bool:
    """Whether the first document has this format."""
    first = value[0] if isinstance(value, list) and value else value
    return _is_event(first) or _is_episode(first)


def read(documents: Iterable[Document], tally: Tally) -> Iterator[Trajectory]:
    """Yield a trajectory per evaluation line, and one per stream."""
    stream: list[Any] = []
    last = None
    for document in documents:
        value = document.value
        if isinstance(value, list) and not any(_has_events(entry) for entry in value):
            yield from _episode(value, {}, document, "", tally)
        elif isinstance(value, list) or _has_events(value):
            for number, entry in enumerate(value if isinstance(value, list) else [value]):
                where = f"[{number}]." if isinstance(value, list) else ""
                key = "history" if get(entry, "history") is not None else "trajectory"
                events = get(entry, key)
                events = [] if events is None else document.list_of(events, "events", where + key)
                yield from _episode(events, entry, document, where + key, tally)
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
    """Yield one trajectory, or none if no assistant speaks."""
    usages = get(episode, "metrics", "token_usages")
    known = {get(entry, "response_id"): entry for entry in items(usages) if name(get(entry, "response_id"))}
    stream = _Stream(known)
    for number, event in enumerate(events):
        for entry in event if isinstance(event, list) else [event]:  # old outputs pair an action with its observation
            if not isinstance(entry, dict):
                document.fault(f"got {type(entry).__name__}", field=f"{where}[{number}]", allowed="an event")
            stream.event(entry)
    verdict = get(episode, "report", "resolved")
    verdict = get(episode, "test_result", "report", "resolved") if verdict is None else verdict
    item = trajectory(
        stream.messages,
        tally,
        source=NAME,
        workload="coding",
        prompt_id=name(get(episode, "instance_id")),
        reward=real(verdict),
        model=name(get(episode, "metadata", "llm_config", "model")) or name(get(episode, "metadata", "llm", "model")) or stream.model,
        preamble=stream.tools,
    )
    if item is not None:
        yield item


@dataclass
class _Stream:
    """Accumulates the messages of an event stream."""

    usages: Mapping[Any, Any]
    messages: list[Message] = field(default_factory=list)
    tools: str = ""
    model: str | None = None
    places: dict[str, int] = field(default_factory=dict)
    """Index of the message of each response."""
    total: tuple[int, int] | None = (0, 0)
    """Tokens read and generated up to the agent's last event; None if it did not record them."""

    def event(self, event: dict[str, Any]) -> None:
        kind, action, observation = (name(event.get(key)) for key in ("kind", "action", "observation"))
        source, ended = event.get("source"), unix_s(event.get("timestamp"))
        if kind == "SystemPromptEvent" or action == "system":
            self.tools = text(event.get("tools")) or text(get(event, "args", "tools"))
            parts = [event.get("system_prompt"), event.get("dynamic_context"), get(event, "args", "content")]
            self.messages.append(Message("system", text(parts), ended_s=ended))
        elif kind in _RESULTS:
            parts = [event.get(key) for key in ("observation", "extended_content", "error", "rejection_reason")]
            self.messages.append(Message("tool", text(parts), ended_s=ended))
        elif kind == "MessageEvent" and source != "agent":
            parts = [get(event, "llm_message", "content"), event.get("extended_content")]
            self.messages.append(Message("user" if source == "user" else "system", text(parts), ended_s=ended))
        elif kind in ("MessageEvent", "ActionEvent"):
            call = None if kind == "MessageEvent" else name(event.get("tool_name")) or "tool"
            self._agent_event(event, call, ended)
        elif observation == "recall":  # the program adds it to the user message
            parts = [event.get("content"), get(event, "extras", "repo_instructions"), get(event, "extras", "microagent_knowledge")]
            self.messages.append(Message("system", text(parts), ended_s=ended))
        elif observation is not None and observation not in _STATE_OBSERVATIONS:
            self.messages.append(Message("tool", text(event.get("content")), ended_s=ended))
        elif action == "message" and source == "user":
            self.messages.append(Message("user", text(get(event, "args", "content")), ended_s=ended))
        elif action is not None and source == "agent" and action not in _PROGRAM_ACTIONS:
            call = None if action == "message" else name(get(event, "tool_call_metadata", "function_name")) or action
            self._agent_event(event, call, ended)

    def _agent_event(self, event: dict[str, Any], call: str | None, ended: float | None) -> None:
        response = get(event, "tool_call_metadata", "model_response")
        answer = get(response, "choices", 0, "message")
        growth = self._usage_growth(event)
        calls = () if call is None or call in _FINAL_CALLS else (call,)
        key = name(get(response, "id")) or name(event.get("llm_response_id"))
        if key is not None and key in self.places:
            first = self.messages[self.places[key]]
            more = "" if answer is not None else _event_text(event)  # the response already holds all its calls
            self.messages[self.places[key]] = replace(first, text=text([first.text, more]), calls=first.calls + calls)
            return
        if key is not None:
            self.places[key] = len(self.messages)
        self.model = self.model or name(get(response, "model"))
        usage = get(response, "usage") or self.usages.get(key) or growth
        self.messages.append(
            Message(
                "assistant",
                _response_text(answer) if answer is not None else _event_text(event),
                tokens=count(get(usage, "completion_tokens")) or None,  # providers that do not count write 0
                context_tokens=count(get(usage, "prompt_tokens")) or None,
                ended_s=ended,
                calls=calls,
            )
        )

    def _usage_growth(self, event: dict[str, Any]) -> dict[str, int]:
        usage = get(event, "llm_metrics", "accumulated_token_usage")
        read, generated = count(get(usage, "prompt_tokens")), count(get(usage, "completion_tokens"))
        before, self.total = self.total, None if read is None or generated is None else (read, generated)
        if before is None or self.total is None:
            return {}
        return {"prompt_tokens": self.total[0] - before[0], "completion_tokens": self.total[1] - before[1]}


def _response_text(answer: Any) -> str:
    arguments = [get(call, "function", "arguments") for call in items(get(answer, "tool_calls"))]
    return text([get(answer, "reasoning_content"), get(answer, "content"), *arguments])


def _event_text(event: dict[str, Any]) -> str:
    parts = [event.get("reasoning_content"), event.get("thought"), get(event, "llm_message", "reasoning_content")]
    parts += [get(event, "llm_message", "content"), get(event, "tool_call", "arguments")]
    return text(parts + [get(event, "args", key) for key in _ARGUMENTS])
