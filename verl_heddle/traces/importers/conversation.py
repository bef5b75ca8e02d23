"""Convert a conversation to a trajectory: the input, output and tool calls of each generation.

Law: a turn is an assistant message. Its input is the messages since the previous one (before the first: the prompt). Its tool is
its calls, or `user` if a person answers. Token counts come from the file; otherwise texts are counted (`Tally`). A context smaller than
the previous one (compaction, dropped reasoning) is a `ctx_reset`. Parallel calls are joined by `+` and take as long as the longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Literal

from verl_heddle.traces.importers.counting import Tally
from verl_heddle.traces.schema import MAX_TOKENS
from verl_heddle.trajectory import Trajectory, Turn

LONGEST_S = 1e9
"""Values at or above this, negative values and NaN are not durations."""


@dataclass(frozen=True, slots=True)
class Message:
    """One message; None for values that the file does not record.

    `text`: all its text, including reasoning and call arguments. `tokens`: its tokens; for an assistant, those generated.
    `context_tokens`: everything the model read for this message. `started_s`, `ended_s`: on one clock; a tool result ends when it arrives.
    `calls`: names of the called tools. `gen_s`, `tool_s`: seconds taken by the generation, or by the tool that returned this result.
    """

    role: Literal["system", "user", "assistant", "tool"]
    text: str = ""
    tokens: int | None = None
    context_tokens: int | None = None
    started_s: float | None = None
    ended_s: float | None = None
    calls: tuple[str, ...] = ()
    gen_s: float | None = None
    tool_s: float | None = None


def trajectory(
    messages: Sequence[Message],
    tally: Tally,
    *,
    source: str,
    workload: str,
    prompt_id: str | None = None,
    trial: int | str = 0,
    reward: float | None = None,
    model: str | None = None,
    preamble: str = "",
    meta: dict[str, Any] | None = None,
) -> Trajectory | None:
    """Build the trajectory of a conversation; None (and tallied) if it has no assistant message.

    Args:
        prompt_id: None: a digest of the messages before the first assistant message.
        preamble: further text the model reads first (tool schemas).
    """
    answers = [index for index, message in enumerate(messages) if message.role == "assistant"]
    if not answers:
        tally.left_out["without an assistant message"] += 1
        return None
    opening = messages[: answers[0]]
    turns: list[Turn] = []
    context: int | None = None
    for order, index in enumerate(answers):
        message = messages[index]
        before = messages[(answers[order - 1] + 1 if order else 0) : index]
        after = messages[index + 1 : answers[order + 1] if order + 1 < len(answers) else len(messages)]
        following = messages[answers[order + 1]] if order + 1 < len(answers) else None
        fresh = sum(_count(item, tally, "input tokens") for item in before) if message.context_tokens is None else 0
        output, estimated = _output(message, tally)
        reset = False
        if message.context_tokens is not None:
            tally.known["context"] += 1
            grown = message.context_tokens - (context or 0)
            fresh, reset = max(0, grown), order > 0 and grown < 0
            context = message.context_tokens
        else:
            fresh += tally.tokens(preamble) if not order else 0
            context = (context or 0) + fresh
        tool = "+".join(message.calls) or ("user" if after and after[0].role == "user" else None)
        turns.append(
            Turn(
                input_tokens=fresh if order else 0,
                output_tokens=output,
                tool=tool,
                tool_latency_s=_tool_s(message, after, following, tally) if tool else None,
                gen_s=_seconds(message.gen_s if message.gen_s is not None else _between(message.started_s, message.ended_s)),
                ctx_tokens=context,
                ctx_reset=reset,
                output_est=estimated,
            )
        )
        if not order:
            prompt_tokens = fresh
        context = min(context + output, MAX_TOKENS)
    digest = prompt_id or blake2b("\0".join(item.text for item in opening).encode("utf-8", "replace"), digest_size=8).hexdigest()
    return Trajectory(source, workload, digest, trial, prompt_tokens, tuple(turns), reward, model, dict(meta or {}))


def _output(message: Message, tally: Tally) -> tuple[int, bool]:
    if message.tokens is not None:
        tally.known["output tokens"] += 1
        return message.tokens, False
    return _count(message, tally, "output tokens"), not tally.exact


def _count(message: Message, tally: Tally, what: str) -> int:
    if message.tokens is not None:
        return message.tokens
    (tally.known if tally.exact else tally.estimated)[what] += 1
    return tally.tokens(message.text)


def _tool_s(message: Message, after: Sequence[Message], following: Message | None, tally: Tally) -> float | None:
    """Seconds until the model could continue."""
    results = [item for item in after if item.role == "tool"] or list(after)
    known = [seconds for item in results if (seconds := _seconds(item.tool_s)) is not None]
    if not known and message.ended_s is not None:
        ends = [item.ended_s for item in results if item.ended_s is not None]
        until = max(ends) if ends else following.started_s if following is not None else None
        known = [seconds] if (seconds := _seconds(_between(message.ended_s, until))) is not None else []
    (tally.known if known else tally.missing)["tool seconds"] += 1
    return max(known) if known else None


def _between(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else end - start


def _seconds(value: float | None) -> float | None:
    return value if value is not None and 0 <= value < LONGEST_S else None
