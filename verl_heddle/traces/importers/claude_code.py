"""Session logs of Claude Code and what writes alike: JSON Lines, an event a line, with `type`, `sessionId`, `uuid`, `timestamp`, `message`.

Lines that share `message.id` are pieces of one assistant message, also where results stand between them, because a tool may begin before
the message ends. The context is what was read, written to the cache and read from it. A sub-agent (`isSidechain`) is a trajectory of its
own, told apart by its `agentId`, else by the line it begins with. Lines that were copied (a resumed session) count once. Source: the logs
themselves, versions 1.0 to 2.1; there is no documentation.
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
_OTHERS = ("action", "args", "observation", "kind", "messages", "payload")
"""Keys of other programs' events."""


def knows(value: Any) -> bool:
    """Whether the first document is of this format."""
    kind = get(value, "type")
    if not isinstance(value, dict) or name(kind) is None or any(key in value for key in _OTHERS):
        return False
    if kind in ("user", "assistant"):
        return isinstance(value.get("message"), dict) and any(name(value.get(key)) is not None for key in ("sessionId", "uuid"))
    if kind == "summary":
        return name(value.get("leafUuid")) is not None
    if kind in ("file-history-snapshot", "file-history-delta"):
        return name(value.get("messageId")) is not None or "snapshot" in value
    return name(value.get("sessionId")) is not None and not isinstance(value.get("message"), str)


def read(documents: Iterable[Document], tally: Tally) -> Iterator[Trajectory]:
    """A trajectory for the session, and one for each sub-agent, in the order in which they begin."""
    log = _Log(tally)
    for document in documents:
        log.line(document)
    for (session, agent), spoken in log.conversations.items():
        apart = f"{session}:{agent}" if session is not None else agent
        item = trajectory(
            spoken.messages(tally),
            tally,
            source=NAME,
            workload="coding",
            prompt_id=session if agent is None else apart,
            model=spoken.model,
            meta={"parent": session} if agent is not None and session is not None else {},
        )
        if item is not None:
            yield item


@dataclass
class _Answer:
    """An assistant message, of which there may be more."""

    said: list[str] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    asked_s: dict[str, float | None] = field(default_factory=dict)
    """When the piece with this call was there."""
    ended_s: float | None = None
    context: int | None = None
    tokens: int | None = None
    stopped: bool = False

    def message(self, tally: Tally) -> Message:
        said = "\n".join(filter(None, self.said))
        # A log that was written while the message came has the count from its beginning, some single tokens, and no reason to stop.
        early = self.tokens is not None and not self.stopped and 2 * self.tokens < tally.tokens(said)
        tokens = None if early else self.tokens
        return Message("assistant", said, tokens=tokens, context_tokens=self.context, ended_s=self.ended_s, calls=tuple(self.calls))


@dataclass
class _Result:
    """Of the call with the id."""

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
        """All there is."""
        return [
            part if isinstance(part, Message) else part.message(tally) if isinstance(part, _Answer) else self._result(part)
            for part in self.parts
        ]

    def _result(self, result: _Result) -> Message:
        """Its seconds run from the end of the message, or from the call where the result was there before."""
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
    """Of each line of a sidechain: the line that it begins with."""

    def line(self, document: Document) -> None:
        value = document.value
        if not isinstance(value, dict):
            document.fault(f"got {type(value).__name__}", allowed="an event")
        kind, said = value.get("type"), value.get("message")
        if kind not in ("user", "assistant"):
            self.tally.left_out["of a type that is no message"] += said is not None
            return
        if not isinstance(said, dict):
            document.fault(f"got {type(said).__name__}", field="message", allowed="a message")
        line = name(value.get("uuid"))
        if line is not None and line in self.seen:
            return
        if line is not None:
            self.seen.add(line)
        place = (name(value.get("sessionId")), self._agent(value, line))
        if kind == "user":
            _heard(self.conversations.setdefault(place, _Conversation()), value)
        elif said.get("model") == _NO_MODEL or value.get("isApiErrorMessage") is True:
            self.tally.left_out["assistant messages that no model wrote"] += 1
        else:
            _said(self.conversations.setdefault(place, _Conversation()), value)

    def _agent(self, value: dict[str, Any], line: str | None) -> str | None:
        if value.get("isSidechain") is not True:
            return None
        root = self.roots.get(name(value.get("parentUuid")) or "", line or "sidechain")
        if line is not None:
            self.roots[line] = root
        return name(value.get("agentId")) or root


def _heard(conversation: _Conversation, value: dict[str, Any]) -> None:
    content, ended = get(value, "message", "content"), unix_s(value.get("timestamp"))
    rest = []
    for block in content if isinstance(content, list) else [content]:
        if get(block, "type") == "tool_result":
            conversation.parts.append(_Result(_words(get(block, "content")), name(get(block, "tool_use_id")), ended))
        else:
            rest.append(_words(block))
    if any(rest):
        conversation.parts.append(Message("user", "\n".join(filter(None, rest)), ended_s=ended))


def _said(conversation: _Conversation, value: dict[str, Any]) -> None:
    message, ended = value["message"], unix_s(value.get("timestamp"))
    key = name(message.get("id")) or name(value.get("requestId"))
    answer = conversation.answers.get(key) if key is not None else None
    if answer is None:
        answer = _Answer()
        conversation.parts.append(answer)
        if key is not None:
            conversation.answers[key] = answer
    conversation.model = conversation.model or name(message.get("model"))
    answer.said.append(_words(message.get("content")))
    answer.ended_s = answer.ended_s if ended is None else ended
    answer.stopped = answer.stopped or name(message.get("stop_reason")) is not None
    read = [number for part in _READ if (number := count(get(message, "usage", part))) is not None]
    answer.context = count(sum(read)) or answer.context  # 0 is what a message has that was not counted
    answer.tokens = count(get(message, "usage", "output_tokens")) or answer.tokens
    content = message.get("content")
    for block in items(content):
        if get(block, "type") == "tool_use":
            answer.calls.append(name(get(block, "name")) or "tool")
            if call := name(get(block, "id")):
                answer.asked_s[call] = ended
                conversation.calls[call] = answer


def _words(content: Any) -> str:
    """What is said in a message or a block; pictures and files are not words."""
    if isinstance(content, list):
        return "\n".join(filter(None, map(_words, content)))
    kind = get(content, "type")
    if kind in ("image", "document", "redacted_thinking"):
        return ""
    if kind == "tool_use":
        return json.dumps(content.get("input"), ensure_ascii=False)
    return _words(content.get("content")) if kind == "tool_result" else text(content)
