"""The simulated cluster: trajectories alternate between a replica and their tools, and a policy says which replica.

Law: a discrete-event loop. An event is a trajectory that wants its next turn (or ends), a replica's next step boundary, a change of the
fleet, or the end of a tool where tools are limited. Simultaneous events: the last two first, then trajectories, then replicas, each in the
order they were scheduled; so a replica starts a step knowing everybody who came at that instant. The policy is told of simulated time only.
Invariants: every `turn_started` gets one `turn_finished`; every trajectory one `trajectory_ended`; after it nothing of it is in
an engine. Cost: O(log n) per event, about five events per turn; plus what the policy costs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from heapq import heappop, heappush
from itertools import count, pairwise
from math import inf, nan
from typing import Any

from verl_heddle.fleet import Replica
from verl_heddle.predict.tools import names
from verl_heddle.schedule.preempt import aged
from verl_heddle.simulate.engine import Engine
from verl_heddle.simulate.options import EngineOptions, FleetChange, Outage
from verl_heddle.simulate.policy import Action, Cancel, Latency, Policy, StopAt
from verl_heddle.simulate.records import TurnLog
from verl_heddle.simulate.workload import Request, TrajectoryState
from verl_heddle.trajectory import Decision, Outcome, ToolStart, TrajectoryEnd, TurnEnd, TurnStart

CHANGE, TURN, WAKE = 0, 1, 2
"""Kinds of events, in the order in which simultaneous ones happen."""


class Cluster:
    """One simulation: `schedule` changes, `run` once, then read `engines`, `log` and the states given."""

    def __init__(
        self,
        fleet: Sequence[Replica],
        latency: Latency,
        policy: Policy,
        options: EngineOptions,
        work: Sequence[TrajectoryState],
        tools_at_once: float = inf,
    ) -> None:
        self.engines: list[Engine] = []
        self.log = TurnLog()
        self.migrations = 0
        """Turns placed on another replica than the trajectory's turn before."""
        self._latency = latency
        self._policy = policy
        self._tool_started = getattr(policy, "tool_started", None)
        self._admitted = getattr(policy, "admitted", None)
        self._due_s = getattr(policy, "due_s", None)
        self._released = getattr(policy, "released", None)
        self._checked_s = inf
        """When a check of the policy's timers is in the calendar."""
        self._reprioritised = getattr(policy, "reprioritised", None)
        self._prewarms = getattr(policy, "prewarms", None)
        self._transferred = getattr(policy, "transferred", None)
        self._held: dict[str, tuple[Request, Decision]] = {}
        """Turns the policy has placed and not yet admitted, by `TurnStart.request`."""
        self._options = options
        self._overhead_s = options.turn_overhead_s
        self._tools_free = tools_at_once
        self._tool_queue: deque[tuple[TrajectoryState, float, float]] = deque()
        """Who waits for a tool, how long that will take, since when."""
        self._work = work
        self._by_key = {state.key: state for state in work}
        self._by_name: dict[str, Engine] = {}
        self._events: list[tuple[float, int, int, Any]] = []
        self._number = count()
        if not fleet:
            raise ValueError("the fleet is empty")
        self._add(fleet)

    # --- the fleet --------------------------------------------------------------------------------------------------------

    def _add(self, fleet: Iterable[Replica], paused: bool = False) -> list[Engine]:
        fresh = []
        for replica in fleet:
            if replica.name in self.log.replicas:
                raise ValueError(f"two replicas are named {replica.name!r}")
            engine = Engine(replica, self._latency, self._options, len(self.engines))
            engine.paused = paused
            self.engines.append(engine)
            self._by_name[replica.name] = engine
            self.log.replicas.append(replica.name)
            fresh.append(engine)
        self._policy.replicas_added([engine.replica for engine in fresh])
        return fresh

    def schedule(self, changes: Iterable[Outage | FleetChange]) -> None:
        """Put outages and fleet changes into the calendar.

        Raises:
            ValueError: an interval ends before it begins, begins before 0, or overlaps another of the same replica.
        """
        changes = list(changes)
        outages = sorted((item for item in changes if isinstance(item, Outage)), key=lambda item: (item.replica, item.start_s))
        for one, other in pairwise(outages):
            if one.replica == other.replica and other.start_s < one.end_s:
                raise ValueError(f"outages of replica {one.replica!r} overlap: {one} and {other}")
        for change in changes:
            if isinstance(change, Outage):
                if not 0 <= change.start_s < change.end_s < inf:
                    raise ValueError(f"an outage needs 0 <= start_s < end_s, got {change}")
                self._at(change.start_s, CHANGE, partial(self._outage, change, True))
                self._at(change.end_s, CHANGE, partial(self._outage, change, False))
            else:
                if not (0 <= change.at_s < inf and change.ready_s < inf):
                    raise ValueError(f"a fleet change needs finite times from 0, got {change}")
                self._at(change.at_s, CHANGE, partial(self._change, change))

    def _outage(self, outage: Outage, begins: bool, now: float) -> None:
        engine = self._by_name.get(outage.replica)
        if engine is None:
            if outage.replica in self.log.replicas:  # it has left meanwhile
                return
            raise ValueError(f"outage of replica {outage.replica!r}, which is not in the fleet")
        if begins:
            engine.pause(now, outage.keep_cache)
        else:
            engine.resume(now)
        self._wake_later(engine)

    def _change(self, change: FleetChange, now: float) -> None:
        late = change.ready_s > now
        for engine in self._add(change.add, paused=late):
            if late:
                self._at(change.ready_s, CHANGE, partial(self._ready, engine))
        leaving = []
        for name in change.remove:
            if name not in self._by_name:
                raise ValueError(f"cannot remove replica {name!r}: it is not in the fleet")
            leaving.append(self._by_name.pop(name))
        self._policy.replicas_removed(change.remove)
        for engine in leaving:
            for request in engine.drain(now):
                self._left(request, now)
            self._wake_later(engine)

    def _ready(self, engine: Engine, now: float) -> None:
        engine.resume(now)
        self._wake_later(engine)

    # --- the loop ---------------------------------------------------------------------------------------------------------

    def _at(self, time: float, kind: int, what: Any) -> None:
        heappush(self._events, (time, kind, next(self._number), what))

    def _wake_later(self, engine: Engine) -> None:
        if engine.next_s != inf:
            heappush(self._events, (engine.next_s, WAKE, next(self._number), engine))

    def run(self, times: Sequence[float]) -> None:
        """Submit every trajectory at its time, seconds, and play until all have ended.

        Raises:
            ValueError: the policy chose a replica that does not exist or is too small.
            RuntimeError: trajectories were lost; a bug of the simulator.
        """
        expected = getattr(self._policy, "batch_expected", None)
        if expected is not None:
            expected([TurnStart(state.id, state.key, 0, state.context, 0) for state in self._work], 0.0)
        for state, time in zip(self._work, times, strict=True):
            state.start_s = state.end_s = time
            self._at(time + self._overhead_s, TURN, state)
        events = self._events
        while events:
            now, kind, _, what = heappop(events)
            if kind == WAKE:
                if what.next_s == now:  # otherwise it was put forward or back since
                    for request in what.finish():
                        self._left(request, now)
                    what.begin()
                    self._wake_later(what)
            elif kind == TURN:
                self._turn(what, now)
            else:
                what(now)
        stuck = sum(state.outcome is None for state in self._work)
        if stuck:
            raise RuntimeError(f"{stuck} trajectories never ended")

    # --- a trajectory -----------------------------------------------------------------------------------------------------

    def _turn(self, state: TrajectoryState, now: float) -> None:
        """The trajectory is back from its tool, or new."""
        if state.outcome is not None:
            return
        if state.warming is not None:
            self._throw_out(state.warming, now)
        if state.turn == len(state.steps):
            self._end(state, Outcome.FINISHED, now)
            return
        kept = state.open_turn()
        if kept is not None:
            for number in state.homes:
                self.engines[number].cache.trim(state.index, kept - state.shared)
        request = Request(state, state.context, state.steps[state.turn].output_tokens or 0, state.known)
        request.start_s = now - self._overhead_s
        request.floor = int(max(0, state.generated + request.asked - state.stop_at))
        state.request = request
        self._place(request, now)

    def _place(self, request: Request, now: float) -> None:
        """Ask the policy where to, and submit."""
        state = request.trajectory
        generated = state.generated + request.asked - request.left
        tool_s = state.steps[state.turn - 1].tool_latency_s if state.turn else None
        turn = TurnStart(state.id, state.key, state.turn, request.context, generated, tool_s)
        decision = self._policy.turn_started(turn, now)
        if decision.held and not decision.replica:
            request.reason = self.log.reason_number(decision.reason)
            request.predicted = decision.predicted_remaining
            self._held[turn.request] = (request, decision)
            request.queued_s = now
            request.engine = -1
            self._let_in(now)
            return
        engine = self._by_name.get(decision.replica)
        if engine is None:
            raise ValueError(f"the policy chose replica {decision.replica!r}, which is not in the fleet")
        capacity, most = engine.replica.kv_tokens, request.context + request.left - 1
        if capacity is not None and most > capacity:
            raise ValueError(f"turn {state.turn} of {state.key} needs KV for {most} tokens, replica {decision.replica} holds {capacity}")
        request.reason = self.log.reason_number(decision.reason)
        request.predicted = decision.predicted_remaining
        if state.last is not engine:
            self.migrations += state.last is not None
            state.last = engine
        request.engine = engine.index
        if decision.held:
            self._held[turn.request] = (request, decision)
            request.queued_s = now
        else:
            self._submit(request, engine, decision.priority, now)
            self._let_in(now)

    def _submit(self, request: Request, engine: Engine, priority: int, now: float) -> None:
        request.priority = priority
        request.arrival_s = now
        rule = self._options.preempt
        request.rank = priority if rule is None else aged(priority, now, rule.ageing_per_s)
        request.order = next(self._number)
        request.engine = engine.index
        homes = request.trajectory.homes
        if engine.index not in homes:
            homes.append(engine.index)
        planned = engine.next_s
        engine.submit(request, now)
        if engine.next_s != planned:
            self._wake_later(engine)

    def _let_in(self, now: float) -> None:
        """Submit the held turns that the policy admits."""
        if self._released is not None:
            for key, replica in self._released(now):
                self._by_name[replica].cache.demote(self._by_key[key].index)
        if self._held and self._admitted is not None:
            for name in self._admitted(now):
                name, chosen = name if isinstance(name, tuple) else (name, None)
                request, decision = self._held.pop(name)
                request.queue_s += now - request.queued_s
                if chosen is not None:
                    state, engine = request.trajectory, self._by_name[chosen]
                    decision = replace(decision, replica=chosen)
                    if state.last is not engine:
                        self.migrations += state.last is not None
                        state.last = engine
                engine = self._by_name.get(decision.replica)
                if engine is None:  # it left meanwhile
                    self._left(request, now)
                else:
                    self._submit(request, engine, decision.priority, now)
        if self._due_s is not None:
            due = self._due_s(now)
            if due < self._checked_s:
                self._checked_s = due
                self._at(max(due, now), CHANGE, self._check)

    def _check(self, now: float) -> None:
        """A timer of the policy may have run out."""
        self._checked_s = inf
        self._policy.tick(now)
        self._let_in(now)

    def _refresh(self, now: float) -> None:
        """Give turns under way the priorities that the policy has changed, until it has no more to tell."""
        if self._reprioritised is None:
            return
        self._take(self._reprioritised(now), now)
        while (due := getattr(self._policy, "refresh_due_s", None)) is not None and due <= now:
            self._take(self._reprioritised(now), now)

    def _take(self, changed: dict[str, dict[str, int]], now: float) -> None:
        for name, table in changed.items():
            engine = self._by_name.get(name)
            for request_name, priority in table.items():
                state = self._by_key[request_name.rpartition(":")[0]]
                request = state.request
                if request is None or engine is None:
                    continue
                if request_name in self._held:
                    self._held[request_name] = (request, replace(self._held[request_name][1], priority=priority))
                    continue
                planned = engine.next_s
                engine.reprioritise(request, priority, now)
                if engine.next_s != planned:
                    self._wake_later(engine)

    def _engine_s(self, request: Request, now: float) -> float:
        return max(0.0, now - request.start_s - self._overhead_s - request.queue_s)

    def _left(self, request: Request, now: float) -> None:
        """The request is out of its engine: with its last token, cancelled, or because its replica leaves."""
        state = request.trajectory
        if request.prewarm:
            if state.warming is request:
                state.warming = None
                if self._transferred is not None:
                    self._transferred(state.key, now)
                    self._warm(now)
            return
        made = request.asked - request.left
        complete = not request.left
        if state.generated + made >= state.stop_at and (request.left or state.turn + 1 < len(state.steps)):
            state.cancelled = True
        name = self.engines[request.engine].replica.name
        actions = self._policy.turn_finished(
            TurnEnd(state.id, state.key, name, state.turn, made - request.told, complete, self._engine_s(request, now)), now
        )
        self._let_in(now)
        request.told = made
        next_s = inf
        if state.cancelled:
            self._record(request, made, 0.0, now)
            self._end(state, Outcome.CANCELLED, now)
        elif complete:
            tool_s = state.steps[state.turn].tool_latency_s or 0.0
            self._record(request, made, tool_s, now)
            if tool_s > 0 and self._tools_free < inf:
                next_s = inf
                self._tool_queue.append((state, tool_s, now))
                self._start_tools(now)
            else:
                next_s = now + tool_s + self._before_next(state)
                if next_s > now:
                    self._at(next_s, TURN, state)
            if self._tool_started is not None:
                for tool in names(state.steps[state.turn - 1].tool):
                    self._tool_started(ToolStart(state.id, tool), now)
        else:
            self._place(request, now)
        if actions:
            self._act(actions, now)
        self._warm(now)
        if next_s == now:
            self._turn(state, now)

    def _before_next(self, state: TrajectoryState) -> float:
        """Seconds between a tool's end and the next turn."""
        return self._overhead_s if state.turn < len(state.steps) else 0.0

    def _start_tools(self, now: float) -> None:
        """Tools that waited run, first come first served, as far as they may."""
        while self._tool_queue and self._tools_free >= 1:
            state, tool_s, since = self._tool_queue.popleft()
            if state.outcome is None:
                state.tool_wait_s += now - since
                self._tools_free -= 1
                self._at(now + tool_s, CHANGE, partial(self._tool_done, state))

    def _tool_done(self, state: TrajectoryState, now: float) -> None:
        self._tools_free += 1
        self._start_tools(now)
        self._at(now + self._before_next(state), TURN, state)

    def _record(self, request: Request, made: int, tool_s: float, now: float) -> None:
        """The turn is over: its row, and what it leaves in the trajectory's state."""
        state = request.trajectory
        generate_s = max(0.0, now - request.start_s - self._overhead_s - request.queue_s - request.prefill_s)
        predicted = nan if request.predicted is None else request.predicted
        what = (state.index, state.turn, request.engine, request.reason, request.priority, predicted)
        times = (request.start_s, now, request.queue_s, request.prefill_s, generate_s, tool_s)
        self.log.add((*what, *times, made, max(0, request.cached), request.recomputed, request.preemptions))
        state.request = None
        state.generated += made
        state.context = request.context
        state.known = request.known
        state.turn += 1

    def _end(self, state: TrajectoryState, outcome: Outcome, now: float) -> None:
        state.outcome = outcome
        state.end_s = now
        actions = self._policy.trajectory_ended(TrajectoryEnd(state.id, outcome, state.generated, state.turn), now)
        self._let_in(now)
        if actions:
            self._act(actions, now)
        self._let_in(now)
        self._refresh(now)
        self._warm(now)

    # --- what the policy orders -------------------------------------------------------------------------------------------

    def _warm(self, now: float) -> None:
        if self._prewarms is not None:
            self._act(self._prewarms(now), now)

    def _act(self, actions: Iterable[Action], now: float) -> None:
        for action in actions:
            state = self._by_key.get(action.trajectory)
            if state is None or state.outcome is not None or state.cancelled:
                continue
            if isinstance(action, Cancel):
                self._cancel(state, now)
                continue
            if isinstance(action, StopAt):
                self._stop_at(state, action.tokens, now)
                continue
            engine = self._by_name.get(action.replica)
            if engine is None:
                raise ValueError(f"the policy pre-warms replica {action.replica!r}, which is not in the fleet")
            capacity = engine.replica.kv_tokens
            if state.request is None and state.warming is None and (capacity is None or state.context <= capacity):
                state.warming = Request(state, state.context, 1, state.known, prewarm=True)
                self._submit(state.warming, engine, action.priority, now)

    def _cancel(self, state: TrajectoryState, now: float) -> None:
        state.cancelled = True
        if state.warming is not None:
            self._throw_out(state.warming, now)
        if state.request is None:
            self._end(state, Outcome.CANCELLED, now)
        elif self._held and (name := f"{state.key}:{state.turn}") in self._held:
            del self._held[name]
            state.request.queue_s += now - state.request.queued_s
            self._left(state.request, now)
        elif self._throw_out(state.request, now):
            self._left(state.request, now)

    def _stop_at(self, state: TrajectoryState, tokens: int, now: float) -> None:
        state.stop_at = min(state.stop_at, tokens)
        request = state.request
        if request is None:
            if state.generated >= state.stop_at and state.turn < len(state.steps):
                self._cancel(state, now)
            return
        floor = int(state.generated + request.asked - state.stop_at)
        engine = self.engines[request.engine]
        planned = engine.next_s
        if floor > 0 and engine.limit(request, floor, now):
            self._cancel(state, now)
        if engine.next_s != planned:
            self._wake_later(engine)

    def _throw_out(self, request: Request, now: float) -> bool:
        """Abort the request; True if it is gone, False if it leaves at the end of its step. A pre-warm is forgotten at once."""
        engine = self.engines[request.engine]
        planned = engine.next_s
        gone = engine.abort(request, now)
        if engine.next_s != planned:
            self._wake_later(engine)
        if request.prewarm:
            request.trajectory.warming = None
        return gone
