"""The router actor: verl's load-balancer protocol around the pure `Orchestrator`.

verl builds it from `router.yaml` in the task runner; the agent-loop manager then calls `configure` with the user's options. The
workers' clients tell it a trajectory's life (`turn_started` to `trajectory_ended`); the ten methods of verl's `RequestLoadBalancer` stay
complete for everybody else. An orchestrator that raises is replaced, call by call, by verl's own rule.

It is an asyncio actor, because every worker has a call open here that brings it the router's news (`news`) and a fit runs in a thread
beside it; everything else is plain synchronous code on the one event loop. What is in flight, and which replicas there are, the
orchestrator's own tables say; this file keeps the servers' handles.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
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
from verl_heddle.verl_plugin.router_status import PoolStatus
from verl_heddle.verl_plugin.stopwatch import Stopwatch

TICK_S = 0.01
"""Least time between two looks at what has become due."""

EVENTS = ("turn_begun", "turn_finished", "turn_withdrawn", "tool_started", "transferred", "trajectory_ended")
"""What may come by `told`."""


NEVER = 1_000_000_000
"""Collections of younger garbage before one of all: more than a run has."""


class NotConfiguredError(Exception):
    """The servers that a restarted router was built with may sleep or be gone since, and the user's options are not known."""


def _restarted() -> bool:
    """Whether Ray has started this actor again."""
    return ray.is_initialized() and bool(ray.get_runtime_context().was_current_actor_reconstructed)


def uniform_fleet(
    servers: Mapping[str, Any], tp: int = 1, slots: int = 256, kv_tokens: int | None = None
) -> dict[str, tuple[Replica, Any]]:
    """A fleet of equal replicas, as `HeddleRouter.configure` takes it."""
    return {name: (Replica(name, tp, slots, kv_tokens), handle) for name, handle in servers.items()}


class HeddleRouter(PoolStatus, Learning):
    """One per run; Ray serialises its calls.

    Args:
        servers: server id -> actor handle; parked replicas (no address) are left out.
        yaml_config: contents of `router.yaml`, which holds the class name only.
    """

    def __init__(self, servers: dict[str, Any], yaml_config: dict | None = None) -> None:
        self._servers: dict[str, Any] = {}
        self._options = Options(observe=True)
        """verl's rule, and nobody is held, until `configure`."""
        self._configured = False
        self._restarted = _restarted()
        self._known: dict[str, Replica] = {}
        """What is known of the servers, those included that have left: under `separate_async` they come back."""
        self._paused: set[str] = set()
        """Replicas whose engine a weight update has stopped."""
        self._all_paused = Stopwatch()
        self._latency: LatencyModel | None = None
        self._cap_tokens: int | None = None
        self._orchestrator = Orchestrator(self._options)
        self.failures: Counter[str] = Counter()
        self._counts: Counter[str] = Counter(held=0, told=0, told_late=0, moves=0, replicas_lost=0)
        self._others = Counter()
        self._promised = Promised()
        self._in_lot = False
        """More events have come at the same time."""
        self._orders = Promises()
        """To pre-warm, by trajectory."""
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
        """Start over with the user's options and with these replicas and actor handles, by server id. Called before the first turn, and
        after a restart, with what the process before it had `learnt`.
        """
        self._configured = True
        self._options, self._cap_tokens = options, cap_tokens
        self._orchestrator = Orchestrator(options, deterministic, cap_tokens)
        self._latency, self._paused = None, set()
        self._others.clear()
        self._promised.put_all_out()  # this orchestrator knows of nobody
        self.fleet_is(fleet)
        for request, held in list(self._promised.held.items()):
            replica, _ = self._orchestrator.rule.acquire(held.turn.conversation)
            self._orchestrator.rule.release(replica)  # its end will not be heard of
            self._deliver(request, replica)
        self._orders.drop_all()
        if learnt is not None and (why_not := self.learn_again(learnt)) is not None:
            log(f"{why_not}: predictions start cold")

    def configured(self) -> bool:
        """Whether this process has been told the user's options: one that Ray has restarted has not."""
        return self._configured

    def fleet_is(self, fleet: dict[str, tuple[Replica, Any]]) -> None:
        """These replicas, with their actor handles, and no others; by server id. Between steps."""
        before = self._orchestrator.replicas
        self.remove_servers([name for name in {**self._servers, **before} if name not in fleet])
        self._known |= {name: replica for name, (replica, _) in fleet.items()}
        self._set_step_times([replica for replica, _ in fleet.values()])  # before replicas of a degree join of which nothing is known
        self.add_servers({name: handle for name, (_, handle) in fleet.items() if name not in before})

    def _set_step_times(self, fleet: Iterable[Replica]) -> None:
        """What is known of the engines, if it is of all degrees in the fleet."""
        latency = self._latency
        known = latency is not None and all(replica.tp in latency.tps for replica in fleet)
        try:
            self._orchestrator.step_times_known(latency if known else None)
        except Exception as error:
            self._fall_back("step_times_known", error)

    def handles(self) -> dict[str, Any]:
        """Server id -> actor handle."""
        return dict(self._servers)

    def batch_expected(self, batch: list[TurnStart]) -> None:
        """A step is about to start these."""
        self._handle("batch_expected", batch)

    def step_times_known(self, latency: LatencyModel) -> None:
        """How long the engines take, learnt from the run itself; of use once every degree in the fleet is known."""
        self._latency = latency
        self._set_step_times(self._orchestrator.replicas.values())

    def rest(self, rests: bool) -> None:
        """Resident sets rest, or decide again. Between steps."""
        self._handle("rest", rests)

    def turns_started(
        self, turns: Sequence[TurnStart], events: Sequence[tuple[str, Any]] = (), worker: str = ""
    ) -> tuple[list[Decision], int]:
        """`turn_started` for several turns of one worker, in order, and the number of the last news (`news`) as of the answer. `told`: what
        the worker has had to tell before, as to `told`.

        Raises:
            RuntimeError: there is no server.
        """
        self.handle_events(events)  # type: ignore[operator]
        decisions = [self.turn_started(turn, worker) for turn in turns]
        self._watch_held()
        return decisions, self._promised.mail.number

    def turn_started(self, turn: TurnStart, worker: str = "") -> Decision:
        """Where the turn goes, how urgently, and why; `worker` hears of it if that changes, or later if the turn is held.

        Raises:
            RuntimeError: there is no server.
            NotConfiguredError: a restarted process does not know the fleet; the worker does, and goes by verl's rule.
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
        """Several events of one worker, in their order: names of methods, and what they are told."""
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
        """A turn of a trajectory that stays is on its way to its replica."""
        turn, replica = begun
        self._counts["told"] += 1
        if replica not in self._servers:  # it left meanwhile: the turn begins again elsewhere, and asks
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

    def paused(self, name: str) -> None:
        """A weight update stops this replica's engine and wipes its contexts; it may have left for the trainer before."""
        self._paused.add(name)
        self._time_pause()
        self._handle("paused", name)

    def resumed(self, name: str) -> None:
        """The replica's engine goes on."""
        self._paused.discard(name)
        self._time_pause()
        self._handle("resumed", name)

    def _time_pause(self) -> None:
        self._all_paused.run(bool(self._servers) and self._paused >= self._servers.keys(), time.monotonic())

    async def news(self, worker: str, router: str, heard: int) -> News:
        """What there is to tell a worker that has heard the news up to number `heard` of the process `router`: as soon as there is some, or
        after `ANSWER_S`; then it asks again.

        Raises:
            NotConfiguredError: as `turn_started`.
        """
        if self._restarted and not self._configured:
            raise NotConfiguredError("the router has been restarted and not been set up yet")
        self._watch_held()
        return await self._promised.mail.wait(worker, router, heard)

    def _watch_held(self) -> None:
        """See to it that those held are let in in time, where no event does it."""
        if self._promised.held and (self._watch is None or self._watch.done()):
            self._watch = asyncio.get_running_loop().create_task(self._admit_overdue())

    async def turn_finished(self, turn: TurnEnd) -> Prewarm | None:
        """The engine is done with the turn, or its worker gave up waiting. Returns what to pre-warm now, if the trajectory moves.

        The answer may take as long as the tool runs: pre-warms on one replica come one after the other. None: not wanted any more.
        """
        self._close_turn(turn)
        key = turn.trajectory.key
        return await self._orders.wait(key) if self._orchestrator.awaits_transfer(key) else None

    def transferred(self, key: str) -> None:
        """A worker's pre-warm is done."""
        self._handle("transferred", key)

    def replica_lost(self, name: str) -> None:
        """A worker found the server dead: it is dropped; its trajectories go elsewhere with their next request."""
        if name in self._servers:
            self._counts["replicas_lost"] += 1
            log(f"replica {name} died; its trajectories go on elsewhere")
            self.remove_servers([name])

    def turn_withdrawn(self, turn: TurnStart) -> None:
        """The worker went away before it heard where to go."""
        opened = self._orchestrator.turns.get(turn.request)
        if opened is not None:
            replica = opened.replica
            self._close_turn(TurnEnd(turn.trajectory, turn.conversation, replica, turn.turn, 0, completed=False, leg=turn.leg))

    def _close_turn(self, turn: TurnEnd) -> None:
        self._promised.held.pop(turn.request, None)
        try:
            self._orchestrator.turn_finished(turn, time.monotonic())
        except Exception as error:
            self._orchestrator.turns.close(turn.request)
            self._fall_back("turn_finished", error)
        self._dispatch()

    def tool_started(self, start: ToolStart) -> None:
        """A tool begins."""
        self._handle("tool_started", start)

    def trajectory_ended(self, end: TrajectoryEnd) -> None:
        """The episode is over."""
        self._orders.drop(end.trajectory.key)
        self._promised.stays.pop(end.trajectory.key, None)
        self._handle("trajectory_ended", end)
        if self._orchestrator.refresh_due_s is not None and (self._refresh is None or self._refresh.done()):
            self._refresh = asyncio.create_task(self._reprioritise())

    async def _reprioritise(self) -> None:
        """Give turns under way their new priorities, when it is time, a slice of them at a time: questions are answered in between."""
        while (due_s := self._orchestrator.refresh_due_s) is not None:
            await asyncio.sleep(max(0.0, due_s - time.monotonic()))
            try:
                for replica, table in self._orchestrator.reprioritised(time.monotonic()).items():
                    self._counts["reprioritised"] += len(table)
                    self._servers[replica].heddle_priorities.remote(table)
            except Exception as error:
                return self._fall_back("reprioritised", error)

    async def step_ended(self, step: int) -> dict[str, float]:
        """The batch of a training step is complete: fit anew in a thread until the next; returns counts since the start of the run."""
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
        """Counts since the start of the run; failures of the orchestrator as `failed_<event>`."""
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
        """Let in who may go, say who does not stay, and start the pre-warms that may: after each event, or each lot of events."""
        if self._in_lot:
            return
        self._admit()
        for key in self._orchestrator.put_out():
            self._promised.put_out(key)
        self._start_prewarms()

    def _drop_orders(self) -> None:
        """Pre-warms that will not come are not waited for."""
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
        """Tell those who wait that they may go, and where."""
        admitted: Sequence[tuple[str, str | None]]
        try:
            admitted = self._orchestrator.admitted(time.monotonic())
        except Exception as error:
            self._fall_back("admitted", error)
            admitted = [(request, self._orchestrator.turns.admit_by_rule(request)) for request in self._promised.held]
        for request, replica in admitted:
            self._deliver(request, replica)

    def _deliver(self, request: str, replica: str | None) -> None:
        """The held turn goes there; None: nowhere."""
        held = self._promised.held.get(request)
        if held is not None:
            stays = replica is not None and self._orchestrator.stays(held.turn.trajectory.key)
            self._promised.let_in(request, replica, self._all_paused.total_s(time.monotonic()), stays)

    async def _admit_overdue(self) -> None:
        """While turns are held, let in those whose time has come without any event."""
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

    # --- the fleet, and the rest of verl's RequestLoadBalancer protocol in `router_status` ---------------------------------

    def add_servers(self, servers: dict[str, Any]) -> None:
        """Replicas joined; one of which nothing is known is taken to be like the others."""
        self._servers.update(servers)
        like = next(iter(self._orchestrator.replicas.values()), Replica(""))
        for name in servers:
            self._known.setdefault(name, replace(like, name=name))
        self._orchestrator.replicas_added(self._known[name] for name in servers)
        self._time_pause()
        self._dispatch()

    def remove_servers(self, server_ids: list[str]) -> None:
        """Replicas left."""
        for name in server_ids:
            self._servers.pop(name, None)
            self._others.pop(name, None)
        self._time_pause()
        self._orchestrator.replicas_removed(server_ids)
        self._drop_orders()
        self._dispatch()
        if not self._servers:
            for request in list(self._promised.held):
                self._deliver(request, None)

    def clear_sticky_cache(self) -> dict[str, Any]:
        """Conversations are placed anew at their next turn."""
        cleared = self._orchestrator.homes_forgotten()
        self._dispatch()
        return {"cleared_entries": cleared, "server_loads": self._orchestrator.inflight}


class RouterProcess(HeddleRouter):
    """The router in a process of its own, in which Python collects all its garbage between steps: with 10,000 trajectories under way that
    takes 20 ms, in which no turn is answered. Young garbage is collected as usual."""

    def __init__(self, servers: dict[str, Any], yaml_config: dict | None = None) -> None:
        super().__init__(servers, yaml_config)
        gc.collect()
        gc.freeze()  # what has been imported stays
        young, middle, _ = gc.get_threshold()
        gc.set_threshold(young, middle, NEVER)

    async def step_ended(self, step: int) -> dict[str, float]:
        """See `HeddleRouter.step_ended`; the garbage goes after the answer."""
        asyncio.get_running_loop().call_soon(gc.collect)
        return await super().step_ended(step)


RouterActor = ray.remote(max_restarts=3, max_concurrency=100_000, enable_task_events=False)(RouterProcess)  # type: ignore[call-overload]
"""As verl gets it, with room for any number of held turns. A router whose process dies is started again with the same servers; the workers
route alone until the manager, at the next step, finds it back. Three times, because a router that dies more often has a reason. Its calls
are not listed among Ray's tasks: thousands a second would only keep Ray's control process busy."""
