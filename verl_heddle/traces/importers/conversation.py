"""From a conversation to a trajectory: what each generation read, made and led to.

Law: a turn is an assistant message. Its input are the messages since the one before (before the first: the prompt); what it led to are the
results that follow, or `user` where a person answers. Token counts are those that the file tells; else texts are counted (`Tally`). A
context that is smaller than what was there before (compaction, dropped reasoning) is a `ctx_reset`. Parallel calls are joined by `+`, and
take as long as the longest.
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
"""Longer, negative or not a number: no duration."""


@dataclass(frozen=True, slots=True)
class Message:
    """One message; None where the file does not say.

    `text`: everything that was said, reasoning and arguments of calls included. `tokens`: of it, for an assistant those generated.
    `context_tokens`: everything the model read for this message. `started_s`, `ended_s`: on one clock; a result ends when it is there.
    `calls`: names of the tools that it calls. `gen_s`, `tool_s`: seconds the generation, or the tool that gave this result, took.
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
    """The trajectory of a conversation; None where no assistant speaks, which is tallied.

    Args:
        prompt_id: None: a digest of what stands before the first assistant message.
        preamble: more that the model reads first (tool schemas).
    """
    spoken = [index for index, message in enumerate(messages) if message.role == "assistant"]
    if not spoken:
        tally.left_out["without an assistant message"] += 1
        return None
    opening = messages[: spoken[0]]
    turns: list[Turn] = []
    context: int | None = None
    for order, index in enumerate(spoken):
        message = messages[index]
        before = messages[(spoken[order - 1] + 1 if order else 0) : index]
        after = messages[index + 1 : spoken[order + 1] if order + 1 < len(spoken) else len(messages)]
        following = messages[spoken[order + 1]] if order + 1 < len(spoken) else None
        heard = sum(_count(one, tally, "input tokens") for one in before) if message.context_tokens is None else 0
        output, estimated = _output(message, tally)
        reset = False
        if message.context_tokens is not None:
            tally.told["context"] += 1
            grown = message.context_tokens - (context or 0)
            heard, reset = max(0, grown), order > 0 and grown < 0
            context = message.context_tokens
        else:
            heard += tally.tokens(preamble) if not order else 0
            context = (context or 0) + heard
        tool = "+".join(message.calls) or ("user" if after and after[0].role == "user" else None)
        turns.append(
            Turn(
                input_tokens=heard if order else 0,
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
            prompt_tokens = heard
        context = min(context + output, MAX_TOKENS)
    digest = prompt_id or blake2b("\0".join(one.text for one in opening).encode("utf-8", "replace"), digest_size=8).hexdigest()
    return Trajectory(source, workload, digest, trial, prompt_tokens, tuple(turns), reward, model, dict(meta or {}))


def _output(message: Message, tally: Tally) -> tuple[int, bool]:
    if message.tokens is not None:
        tally.told["output tokens"] += 1
        return message.tokens, False
    return _count(message, tally, "output tokens"), not tally.exact


def _count(message: Message, tally: Tally, what: str) -> int:
    if message.tokens is not None:
        return message.tokens
    (tally.told if tally.exact else tally.estimated)[what] += 1
    return tally.tokens(message.text)


def _tool_s(message: Message, after: Sequence[Message], following: Message | None, tally: Tally) -> float | None:
    """Seconds until the model could go on."""
    results = [one for one in after if one.role == "tool"] or list(after)
    known = [seconds for one in results if (seconds := _seconds(one.tool_s)) is not None]
    if not known and message.ended_s is not None:
        ends = [one.ended_s for one in results if one.ended_s is not None]
        until = max(ends) if ends else following.started_s if following is not None else None
        known = [seconds] if (seconds := _seconds(_between(message.ended_s, until))) is not None else []
    (tally.told if known else tally.missing)["tool seconds"] += 1
    return max(known) if known else None


def _between(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else end - start


def _seconds(value: float | None) -> float | None:
    return value if value is not None and 0 <= value < LONGEST_S else None
