"""Records one live trajectory: its turns, tools and waits, measured where they happen, into a `Trajectory`.

The recorder is told times, it reads no clock. All times are seconds on one monotonic clock of the worker. Every interval is
measured on its own; nothing is computed as "the rest", so that what a run cannot account for shows up as missing
(`report.attribution.accounted`).

    start ── setup ──> turn 0: route, queue, gen, transport ── tool / between ──> turn 1: ... ── score ──> end
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from verl_heddle.traces.schema import encode
from verl_heddle.trajectory import Decision, Outcome, Trajectory, TrajectoryId, Turn


@dataclass(slots=True)
class EngineTimes:
    """What the engine says of one request. `server_s` is the whole call as the server saw it; queueing is inside it.

    None where the engine does not tell (it keeps no statistics, or the request was aborted).
    """

    server_s: float
    queue_s: float | None = None
    preemptions: int | None = None
    cached_tokens: int | None = None
    parked_s: float = 0.0
    """Before the engine took it, because a weight update was under way."""
    weights: int | None = None
    """Training step of its weights."""


@dataclass(slots=True)
class Legs:
    """The requests of one generation, all together: one, and another for every weight update that ended one before its time. Engines that
    do not tell something count nothing; None where none of them told."""

    number: int = 0
    tokens: int = 0
    context_tokens: int = 0
    """Of the first."""
    asked_s: float = 0.0
    """The first."""
    ended_s: float = 0.0
    """The last."""
    route_s: float = 0.0
    queue_s: float | None = None
    gen_s: float = 0.0
    transport_s: float = 0.0
    paused_s: float = 0.0
    preemptions: int | None = None
    cached_tokens: int | None = None
    """Of the first."""
    reread_tokens: int = 0
    """By the later ones."""
    weights: tuple[int | None, int | None] = (None, None)
    """Of the first and the last."""

    def asked(self, now_s: float) -> None:
        """The next leg asks for a replica; again if that was lost."""
        if self.number:
            self.paused_s += now_s - self.ended_s
            self.ended_s = now_s

    def ended(
        self,
        context_tokens: int,
        output_tokens: int,
        asked_s: float,
        sent_s: float,
        now_s: float,
        times: EngineTimes | None,
        held_s: float = 0.0,
        held_paused_s: float = 0.0,
    ) -> None:
        """A request that asked for a replica at `asked_s` and went to the engine at `sent_s` is back, whole or not.

        Without `times` the whole call counts as generation. `held_s` of the time before `sent_s` it was held back: that is queueing, but
        for `held_paused_s` of it, in which every engine was paused.
        """
        call_s, held_paused_s = now_s - sent_s, min(held_paused_s, held_s)
        server_s = min(times.server_s, call_s) if times else call_s
        parked_s = min(times.parked_s, server_s) if times else 0.0
        queued_s = min(times.queue_s, server_s - parked_s) if times and times.queue_s is not None else None
        if queued_s is not None or held_s > held_paused_s:
            self.queue_s = (self.queue_s or 0.0) + (queued_s or 0.0) + held_s - held_paused_s
        self.route_s += max(0.0, sent_s - asked_s - held_s)
        self.gen_s += max(0.0, server_s - parked_s - (queued_s or 0.0))  # rounding must not make it negative
        self.transport_s += call_s - server_s
        self.paused_s += parked_s + held_paused_s
        cached, weights = (times.cached_tokens, times.weights) if times else (None, None)
        if times and times.preemptions is not None:
            self.preemptions = (self.preemptions or 0) + times.preemptions
        if not self.number:
            self.context_tokens, self.asked_s, self.cached_tokens, self.weights = context_tokens, asked_s, cached, (weights, weights)
        elif cached is not None:
            self.reread_tokens += max(0, context_tokens - cached)
        self.weights = (self.weights[0], weights)
        self.tokens += output_tokens
        self.number, self.ended_s = self.number + 1, now_s


@dataclass(slots=True)
class Recorder:
    """The life of one trajectory so far. `start_s` is on the worker's monotonic clock, `start_unix_s` the same moment on the wall clock."""

    id: TrajectoryId
    start_s: float
    start_unix_s: float
    turns: list[Turn] = field(default_factory=list)
    """Those that ended, in the order of their ends."""
    begun: int = 0
    """Generations that the trajectory has begun; several may be under way at once."""
    output_tokens: int = 0
    first_turn_s: float | None = None
    last_turn_end_s: float | None = None
    scoring_from_s: float | None = None
    """When the agent loop returned and reward and hand-over began."""
    prompt_tokens: int | None = None
    reward: float | None = None
    text: str | None = None
    """The prompt in words, for the predictor; not part of the record."""
    truncated: bool = False
    """Ended by a limit on tokens or turns."""
    listener: Callable[[str], None] | None = None
    """Told the name of each tool as it begins."""
    counter: Callable[[int], None] | None = None
    """Told after each turn, and when an engine says how far a turn has got, how many tokens have been generated in all."""
    counted: int = 0
    """What it was told last."""
    booked: bool = False
    """Its end has been told to everybody; nothing that happens afterwards is part of the record."""
    tool_s: float = 0.0
    """Seconds in tools so far, the sum over its calls."""
    _tools: list[tuple[str, float, float]] = field(default_factory=list)
    """Calls since the last gap was closed; below, those of the gap that was closed last."""
    _gap_tools: list[tuple[str, float, float]] = field(default_factory=list)
    _in_gap: bool = False
    """No turn has been asked for since the last one ended."""

    def turn_asked(self, now_s: float, again: bool = False) -> float | None:
        """The trajectory wants to generate, `again` after it lost its replica: what lies between this and the end of the turn before
        belongs to tools and parsing. Returns the tools' seconds if they are news."""
        fresh = self._in_gap
        tool_s = self._close_gap(now_s) if fresh or again else None
        if self.first_turn_s is None:
            self.first_turn_s = now_s
        return tool_s if fresh else None

    def turn_done(
        self,
        context_tokens: int,
        output_tokens: int,
        decision: Decision,
        asked_s: float,
        sent_s: float,
        now_s: float,
        times: EngineTimes | None,
        held_s: float = 0.0,
        held_paused_s: float = 0.0,
        legs: Legs | None = None,
    ) -> None:
        """The turn is over: its last request as `Legs.ended` takes it. `legs`: those before."""
        legs = legs if legs is not None else Legs()
        legs.ended(context_tokens, output_tokens, asked_s, sent_s, now_s, times, held_s, held_paused_s)
        previous = self.turns[-1] if self.turns else None
        context = legs.context_tokens
        known = (previous.ctx_tokens or 0) + (previous.output_tokens or 0) if previous else context
        first, last = legs.weights
        several = legs.number > 1
        self.turns.append(
            Turn(
                input_tokens=max(0, context - known),
                output_tokens=legs.tokens,
                gen_s=legs.gen_s,
                ctx_tokens=context,
                ctx_reset=context < known,
                route_s=legs.route_s,
                queue_s=legs.queue_s,
                transport_s=legs.transport_s,
                replica=decision.replica,
                priority=decision.priority,
                reason=str(decision.reason),
                predicted_remaining=decision.predicted_remaining,
                predicted_upper=decision.predicted_upper,
                preemptions=legs.preemptions,
                cached_tokens=legs.cached_tokens,
                start_s=legs.asked_s - self.start_s,
                legs=legs.number if several else None,
                paused_s=legs.paused_s or None,
                reread_tokens=legs.reread_tokens if several else None,
                weights=f"{first}-{last}" if first is not None and last is not None else None,
            )
        )
        self.output_tokens += legs.tokens
        self.last_turn_end_s, self._in_gap = now_s, True
        self.count(self.output_tokens)

    def count(self, tokens: int) -> None:
        """At least so many tokens have been generated in all, those of turns under way included."""
        self.counted = max(self.counted, tokens)
        if self.counter is not None:
            self.counter(self.counted)

    def turn_cut(
        self, context_tokens: int, decision: Decision | None, asked_s: float, sent_s: float, now_s: float, legs: Legs | None = None
    ) -> None:
        """The turn was cancelled in the engine, or after `legs` before the next: how long it was there is known, and nothing of its last
        tokens or their queueing."""
        before = legs if legs is not None and legs.number else None
        self.turns.append(
            Turn(
                input_tokens=None,
                output_tokens=before.tokens if before else None,
                gen_s=now_s - sent_s + (before.gen_s if before else 0.0),
                ctx_tokens=before.context_tokens if before else context_tokens,
                route_s=sent_s - asked_s + (before.route_s if before else 0.0),
                queue_s=before.queue_s if before else None,
                transport_s=before.transport_s if before else None,
                replica=decision.replica if decision else None,
                priority=decision.priority if decision else None,
                reason=str(decision.reason) if decision else None,
                start_s=(before.asked_s if before else asked_s) - self.start_s,
                legs=before.number if before else None,
                paused_s=before.paused_s or None if before else None,
            )
        )
        self.output_tokens += before.tokens if before else 0
        self.last_turn_end_s, self._in_gap = now_s, True

    def tool_began(self, name: str) -> None:
        """A tool starts to work for the trajectory."""
        if self.listener is not None:
            self.listener(name)

    def tool_ran(self, name: str, start_s: float, end_s: float) -> None:
        """A tool worked for the trajectory; parallel and nested calls may overlap."""
        self._tools.append((name, start_s, end_s))
        self.tool_s += end_s - start_s

    def finish(self, outcome: Outcome, end_s: float, end_unix_s: float, source: str, workload: str, model: str | None) -> Trajectory:
        """Close the record at `end_s`. `end_unix_s` is that moment read from the wall clock, so that the two clocks check each other."""
        gap_end = end_s if self.scoring_from_s is None else self.scoring_from_s
        self._close_gap(gap_end)
        setup_end = self.first_turn_s if self.first_turn_s is not None else gap_end
        meta = {
            "group": "same_prompt",
            "uid": self.id.uid,
            "step": self.id.step,
            "validate": self.id.validate,
            "outcome": str(outcome),
            "truncated": self.truncated,
            "start_s": self.start_unix_s,
            "end_s": end_unix_s,
            "setup_s": setup_end - self.start_s,
            "score_s": end_s - gap_end,
        }
        return Trajectory(source, workload, self.id.prompt, self.id.sample, self.prompt_tokens, tuple(self.turns), self.reward, model, meta)

    def _close_gap(self, until_s: float) -> float | None:
        """Book the time since the last turn's end: tools (their union, as they may run side by side) and what is between. A gap that was
        closed already becomes longer. Returns the tools' seconds, None if there were none."""
        tools = self._tools if self._in_gap else self._gap_tools + self._tools
        self._gap_tools, self._tools, self._in_gap = tools, [], False
        if not self.turns or self.last_turn_end_s is None:
            return None
        begin = self.last_turn_end_s
        spans = sorted((max(start, begin), min(end, until_s)) for _, start, end in tools)
        tool_s, reached = 0.0, begin
        for start, end in spans:
            tool_s += max(0.0, end - max(start, reached))
            reached = max(reached, end)
        self.turns[-1] = replace(
            self.turns[-1],
            tool="+".join(name for name, _, _ in sorted(tools, key=lambda span: span[1])) or None,
            tool_latency_s=tool_s if tools else None,
            between_s=max(0.0, until_s - begin - tool_s),  # rounding must not make it negative
        )
        return self.turns[-1].tool_latency_s


def append(path: str | os.PathLike[str], trajectories: Iterable[Trajectory]) -> None:
    """Add trajectories to a trace file of plain JSON Lines, all or, if one does not fit the schema, none; makes the folder.

    Raises:
        TraceError: a trajectory does not fit the schema.
        OSError: the disk refuses.
    """
    lines = b"".join(encode(trajectory, file=str(path)) for trajectory in trajectories)
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with open(path, "ab") as file:
        file.write(lines)
