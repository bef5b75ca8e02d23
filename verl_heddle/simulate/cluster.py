"""The simulated cluster: trajectories alternate between replicas and tools, and a policy picks the replica of each turn.

Law: a discrete-event loop over the calendar of `stage.py`. The policy sees simulated time only. A turn that the policy holds without
naming a replica has no replica until it is admitted.
Invariants: every `turn_started` gets one `turn_finished`; every trajectory gets one `trajectory_ended`, and no request of it is in an
engine afterwards. Cost: O(log n) per event, about five events per turn, plus the policy.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from heapq import heappop
from math import inf, nan
from numbers import Integral

from verl_heddle.fleet import Replica
from verl_heddle.predict.tools import names
from verl_heddle.schedule.preempt import aged
from verl_heddle.simulate.engine import Engine
from verl_heddle.simulate.options import EngineOptions
from verl_heddle.simulate.policy import Action, Cancel, Latency, Policy, StopAt
from verl_heddle.simulate.stage import CHANGE, TURN, WAKE, Stage
from verl_heddle.simulate.workload import Request, TrajectoryState
from verl_heddle.trajectory import Decision, Outcome, ToolStart, TrajectoryEnd, TurnEnd, TurnStart

MOST_TICKS = 1000
"""Timer ticks of a policy at one simulated time; a policy that exceeds it would never stop."""


class Cluster(Stage):
    """One simulation: call `schedule`, then `run` once, then read `engines`, `log` and the states in `work`."""

    def __init__(
        self,
        fleet: Sequence[Replica],
        latency: Latency,
        policy: Policy,
        options: EngineOptions,
        work: Sequence[TrajectoryState],
        tools_at_once: float = inf,
    ) -> None:
        super().__init__(fleet, latency, policy, options)
        self.migrations = 0
        """Turns placed on a different replica than the trajectory's previous turn."""
        self._tool_started = getattr(policy, "tool_started", None)
        self._admitted = getattr(policy, "admitted", None)
        self._due_s = getattr(policy, "due_s", None)
        self._released = getattr(policy, "released", None)
        self._timer_s = inf
        """The policy's earliest timer in the calendar."""
        self._ticked_s, self._ticks = -inf, 0
        """Time of the last tick, and how many ticks ran at that time."""
        self._reprioritised = getattr(policy, "reprioritised", None)
        self._prewarms = getattr(policy, "prewarms", None)
        self._transferred = getattr(policy, "transferred", None)
        self._now = 0.0
        """Time of the current event."""
        self._held: dict[str, tuple[Request, Decision]] = {}
        """Turns the policy has not yet admitted, by `TurnStart.request`."""
        self._overhead_s = options.turn_overhead_s
        self._tools_free = tools_at_once
        self._tool_queue: deque[tuple[TrajectoryState, float, float]] = deque()
        """Trajectories that wait for a tool, with the seconds the tool takes and the time they joined the queue."""
        self._work = work
        self._by_key = {state.key: state for state in work}

    # --- the loop ---------------------------------------------------------------------------------------------------------

    def run(self, times: Sequence[float]) -> None:
        """Submit every trajectory at its time (seconds) and run until all have ended.

        Raises:
            ValueError: the policy chose a replica that does not exist or is too small, or gave an invalid answer; the message says which.
            RuntimeError: trajectories were lost, which is a bug in the simulator.
        """
        expected = getattr(self._policy, "batch_expected", None)
        if expected is not None:
            expected([TurnStart(state.id, state.key, 0, state.context, 0) for state in self._work], 0.0)
        for state, time in zip(self._work, times, strict=True):
            state.start_s = state.end_s = time
            self._at(time + self._overhead_s, TURN, state)
        while self._events:
            self._next()
        if self._held:
            raise ValueError(f"deadlock: the policy holds {len(self._held)} turns and admits none, and no other event is pending")
        stuck = sum(state.outcome is None for state in self._work)
        if stuck:
            raise RuntimeError(f"{stuck} trajectories never ended")

    def _next(self) -> None:
        """Process the next event in the calendar."""
        self._now, kind, _, what = heappop(self._events)
        if kind == WAKE:
            if what.next_s == self._now:  # otherwise the wake-up was rescheduled, and this entry is stale
                for request in what.finish():
                    self._left(request, self._now)
                what.begin()
                self._wake_later(what)
        elif kind == TURN:
            self._turn(what, self._now)
        else:
            what(self._now)

    # --- a trajectory -----------------------------------------------------------------------------------------------------

    def _turn(self, state: TrajectoryState, now: float) -> None:
        """Start the next turn of a trajectory that is new or whose tool has ended; end the trajectory if there is none."""
        if state.outcome is not None:
            return
        if state.warming is not None:
            self._abort(state.warming, now)
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
        """Ask the policy for a decision, then hold or submit the request."""
        state = request.trajectory
        generated = state.generated + request.asked - request.left
        tool_s = state.steps[state.turn - 1].tool_latency_s if state.turn else None
        turn = TurnStart(state.id, state.key, state.turn, request.context, generated, tool_s)
        decision = self._policy.turn_started(turn, now)
        request.reason = self.log.reason_number(decision.reason)
        request.predicted = decision.predicted_remaining
        if not isinstance(decision.priority, Integral):
            raise ValueError(f"the policy gives turn {turn.request} priority {decision.priority!r}: vLLM priorities are integers")
        if decision.replica or not decision.held:
            self._assign(request, decision.replica)
        if decision.held:
            self._held[turn.request] = (request, decision)
            request.queued_s = now
        else:
            self._submit(request, self.engines[request.engine], decision.priority, now)
        self._let_in(now)

    def _assign(self, request: Request, replica: str) -> None:
        """Assign the request to the replica that the policy chose."""
        state, engine = request.trajectory, self._by_name.get(replica)
        if engine is None:
            raise ValueError(f"the policy chose replica {replica!r}, which is not in the fleet")
        capacity, most = engine.replica.kv_tokens, request.context + request.left - 1
        if capacity is not None and most > capacity:
            raise ValueError(f"turn {state.turn} of {state.key} needs KV for {most} tokens, replica {replica} holds {capacity}")
        if state.last is not engine:
            self.migrations += state.last is not None
            state.last = engine
        request.engine = engine.index

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
        planned_s = engine.next_s
        engine.submit(request, now)
        if engine.next_s != planned_s:
            self._wake_later(engine)

    def _let_in(self, now: float) -> None:
        """Submit the held turns that the policy admits, demote the contexts it releases, and schedule its next timer."""
        if self._released is not None:
            for key, replica in self._released(now):
                if replica in self._by_name:
                    self._by_name[replica].cache.demote(self._by_key[key].index)
        if self._held and self._admitted is not None:
            for admitted in self._admitted(now):
                name, replica = (admitted, None) if isinstance(admitted, str) else admitted
                if name not in self._held:
                    raise ValueError(f"the policy admits {name!r}, which it does not hold")
                request, decision = self._held.pop(name)
                if not (replica or decision.replica):
                    raise ValueError(f"the policy admits {name!r} without a replica, and held it without one")
                request.queue_s += now - request.queued_s
                if replica is not None:
                    self._assign(request, replica)
                engine = self._by_name.get(replica or decision.replica)
                if engine is None:  # the replica left the fleet meanwhile
                    self._left(request, now)
                else:
                    self._submit(request, engine, decision.priority, now)
        if self._due_s is not None and (due := self._due_s(now)) < self._timer_s:
            self._timer_s = due
            self._at(max(due, now), CHANGE, self._tick)

    def _tick(self, now: float) -> None:
        """Call the policy's `tick` if its timer has expired."""
        if now < self._timer_s:  # stale: the timer was moved earlier and has already fired
            return
        self._ticks = self._ticks + 1 if now == self._ticked_s else 0
        self._ticked_s = now
        if self._ticks > MOST_TICKS:
            raise ValueError(f"the policy's due_s is still {now:g} after {MOST_TICKS} calls of tick: it must be later than now, or inf")
        self._timer_s = inf
        self._policy.tick(now)  # type: ignore[attr-defined]
        self._let_in(now)

    def _refresh(self, now: float) -> None:
        """Apply the priorities that the policy has changed to turns in flight, until the policy has no more changes."""
        if self._reprioritised is None:
            return
        self._apply_priorities(self._reprioritised(now), now)
        while (due := getattr(self._policy, "refresh_due_s", None)) is not None and due <= now:
            self._apply_priorities(self._reprioritised(now), now)

    def _apply_priorities(self, changed: dict[str, dict[str, int]], now: float) -> None:
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
                planned_s = engine.next_s
                engine.reprioritise(request, priority, now)
                if engine.next_s != planned_s:
                    self._wake_later(engine)

    def _engine_s(self, request: Request, now: float) -> float:
        return max(0.0, now - request.start_s - self._overhead_s - request.queue_s)

    def _left(self, request: Request, now: float) -> None:
        """Handle a request that left its engine: it finished, was cancelled, or its replica leaves the fleet."""
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
        name = self.engines[request.engine].replica.name if request.engine >= 0 else ""  # held without a replica
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
        """Start waiting tools, first come first served, up to the concurrency limit."""
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
        """Log the finished turn and update the trajectory's state."""
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
        self._refresh(now)
        self._warm(now)

    # --- actions of the policy --------------------------------------------------------------------------------------------

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
            self._abort(state.warming, now)
        if state.request is None:
            self._end(state, Outcome.CANCELLED, now)
        elif self._held and (name := f"{state.key}:{state.turn}") in self._held:
            del self._held[name]
            state.request.queue_s += now - state.request.queued_s
            self._left(state.request, now)
        elif self._abort(state.request, now):
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
        planned_s = engine.next_s
        if floor > 0 and engine.limit(request, floor, now):
            self._cancel(state, now)
        if engine.next_s != planned_s:
            self._wake_later(engine)

    def _abort(self, request: Request, now: float) -> bool:
        """Abort the request: True if it is gone, False if it leaves at the end of its step. A pre-warm is forgotten at once."""
        engine = self.engines[request.engine]
        planned_s = engine.next_s
        gone = engine.abort(request, now)
        if engine.next_s != planned_s:
            self._wake_later(engine)
        if request.prewarm:
            request.trajectory.warming = None
        return gone
