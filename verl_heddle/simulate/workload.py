"""What moves through the simulation: a trajectory's state between its turns, and the request a turn is while an engine has it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from math import inf, isfinite
from typing import Any

from verl_heddle.simulate.options import EngineOptions
from verl_heddle.trajectory import Outcome, Trajectory, TrajectoryId, Turn


class TrajectoryState:
    """A trajectory under way. `turn` is the index of the turn that runs, or that comes next."""

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
        """Number of its prompt."""
        self.shared = shared
        """Leading tokens that the trajectories of the prompt have in common: whole blocks, and less than the prompt, because an
        engine always computes the last token itself and keeps its block."""
        self.prompt_tokens = prompt_tokens
        self.steps = steps
        self.turn = 0
        self.context = prompt_tokens
        """Tokens so far: prompt, outputs, tool answers."""
        self.known = 0
        """Leading tokens of the context that some engine has computed before."""
        self.generated = 0
        self.request: Request | None = None
        """The turn in an engine; None in a tool."""
        self.warming: Request | None = None
        self.last: Any = None
        """The engine of the previous turn."""
        self.homes: list[int] = []
        """Numbers of the engines that may hold some of its context."""
        self.cancelled = False
        self.stop_at: float = inf
        """Generated tokens at which it is cancelled."""
        self.tool_wait_s = 0.0
        """Seconds it waited for a tool to be free."""
        self.outcome: Outcome | None = None
        self.start_s = 0.0
        self.end_s = 0.0

    def open_turn(self) -> int | None:
        """Take up the next turn's context; returns how many leading tokens of the old one survive if some were dropped, else None."""
        output_before = (self.steps[self.turn - 1].output_tokens or 0) if self.turn else 0
        self.context, kept = next_context(self.steps[self.turn], self.context, output_before, self.prompt_tokens)
        if kept is not None:
            self.known = min(self.known, kept)
        return kept


def next_context(turn: Turn, before: int, output_before: int, prompt_tokens: int) -> tuple[int, int | None]:
    """Context of a turn, and how many leading tokens of the old context it still begins with where that shrank (None: all).

    Args:
        before: tokens after the turn before, its output included; the prompt for the first turn.
        output_before: that output; 0 for the first turn.

    Compaction (`ctx_reset`) keeps the prompt only; a context that shrank otherwise (dropped reasoning) keeps what stood before the last
    output.
    """
    context = turn.ctx_tokens if turn.ctx_tokens is not None else before + (turn.input_tokens or 0)
    if not output_before or (context >= before and not turn.ctx_reset):
        return context, None
    return context, min(context, prompt_tokens if turn.ctx_reset else before - output_before)


def walk(item: Trajectory) -> Iterator[tuple[int, int, int]]:
    """(context, how many of its last tokens are new since the turn before, output) of every turn of a trajectory that `states` accepts.

    New tokens cannot have been computed before the turn starts, not even by a pre-warm; 1 is the least an engine computes.
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
    """KV tokens that the longest single turn needs: what every replica that may serve it must hold."""
    return max(context + output - 1 for item in trajectories for context, _, output in walk(item))


class Request:
    """One turn in an engine (vLLM's word), from the decision where it goes to its last token; also a pre-warm."""

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
        """Tokens to be read before the next one is generated; grows by what was generated when the request leaves its slot."""
        self.asked = self.left = left
        """`asked`: tokens of the turn; `left`: still to generate, as of the last time it took or left a slot."""
        self.floor = 0
        """Tokens `left` at which it is stopped; 0: never before its end."""
        self.told = 0
        """Tokens the policy knows of."""
        self.known = known
        self.shared = trajectory.shared if context > trajectory.shared else 0
        self.prewarm = prewarm
        self.priority = self.order = self.reason = 0
        self.rank: float = 0.0
        """`priority` after ageing, what the waiting queue is ordered by."""
        self.predicted: float | None = None
        self.start_s = self.arrival_s = 0.0
        """When the trajectory wanted the turn; when the engine got it."""
        self.engine = -1
        """Number of the engine that has it."""
        self.waiting = False
        self.since = 0
        """Step of the engine before which it took its slot."""
        self.ticket = -1
        """Identifies the current stay in a slot; -1 outside."""
        self.ends = 0
        """Step of the engine after which the last token is there; while decoding."""
        self.owed = 0
        """Tokens still to prefill; 0 while decoding."""
        self.rate = 0.0
        """Seconds each prefilled token adds to a step."""
        self.queued_s = self.admitted_s = 0.0
        self.queue_s = self.prefill_s = 0.0
        self.preemptions = self.yielded = self.recomputed = 0
        self.cached = -1
        """Prefix tokens found at first admission; -1 before."""


def states(trajectories: Sequence[Trajectory], options: EngineOptions, step: int) -> list[TrajectoryState]:
    """The trajectories as simulation state, in order.

    Raises:
        ValueError: nothing to run, two trajectories with the same prompt and trial, no turns, or numbers missing or out of range
            (`verl_heddle.traces.replayable` fills in what a trace does not say).
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
            raise ValueError(f"{name}, turn {number}: input and tool time must be finite and not negative, the context at least 1")
