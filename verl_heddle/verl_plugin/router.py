"""The router actor: verl's load-balancer protocol around the pure `Orchestrator`.

verl builds it from `router.yaml` in the task runner; the agent-loop manager then calls `configure` with the user's options. Workers report
each trajectory from `turn_started` to `trajectory_ended`. The ten methods of verl's `RequestLoadBalancer` (`router_pool`) serve all other
callers. If the orchestrator raises, verl's own rule decides that call.

An asyncio actor, because every worker keeps one call open for news (`news`) and a fit runs in a thread; the rest is synchronous code on the
one event loop. The orchestrator's tables own the fleet and the turns in flight; the router only keeps the servers' actor handles.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import ray

from verl_heddle.fleet import Replica
from verl_heddle.latency.model import LatencyModel
from verl_heddle.options import Options
from verl_heddle.orchestrator import Orchestrator
from verl_heddle.trajectory import Decision, Prewarm, Reason, ToolStart, TrajectoryEnd, TurnEnd, TurnStart
from verl_heddle.verl_plugin.calls import Promises
from verl_heddle.verl_plugin.log import log, log_once
from verl_heddle.verl_plugin.news import News, Promised
from verl_heddle.verl_plugin.router_learning import Learning
from verl_heddle.verl_plugin.router_pool import ServerPool
from verl_heddle.verl_plugin.stopwatch import Stopwatch

TICK_S = 0.01
"""Shortest sleep between two checks for overdue turns."""

EVENTS = ("turn_begun", "turn_finished", "turn_withdrawn", "tool_started", "transferred", "trajectory_ended")
"""Events accepted by `handle_events`."""

NEVER = 1_000_000_000
"""Threshold of the oldest generation of garbage: no run reaches it."""


class NotConfiguredError(Exception):
    """A restarted router knows neither the user's options nor which of its servers are still there."""


def _restarted() -> bool:
    """Whether Ray has restarted this actor."""
    return ray.is_initialized() and bool(ray.get_runtime_context().was_current_actor_reconstructed)


def uniform_fleet(
    servers: Mapping[str, Any], tp: int = 1, slots: int = 256, kv_tokens: int | None = None
) -> dict[str, tuple[Replica, Any]]:
    """Equal replicas, in the form that `HeddleRouter.configure` takes."""
    return {name: (Replica(name, tp, slots, kv_tokens), handle) for name, handle in servers.items()}


class HeddleRouter(ServerPool, Learning):
    """One per run; Ray serialises its calls.

    Args:
        servers: server id -> actor handle; parked replicas (no address) are left out.
        yaml_config: contents of `router.yaml`: the class name only.
    """

    def __init__(self, servers: dict[str, Any], yaml_config: dict | None = None) -> None:
        self._servers: dict[str, Any] = {}
        self._options = Options(observe=True)
        """Until `configure`: verl's rule, and no turn is held."""
        self._configured = False
        self._restarted = _restarted()
        self._known: dict[str, Replica] = {}
        self._paused: set[str] = set()
        self._all_paused = Stopwatch()
        self._latency: LatencyModel | None = None
        self._cap_tokens: int | None = None
        self._orchestrator = Orchestrator(self._options)
        self.failures: Counter[str] = Counter()
        self._counts: Counter[str] = Counter(held=0, told=0, told_late=0, moves=0, replicas_lost=0)
        self._others = Counter()
        self._promised = Promised()
        self._in_lot = False
        """Inside `handle_events`: dispatch once, after the last event."""
        self._orders = Promises()
        """Pre-warm orders, by trajectory."""
        self._watch: asyncio.Task | None = None
        self._refresh: asyncio.Task | None = None
        self.add_servers({name: handle for name, handle in servers.items() if name is not None})

    def configure(
        self,
        options: Options,
        deterministic: bool,
        fleet: dict[str, tuple[Replica, Any]],
        cap_tokens: int | None = None,
        learnt: bytes | None = None,
    ) -> None:
        """Start over with the user's options and these replicas and actor handles, by server id. Called before the first turn, and after a
        restart with the `learnt` state of the previous process.
        """
        self._configured = True
        self._options, self._cap_tokens = options, cap_tokens
        self._orchestrator = Orchestrator(options, deterministic, cap_tokens)
        self._latency, self._paused = None, set()
        self._others.clear()
        self._promised.put_all_out()  # the new orchestrator has no residents
        self.fleet_is(fleet)
        for request, held in list(self._promised.held.items()):
            replica, _ = self._orchestrator.rule.acquire(held.turn.conversation)
            self._orchestrator.rule.release(replica)  # the new orchestrator ignores the end of this turn
            self._deliver(request, replica)
        self._orders.drop_all()
        if learnt is not None and (why_not := self.learn_again(learnt)) is not None:
            log(f"{why_not}: predictions start cold")

    def configured(self) -> bool:
        """Whether this process has the user's options; after a restart by Ray it has not."""
        return self._configured

    def batch_expected(self, batch: list[TurnStart]) -> None:
        """A step is about to start these turns."""
        self._handle("batch_expected", batch)

    def step_times_known(self, latency: LatencyModel) -> None:
        """Step times learnt from the run; used once they cover every degree in the fleet."""
        self._latency = latency
        self._set_step_times(self._orchestrator.replicas.values())

    def rest(self, rests: bool) -> None:
        """Suspend or resume resident sets. Between steps."""
        self._handle("rest", rests)

    def turns_started(
        self, turns: Sequence[TurnStart], events: Sequence[tuple[str, Any]] = (), worker: str = ""
    ) -> tuple[list[Decision], int]:
        """`turn_started` for several turns of one worker, in order, and the number of the last news (`news`) at the time of the answer.
        `events`: the worker's pending events, handled first.

        Raises:
            RuntimeError: there is no server.
        """
        self.handle_events(events)  # type: ignore[operator]
        decisions = [self.turn_started(turn, worker) for turn in turns]
        self._watch_held()
        return decisions, self._promised.mail.number

    def turn_started(self, turn: TurnStart, worker: str = "") -> Decision:
        """Replica, priority and reason for the turn. News to `worker` follows if the turn is held, or if the trajectory is evicted.

        Raises:
            RuntimeError: there is no server.
            NotConfiguredError: this process was restarted and does not know the fleet yet; the worker falls back to verl's rule.
        """
        if self._restarted and not self._configured:
            raise NotConfiguredError("the router has been restarted and not been set up yet")
        try:
            decision = self._orchestrator.turn_started(turn, time.monotonic())
        except Exception as error:
            if not self._servers:
                raise
            self._fall_back("turn_started", error)
            decision = Decision(self._orchestrator.turns.start_by_rule(turn), 0, Reason.FALLBACK_POLICY)
        if decision.held:
            self._counts["held"] += 1
            self._promised.hold(worker, turn, self._all_paused.total_s(time.monotonic()))
        self._counts["moves"] += decision.reason is Reason.MOVED
        if decision.stays:
            self._promised.stay(worker, turn)
        self._orders.drop(turn.trajectory.key)
        self._dispatch()
        return decision

    @ray.method(num_returns=0)
    def handle_events(self, events: Sequence[tuple[str, Any]]) -> None:
        """Handle one worker's events in order: (method name, argument) pairs."""
        self._in_lot = True
        try:
            for name, what in events:
                if name == "turn_finished":
                    self._close_turn(what)
                elif name in EVENTS:
                    getattr(self, name)(what)
        finally:
            self._in_lot = False
        self._dispatch()

    def turn_begun(self, begun: tuple[TurnStart, str]) -> None:
        """A resident's turn was sent to its replica without asking."""
        turn, replica = begun
        self._counts["told"] += 1
        if replica not in self._servers:  # the replica left meanwhile: the turn restarts elsewhere, and asks
            self._counts["told_late"] += 1
            return
        self._counts["told_late"] += not self._orchestrator.stays(turn.trajectory.key)
        try:
            self._orchestrator.turn_begun(turn, replica, time.monotonic())
        except Exception as error:
            self._fall_back("turn_begun", error)
            if turn.request not in self._orchestrator.turns:
                self._orchestrator.turns.start_by_rule(turn, replica)
        self._dispatch()

    async def news(self, worker: str, router: str, heard: int) -> News:
        """News for a worker that has received those of process `router` up to number `heard`: as soon as there are any, or none after
        `ANSWER_S`, whereupon the worker calls again.

        Raises:
            NotConfiguredError: as `turn_started`.
        """
        if self._restarted and not self._configured:
            raise NotConfiguredError("the router has been restarted and not been set up yet")
        self._watch_held()
        return await self._promised.mail.wait(worker, router, heard)

    def _watch_held(self) -> None:
        """Make sure held turns are admitted at their deadline even if no event arrives."""
        if self._promised.held and (self._watch is None or self._watch.done()):
            self._watch = asyncio.get_running_loop().create_task(self._admit_overdue())

    async def turn_finished(self, turn: TurnEnd) -> Prewarm | None:
        """The engine finished the turn, or its worker gave up waiting. Returns the pre-warm order if the trajectory moves.

        The answer may take as long as the tool runs: pre-warms on one replica are serialised. None: no pre-warm is wanted.
        """
        self._close_turn(turn)
        key = turn.trajectory.key
        return await self._orders.wait(key) if self._orchestrator.awaits_transfer(key) else None

    def transferred(self, key: str) -> None:
        """A worker's pre-warm is done."""
        self._handle("transferred", key)

    def turn_withdrawn(self, turn: TurnStart) -> None:
        """The worker left before it learnt where the turn goes."""
        opened = self._orchestrator.turns.get(turn.request)
        if opened is not None:
            self._close_turn(opened.withdrawn())

    def _close_turn(self, turn: TurnEnd) -> None:
        self._promised.held.pop(turn.request, None)
        try:
            self._orchestrator.turn_finished(turn, time.monotonic())
        except Exception as error:
            self._orchestrator.turns.close(turn.request)
            self._fall_back("turn_finished", error)
        self._dispatch()

    def tool_started(self, start: ToolStart) -> None:
        """A tool call started."""
        self._handle("tool_started", start)

    def trajectory_ended(self, end: TrajectoryEnd) -> None:
        """The episode is over."""
        self._orders.drop(end.trajectory.key)
        self._promised.stays.pop(end.trajectory.key, None)
        self._handle("trajectory_ended", end)
        if self._orchestrator.refresh_due_s is not None and (self._refresh is None or self._refresh.done()):
            self._refresh = asyncio.create_task(self._reprioritise())

    async def _reprioritise(self) -> None:
        """Refresh the priorities of turns in flight when due, a slice at a time, so that questions are answered in between."""
        while (due_s := self._orchestrator.refresh_due_s) is not None:
            await asyncio.sleep(max(0.0, due_s - time.monotonic()))
            try:
                for replica, table in self._orchestrator.reprioritised(time.monotonic()).items():
                    self._counts["reprioritised"] += len(table)
                    self._servers[replica].heddle_priorities.remote(table)
            except Exception as error:
                return self._fall_back("reprioritised", error)

    async def step_ended(self, step: int) -> dict[str, float]:
        """A training step's batch is complete: refit in a thread, and return the counts since the start of the run."""
        self._counts["lost_trajectories"] += self._orchestrator.step_ended(step, time.monotonic())
        for request in [name for name in self._promised.held if name not in self._orchestrator.turns]:
            self._deliver(request, None)
        self._promised.put_out_before(step)
        self._promised.mail.forget_silent()
        self._drop_orders()
        self._dispatch()
        if self._options.predict.trees:
            self._fit_anew()
        return self.stats()

    def stats(self) -> dict[str, float]:
        """Counts since the start of the run; exceptions of the orchestrator as `failed_<event>`."""
        result: dict[str, float] = {**self._counts, **{f"failed_{event}": count for event, count in self.failures.items()}}
        result["hold_overdue"] = self._orchestrator.overdue
        result |= self._orchestrator.metrics()
        return result | self._fit_facts()

    def _handle(self, event: str, what: Any) -> None:
        try:
            getattr(self._orchestrator, event)(what, time.monotonic())
        except Exception as error:
            self._fall_back(event, error)
        self._dispatch()

    def _dispatch(self) -> None:
        """Admit held turns, announce evictions and start pre-warms: after each event or batch of events."""
        if self._in_lot:
            return
        self._admit()
        for key in self._orchestrator.put_out():
            self._promised.put_out(key)
        self._start_prewarms()

    def _drop_orders(self) -> None:
        """Answer the calls that wait for a cancelled pre-warm."""
        for key in self._orders.names:
            if not self._orchestrator.awaits_transfer(key):
                self._orders.drop(key)

    def _start_prewarms(self) -> None:
        try:
            orders = self._orchestrator.prewarms(time.monotonic())
        except Exception as error:
            return self._fall_back("prewarms", error)
        for order in orders:
            self._orders.give(order.trajectory, order)

    def _admit(self) -> None:
        """Tell the workers which held turns run now, and where."""
        admitted: Sequence[tuple[str, str | None]]
        try:
            admitted = self._orchestrator.admitted(time.monotonic())
        except Exception as error:
            self._fall_back("admitted", error)
            admitted = [(request, self._orchestrator.turns.admit_by_rule(request)) for request in self._promised.held]
        for request, replica in admitted:
            self._deliver(request, replica)

    def _deliver(self, request: str, replica: str | None) -> None:
        """Tell the worker its held turn's replica; None: there is none."""
        held = self._promised.held.get(request)
        if held is not None:
            stays = replica is not None and self._orchestrator.stays(held.turn.trajectory.key)
            self._promised.let_in(request, replica, self._all_paused.total_s(time.monotonic()), stays)

    async def _admit_overdue(self) -> None:
        """While turns are held, admit those whose deadline passes without an event."""
        while self._orchestrator.holds:
            now = time.monotonic()
            due_s = self._orchestrator.due_s(now)
            await asyncio.sleep(min(max(due_s - now, TICK_S), 1.0, self._options.admission.hold_s / 4))
            try:
                self._orchestrator.tick(time.monotonic())
            except Exception as error:
                self._fall_back("tick", error)
            self._dispatch()

    def _fall_back(self, event: str, error: Exception) -> None:
        self._orchestrator.turns.recount(self._others)
        self.failures[event] += 1
        log_once(f"orchestrator raised in {event} ({type(error).__name__}: {error}); verl's own rule decided instead")


class RouterProcess(HeddleRouter):
    """The router in its own process. Full garbage collections run between steps only: with 10,000 live trajectories one takes 20 ms, during
    which no turn is answered. Young generations are collected as usual."""

    def __init__(self, servers: dict[str, Any], yaml_config: dict | None = None) -> None:
        super().__init__(servers, yaml_config)
        gc.collect()
        gc.freeze()  # imported modules are never garbage
        young, middle, _ = gc.get_threshold()
        gc.set_threshold(young, middle, NEVER)

    async def step_ended(self, step: int) -> dict[str, float]:
        """See `HeddleRouter.step_ended`; garbage is collected after the answer."""
        asyncio.get_running_loop().call_soon(gc.collect)
        return await super().step_ended(step)


RouterActor = ray.remote(max_restarts=3, max_concurrency=100_000, enable_task_events=False)(RouterProcess)  # type: ignore[call-overload]
"""The actor class that verl gets, with room for any number of held turns. Ray restarts a dead router with the same servers, three times at
most: a router that dies more often has a persistent fault. Meanwhile workers route alone, until the manager finds it back at the next step.
Task events are off: thousands of calls a second would only load Ray's control process.
"""
