"""Record one live trajectory, with the measured times of its turns, tools and waits, as a `Trajectory`.

Times are arguments; the recorder reads no clock. All times are seconds on one monotonic clock of the worker. Every interval is
measured separately and none is computed as a remainder, so time that a run cannot account for shows up as missing
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
    """Times and counts that the engine reports for one request. `server_s` is the whole call seen from the server, queueing included.

    None if the engine does not report a value (statistics are off, or the request was aborted).
    """

    server_s: float
    queue_s: float | None = None
    preemptions: int | None = None
    cached_tokens: int | None = None
    parked_s: float = 0.0
    """Time before the engine accepted the request because a weight update was in progress."""
    weights: int | None = None
    """Training step of the weights that served it."""


@dataclass(slots=True)
class Legs:
    """Totals over the requests (legs) of one generation: one, plus one for every weight update that interrupted a request.

    Values that an engine does not report count as nothing; a total is None if no leg reported it.
    """

    number: int = 0
    tokens: int = 0
    context_tokens: int = 0
    """Context of the first leg."""
    asked_s: float = 0.0
    """When the first leg asked for a replica."""
    ended_s: float = 0.0
    """When the last leg ended."""
    route_s: float = 0.0
    queue_s: float | None = None
    gen_s: float = 0.0
    transport_s: float = 0.0
    paused_s: float = 0.0
    preemptions: int | None = None
    cached_tokens: int | None = None
    """Prefix-cache hits of the first leg."""
    reread_tokens: int = 0
    """Tokens prefilled again by later legs."""
    weights: tuple[int | None, int | None] = (None, None)
    """Weights of the first and the last leg."""

    def asked(self, now_s: float) -> None:
        """The next leg asks for a replica; also called when it asks again after losing one."""
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
        """A request that asked for a replica at `asked_s` and was sent to the engine at `sent_s` has returned, complete or not.

        Without `times` the whole call counts as generation. The request was held for `held_s` before `sent_s`; that counts as queueing,
        except for `held_paused_s` of it, during which every engine was paused.
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
    """Record of one trajectory so far. `start_s` is on the worker's monotonic clock, `start_unix_s` the same moment on the wall clock."""

    id: TrajectoryId
    start_s: float
    start_unix_s: float
    turns: list[Turn] = field(default_factory=list)
    """Ended turns, in the order in which they ended."""
    begun: int = 0
    """Generations begun; several may be in flight at once."""
    output_tokens: int = 0
    first_turn_s: float | None = None
    last_turn_end_s: float | None = None
    scoring_from_s: float | None = None
    """When the agent loop returned, and scoring and hand-over began."""
    prompt_tokens: int | None = None
    reward: float | None = None
    text: str | None = None
    """Prompt text for the predictor; not part of the record."""
    truncated: bool = False
    """Cut by a limit on tokens or turns."""
    listener: Callable[[str], None] | None = None
    """Called with the name of each tool as it starts."""
    counter: Callable[[int], None] | None = None
    """Called with the total tokens generated, after each turn and whenever an engine reports progress within one."""
    counted: int = 0
    """The last total passed to `counter`."""
    booked: bool = False
    """The end of the trajectory has been reported; later events are not part of the record."""
    tool_s: float = 0.0
    """Tool seconds so far, summed over calls."""
    _tools: list[tuple[str, float, float]] = field(default_factory=list)
    """Tool calls (name, start, end) since the last gap between turns was closed."""
    _gap_tools: list[tuple[str, float, float]] = field(default_factory=list)
    """Tool calls of the gap that was closed last."""
    _in_gap: bool = False
    """The last turn has ended and no other has been requested since."""

    def turn_asked(self, now_s: float, again: bool = False) -> float | None:
        """The trajectory requests a turn, `again` after losing its replica. The time since the end of the previous turn counts as tools
        and parsing. Returns the tool seconds the first time they are known."""
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
        """The turn is over. The arguments describe its last request, as in `Legs.ended`; `legs` holds the earlier ones."""
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
        """At least `tokens` have been generated in total, including turns in flight."""
        self.counted = max(self.counted, tokens)
        if self.counter is not None:
            self.counter(self.counted)

    def turn_cut(
        self, context_tokens: int, decision: Decision | None, asked_s: float, sent_s: float, now_s: float, legs: Legs | None = None
    ) -> None:
        """The turn was cancelled in the engine, or between two legs. The time in the engine is known; the tokens of the last leg and its
        queueing are not."""
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
        """A tool call of the trajectory has started."""
        if self.listener is not None:
            self.listener(name)

    def tool_ran(self, name: str, start_s: float, end_s: float) -> None:
        """A tool call of the trajectory has ended; parallel and nested calls may overlap."""
        self._tools.append((name, start_s, end_s))
        self.tool_s += end_s - start_s

    def finish(self, outcome: Outcome, end_s: float, end_unix_s: float, source: str, workload: str, model: str | None) -> Trajectory:
        """Close the record at `end_s`. `end_unix_s` is the same moment read from the wall clock, so the two clocks can be cross-checked."""
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
        """Add the time since the last turn's end to that turn: tools (their union, since they may run in parallel) and the time between.
        A gap that is already closed is extended. Returns the tool seconds, None if no tool ran."""
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
    """Append trajectories to a plain JSON Lines trace file; if one does not fit the schema, none is written. Creates the folder.

    Raises:
        TraceError: a trajectory does not fit the schema.
        OSError: the file cannot be written.
    """
    lines = b"".join(encode(trajectory, file=str(path)) for trajectory in trajectories)
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with open(path, "ab") as file:
        file.write(lines)
