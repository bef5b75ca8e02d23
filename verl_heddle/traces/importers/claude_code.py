"""Import session logs of Claude Code and similar tools: JSON Lines of events with `type`, `sessionId`, `uuid`, `timestamp`, `message`.

Lines that share `message.id` are parts of one assistant message, even with results between them, because a tool may start before the
message ends. The context is the sum of input, cache-write and cache-read tokens. A sub-agent (`isSidechain`) is a separate trajectory,
identified by its `agentId`, else by its first line. Duplicate lines (from a resumed session) count once. Source: the logs themselves,
versions 1.0 to 2.1; there is no documentation.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from verl_heddle.traces.importers.conversation import Message, trajectory
from verl_heddle.traces.importers.counting import Tally
from verl_heddle.traces.importers.document import Document
from verl_heddle.traces.importers.fields import count, get, items, name, text, unix_s
from verl_heddle.trajectory import Trajectory

NAME, TITLE = "claude_code", "Claude-Code-style session log"

_READ = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")
_NO_MODEL = "<synthetic>"
_FOREIGN_KEYS = ("action", "args", "observation", "kind", "messages", "payload")
"""Keys that mark events of other programs."""


def knows(value: Any) -> bool:
    """Whether the first document has this format."""
    kind = get(value, "type")
    if not isinstance(value, dict) or name(kind) is None or any(key in value for key in _FOREIGN_KEYS):
        return False
    if kind in ("user", "assistant"):
        return isinstance(value.get("message"), dict) and any(name(value.get(key)) is not None for key in ("sessionId", "uuid"))
    if kind == "summary":
        return name(value.get("leafUuid")) is not None
    if kind in ("file-history-snapshot", "file-history-delta"):
        return name(value.get("messageId")) is not None or "snapshot" in value
    return name(value.get("sessionId")) is not None and not isinstance(value.get("message"), str)


def read(documents: Iterable[Document], tally: Tally) -> Iterator[Trajectory]:
    """Yield a trajectory for the session and one per sub-agent, in the order in which they begin."""
    log = _Log(tally)
    for document in documents:
        log.line(document)
    for (session, agent), conversation in log.conversations.items():
        sub_agent = f"{session}:{agent}" if session is not None else agent
        item = trajectory(
            conversation.messages(tally),
            tally,
            source=NAME,
            workload="coding",
            prompt_id=session if agent is None else sub_agent,
            model=conversation.model,
            meta={"parent": session} if agent is not None and session is not None else {},
        )
        if item is not None:
            yield item


@dataclass
class _Answer:
    """An assistant message, to which later lines may add parts."""

    texts: list[str] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    asked_s: dict[str, float | None] = field(default_factory=dict)
    """When the part with this call was logged, by call id."""
    ended_s: float | None = None
    context: int | None = None
    tokens: int | None = None
    stopped: bool = False

    def message(self, tally: Tally) -> Message:
        content = "\n".join(filter(None, self.texts))
        # A line written while the message streams has the count from its start (a few tokens) and no stop reason.
        early = self.tokens is not None and not self.stopped and 2 * self.tokens < tally.tokens(content)
        tokens = None if early else self.tokens
        return Message("assistant", content, tokens=tokens, context_tokens=self.context, ended_s=self.ended_s, calls=tuple(self.calls))


@dataclass
class _Result:
    """A tool result; `call` is the id of its call."""

    text: str
    call: str | None
    ended_s: float | None


@dataclass
class _Conversation:
    parts: list[_Answer | _Result | Message] = field(default_factory=list)
    answers: dict[str, _Answer] = field(default_factory=dict)
    calls: dict[str, _Answer] = field(default_factory=dict)
    model: str | None = None

    def messages(self, tally: Tally) -> list[Message]:
        """The conversation as messages."""
        return [
            part if isinstance(part, Message) else part.message(tally) if isinstance(part, _Answer) else self._result(part)
            for part in self.parts
        ]

    def _result(self, result: _Result) -> Message:
        """Tool time runs from the end of the message, or from the call if the result arrived earlier."""
        answer = self.calls.get(result.call or "")
        seconds = None
        if answer is not None and answer.ended_s is not None and result.ended_s is not None:
            began = answer.ended_s if answer.ended_s <= result.ended_s else answer.asked_s[result.call or ""]
            seconds = None if began is None else result.ended_s - began
        return Message("tool", result.text, ended_s=result.ended_s, tool_s=seconds)


@dataclass
class _Log:
    tally: Tally
    conversations: dict[tuple[str | None, str | None], _Conversation] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)
    roots: dict[str, str] = field(default_factory=dict)
    """First line of the sidechain, for each of its lines."""

    def line(self, document: Document) -> None:
        value = document.value
        if not isinstance(value, dict):
            document.fault(f"got {type(value).__name__}", allowed="an event")
        kind, message = value.get("type"), value.get("message")
        if kind not in ("user", "assistant"):
            self.tally.left_out["unknown message type"] += message is not None
            return
        if not isinstance(message, dict):
            document.fault(f"got {type(message).__name__}", field="message", allowed="a message")
        line = name(value.get("uuid"))
        if line is not None and line in self.seen:
            return
        if line is not None:
            self.seen.add(line)
        place = (name(value.get("sessionId")), self._agent(value, line))
        if kind == "user":
            _add_user(self.conversations.setdefault(place, _Conversation()), value)
        elif message.get("model") == _NO_MODEL or value.get("isApiErrorMessage") is True:
            self.tally.left_out["assistant messages not from a model"] += 1
        else:
            _add_assistant(self.conversations.setdefault(place, _Conversation()), value)

    def _agent(self, value: dict[str, Any], line: str | None) -> str | None:
        if value.get("isSidechain") is not True:
            return None
        root = self.roots.get(name(value.get("parentUuid")) or "", line or "sidechain")
        if line is not None:
            self.roots[line] = root
        return name(value.get("agentId")) or root


def _add_user(conversation: _Conversation, value: dict[str, Any]) -> None:
    content, ended = get(value, "message", "content"), unix_s(value.get("timestamp"))
    rest = []
    for block in content if isinstance(content, list) else [content]:
        if get(block, "type") == "tool_result":
            conversation.parts.append(_Result(_block_text(get(block, "content")), name(get(block, "tool_use_id")), ended))
        else:
            rest.append(_block_text(block))
    if any(rest):
        conversation.parts.append(Message("user", "\n".join(filter(None, rest)), ended_s=ended))


def _add_assistant(conversation: _Conversation, value: dict[str, Any]) -> None:
    message, ended = value["message"], unix_s(value.get("timestamp"))
    key = name(message.get("id")) or name(value.get("requestId"))
    answer = conversation.answers.get(key) if key is not None else None
    if answer is None:
        answer = _Answer()
        conversation.parts.append(answer)
        if key is not None:
            conversation.answers[key] = answer
    conversation.model = conversation.model or name(message.get("model"))
    answer.texts.append(_block_text(message.get("content")))
    answer.ended_s = answer.ended_s if ended is None else ended
    answer.stopped = answer.stopped or name(message.get("stop_reason")) is not None
    read = [number for part in _READ if (number := count(get(message, "usage", part))) is not None]
    answer.context = count(sum(read)) or answer.context  # an uncounted message has 0
    answer.tokens = count(get(message, "usage", "output_tokens")) or answer.tokens
    content = message.get("content")
    for block in items(content):
        if get(block, "type") == "tool_use":
            answer.calls.append(name(get(block, "name")) or "tool")
            if call := name(get(block, "id")):
                answer.asked_s[call] = ended
                conversation.calls[call] = answer


def _block_text(content: Any) -> str:
    """Text of a message or block; images and files have none."""
    if isinstance(content, list):
        return "\n".join(filter(None, map(_block_text, content)))
    kind = get(content, "type")
    if kind in ("image", "document", "redacted_thinking"):
        return ""
    if kind == "tool_use":
        return json.dumps(content.get("input"), ensure_ascii=False)
    return _block_text(content.get("content")) if kind == "tool_result" else text(content)
