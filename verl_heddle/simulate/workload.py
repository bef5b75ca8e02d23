"""The mutable state of the simulation: `TrajectoryState` for a trajectory, `Request` for one turn in an engine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from math import inf, isfinite
from typing import Any

from verl_heddle.simulate.options import EngineOptions
from verl_heddle.trajectory import Outcome, Trajectory, TrajectoryId, Turn


class TrajectoryState:
    """A live trajectory. `turn` is the index of the current turn, or of the next one while no turn is in flight."""

    __slots__ = (
        "cancelled",
        "context",
        "end_s",
        "generated",
        "group",
        "homes",
        "id",
        "index",
        "key",
        "known",
        "last",
        "outcome",
        "prompt_tokens",
        "request",
        "shared",
        "start_s",
        "steps",
        "stop_at",
        "tool_wait_s",
        "turn",
        "warming",
    )

    def __init__(self, index: int, identity: TrajectoryId, group: int, shared: int, prompt_tokens: int, steps: tuple[Turn, ...]) -> None:
        self.index = index
        self.id = identity
        self.key = identity.key
        self.group = group
        """Number of its prompt, from 0."""
        self.shared = shared
        """Leading tokens shared by the trajectories of the prompt: whole blocks, and less than the prompt, because every request computes
        its last token itself and keeps that block."""
        self.prompt_tokens = prompt_tokens
        self.steps = steps
        self.turn = 0
        self.context = prompt_tokens
        """Context length in tokens: prompt, outputs and tool results."""
        self.known = 0
        """Leading tokens of the context that some engine has already computed."""
        self.generated = 0
        self.request: Request | None = None
        """The turn in flight; None in a tool."""
        self.warming: Request | None = None
        self.last: Any = None
        """The engine of the previous turn."""
        self.homes: list[int] = []
        """Numbers of the engines that may have some of its context cached."""
        self.cancelled = False
        self.stop_at: float = inf
        """Generated tokens at which it is cancelled; inf: no limit."""
        self.tool_wait_s = 0.0
        """Seconds it waited for a free tool."""
        self.outcome: Outcome | None = None
        self.start_s = 0.0
        self.end_s = 0.0

    def open_turn(self) -> int | None:
        """Set the context of the next turn. Returns how many leading tokens of the old context remain if some were dropped, else None."""
        output_before = (self.steps[self.turn - 1].output_tokens or 0) if self.turn else 0
        self.context, kept = next_context(self.steps[self.turn], self.context, output_before, self.prompt_tokens)
        if kept is not None:
            self.known = min(self.known, kept)
        return kept


def next_context(turn: Turn, before: int, output_before: int, prompt_tokens: int) -> tuple[int, int | None]:
    """Context of a turn, and how many leading tokens of the old context it keeps if the context shrank (None: all).

    Args:
        before: tokens after the previous turn, including its output; the prompt for the first turn.
        output_before: that output; 0 for the first turn.

    Compaction (`ctx_reset`) keeps only the prompt. A context that shrank for another reason (dropped reasoning) keeps the tokens before the
    last output.
    """
    context = turn.ctx_tokens if turn.ctx_tokens is not None else before + (turn.input_tokens or 0)
    if not output_before or (context >= before and not turn.ctx_reset):
        return context, None
    return context, min(context, prompt_tokens if turn.ctx_reset else before - output_before)


def walk(item: Trajectory) -> Iterator[tuple[int, int, int]]:
    """Yield (context, new tokens at its end since the previous turn, output) for every turn of a trajectory that `states` accepts.

    New tokens cannot be computed before the turn starts, not even by a pre-warm. There is at least 1, the least an engine computes.
    """
    prompt = item.prompt_tokens or 0
    before = prompt
    known = output_before = 0
    for turn in item.steps:
        context, kept = next_context(turn, before, output_before, prompt)
        known = known if kept is None else min(known, kept)
        output_before = turn.output_tokens or 0
        yield context, max(1, context - known), output_before
        before = context + output_before
        known = before


def most_kv(trajectories: Iterable[Trajectory]) -> int:
    """KV tokens that the longest single turn needs, and therefore the least KV capacity of a replica that serves it."""
    return max(context + output - 1 for item in trajectories for context, _, output in walk(item))


class Request:
    """One turn in an engine (vLLM's term), from its placement decision to its last token; also a pre-warm."""

    __slots__ = (
        "admitted_s",
        "arrival_s",
        "asked",
        "cached",
        "context",
        "ends",
        "engine",
        "floor",
        "known",
        "left",
        "order",
        "owed",
        "predicted",
        "preemptions",
        "prefill_s",
        "prewarm",
        "priority",
        "queue_s",
        "queued_s",
        "rank",
        "rate",
        "reason",
        "recomputed",
        "shared",
        "since",
        "start_s",
        "ticket",
        "told",
        "trajectory",
        "waiting",
        "yielded",
    )

    def __init__(self, trajectory: TrajectoryState, context: int, left: int, known: int, prewarm: bool = False) -> None:
        self.trajectory = trajectory
        self.context = context
        """Context length in tokens; the generated tokens are added when the request leaves its slot."""
        self.asked = self.left = left
        """`asked`: output tokens of the turn; `left`: tokens still to generate, as of the last time the request took or left a slot."""
        self.floor = 0
        """Value of `left` at which the request is stopped; 0: it runs to its end."""
        self.told = 0
        """Output tokens already reported to the policy."""
        self.known = known
        self.shared = trajectory.shared if context > trajectory.shared else 0
        self.prewarm = prewarm
        self.priority = self.order = self.reason = 0
        self.rank: float = 0.0
        """`priority` after ageing; orders the waiting queue."""
        self.predicted: float | None = None
        self.start_s = self.arrival_s = 0.0
        """`start_s`: when the trajectory requested the turn; `arrival_s`: when the engine received it."""
        self.engine = -1
        """Number of its engine; -1: none yet."""
        self.waiting = False
        self.since = 0
        """Step number of the engine when the request took its slot."""
        self.ticket = -1
        """Identifies the current stay in a slot; -1 outside a slot."""
        self.ends = 0
        """Step number of the engine with which the last token is generated; valid while decoding."""
        self.owed = 0
        """Tokens still to prefill; 0 while decoding."""
        self.rate = 0.0
        """Seconds that each prefilled token adds to a step."""
        self.queued_s = self.admitted_s = 0.0
        self.queue_s = self.prefill_s = 0.0
        self.preemptions = self.yielded = self.recomputed = 0
        self.cached = -1
        """Cached prefix tokens at the first admission; -1 before."""


def states(trajectories: Sequence[Trajectory], options: EngineOptions, step: int) -> list[TrajectoryState]:
    """Validate the trajectories and convert them to simulation state, in order.

    Raises:
        ValueError: there are no trajectories, two have the same prompt and trial, one has no turns, or numbers are missing or out of range
            (`verl_heddle.traces.replayable` fills in numbers that a trace lacks).
    """
    if not trajectories:
        raise ValueError("no trajectories to simulate")
    groups: dict[str, int] = {}
    shortest: dict[str, int] = {}
    samples = Counter(item.prompt_id for item in trajectories)
    seen: set[tuple[str, int | str]] = set()
    for item in trajectories:
        _check(item)
        groups.setdefault(item.prompt_id, len(groups))
        prompt = item.prompt_tokens or 0
        shortest[item.prompt_id] = min(shortest.get(item.prompt_id, prompt), prompt)
        if (item.prompt_id, item.trial) in seen:
            raise ValueError(f"two trajectories of prompt {item.prompt_id!r} are both trial {item.trial}: number the trials")
        seen.add((item.prompt_id, item.trial))
    block = options.block_tokens
    shares = options.share_prompts and options.prefix_cache
    result = []
    for index, item in enumerate(trajectories):
        name = item.prompt_id
        shared = (shortest[name] - 1) // block * block if shares and samples[name] > 1 else 0
        identity = TrajectoryId(prompt=name, uid=f"{step}:{name}", sample=item.trial, step=step)
        result.append(TrajectoryState(index, identity, groups[name], shared, item.prompt_tokens or 0, item.steps))
    return result


def _check(item: Trajectory) -> None:
    name = f"trajectory {item.prompt_id!r} trial {item.trial}"
    if not item.steps:
        raise ValueError(f"{name} has no turns")
    if item.prompt_tokens is None or item.prompt_tokens < 1:
        raise ValueError(f"{name}: prompt_tokens must be at least 1, got {item.prompt_tokens}; see verl_heddle.traces.replayable")
    for number, turn in enumerate(item.steps):
        if turn.output_tokens is None or turn.output_tokens < 1:
            raise ValueError(
                f"{name}, turn {number}: output_tokens must be at least 1, got {turn.output_tokens}; see verl_heddle.traces.replayable"
            )
        tool_s = turn.tool_latency_s or 0.0
        if (turn.input_tokens or 0) < 0 or tool_s < 0 or not isfinite(tool_s) or (turn.ctx_tokens is not None and turn.ctx_tokens < 1):
            raise ValueError(f"{name}, turn {number}: input tokens and tool time must be finite and >= 0, and the context at least 1")
