"""The router actor: verl's load-balancer protocol around the pure `Orchestrator`.

verl builds it from `router.yaml` in the task runner; the agent-loop manager then calls `configure` with the user's options. The
workers' clients tell it a trajectory's life (`turn_started` to `trajectory_ended`); the ten methods of verl's `RequestLoadBalancer` stay
complete for everybody else. An orchestrator that raises is replaced, call by call, by verl's own rule.

It is an asyncio actor, because a turn that is held back waits here for its turn (`wait_for_turn`) and a fit runs in a thread beside it;
everything else is plain synchronous code on the one event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from random import Random
from typing import Any

import ray

from verl_heddle.fleet import Replica
from verl_heddle.latency.model import LatencyModel
from verl_heddle.options import Options
from verl_heddle.orchestrator import Orchestrator
from verl_heddle.place.sticky import StickyLeastInflight
from verl_heddle.predict.predictor import Predictor
from verl_heddle.predict.store import StateError
from verl_heddle.trajectory import Decision, Prewarm, Reason, ToolStart, TrajectoryEnd, TurnEnd, TurnStart
from verl_heddle.verl_plugin.calls import ANSWER_S, Promises
from verl_heddle.verl_plugin.router_status import PoolStatus
from verl_heddle.verl_plugin.stopwatch import Stopwatch
from verl_heddle.verl_plugin.voice import say, say_once

TICK_S = 0.01
"""Least time between two looks at what has become due."""

TOLD = ("turn_finished", "turn_withdrawn", "tool_started", "transferred", "trajectory_ended")
"""What may come by `told`."""


class NotConfiguredError(Exception):
    """The servers that a restarted router was built with may sleep or be gone since, and the user's options are not known."""


def _restarted() -> bool:
    """Whether Ray has started this actor again."""
    return ray.is_initialized() and bool(ray.get_runtime_context().was_current_actor_reconstructed)


def alike(servers: Mapping[str, Any], tp: int = 1, slots: int = 256, kv_tokens: int | None = None) -> dict[str, tuple[Replica, Any]]:
    """A fleet of equal replicas, as `HeddleRouter.configure` takes it."""
    return {name: (Replica(name, tp, slots, kv_tokens), handle) for name, handle in servers.items()}


class HeddleRouter(PoolStatus):
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
        self._fleet: dict[str, Replica] = {}
        """What is known of the servers; one that somebody else adds is taken to be like the others."""
        self._known: dict[str, Replica] = {}
        """The same, with those that have left: under `separate_async` they come back."""
        self._paused: set[str] = set()
        """Replicas whose engine a weight update has stopped."""
        self._all_paused = Stopwatch()
        self._latency: LatencyModel | None = None
        self._cap_tokens: int | None = None
        self._orchestrator = Orchestrator(self._options)
        self._verls_rule = StickyLeastInflight(Random())
        """Kept in step with every decision, so that it can take over at any call."""
        self.failures: Counter[str] = Counter()
        self._counts: Counter[str] = Counter(moves=0, replicas_lost=0)
        self._open: dict[str, tuple[TurnStart, str]] = {}
        """Turns under way and their replicas, by request: what of them `_verls_rule` counts."""
        self._held = Promises()
        """To let held turns in, by request."""
        self._orders = Promises()
        """To pre-warm, by trajectory."""
        self._watch: asyncio.Task | None = None
        self._refresh: asyncio.Task | None = None
        self._fit: asyncio.Future | None = None
        self._fit_s = 0.0
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
        self._fleet, self._latency, self._paused = {}, None, set()
        waiting = {request: self._open[request] for request in self._held.waiting if request in self._open}
        self._open.clear()
        self.fleet_is(fleet)
        for request, (turn, replica) in waiting.items():  # this orchestrator knows of none of them
            if replica not in self._servers:
                replica, _ = self._verls_rule.acquire(turn.conversation)
                self._verls_rule.release(replica)  # its end will not be heard of
            self._held.give(request, replica)
        for promises in (self._held, self._orders):
            promises.drop_all()
        if learnt is not None and (why_not := self.learn_again(learnt)) is not None:
            say(f"{why_not}: predictions start cold")

    def configured(self) -> bool:
        """Whether this process has been told the user's options: one that Ray has restarted has not."""
        return self._configured

    def fleet_is(self, fleet: dict[str, tuple[Replica, Any]]) -> None:
        """These replicas, with their actor handles, and no others; by server id. Between steps."""
        self.remove_servers([name for name in {**self._servers, **self._fleet} if name not in fleet])
        fresh = {name: both for name, both in fleet.items() if name not in self._fleet}
        self._fleet = {name: replica for name, (replica, _) in fleet.items()}
        self._tell_times()  # before replicas of a degree join of which nothing is known
        self.add_servers({name: handle for name, (_, handle) in fresh.items()})

    def _tell_times(self) -> None:
        """What is known of the engines, if it is of all degrees in the fleet."""
        latency = self._latency
        known = latency is not None and all(replica.tp in latency.tps for replica in self._fleet.values())
        try:
            self._orchestrator.step_times_known(latency if known else None)
        except Exception as error:
            self._failed("step_times_known", error)

    def handles(self) -> dict[str, Any]:
        """Server id -> actor handle."""
        return dict(self._servers)

    def batch_expected(self, batch: list[TurnStart]) -> None:
        """A step is about to start these."""
        self._tell("batch_expected", batch)

    def step_times_known(self, latency: LatencyModel) -> None:
        """How long the engines take, learnt from the run itself; of use once every degree in the fleet is known."""
        self._latency = latency
        self._tell_times()

    def rest(self, rests: bool) -> None:
        """Resident sets rest, or decide again. Between steps."""
        self._tell("rest", rests)

    def turns_started(self, turns: Sequence[TurnStart], told: Sequence[tuple[str, Any]] = ()) -> list[Decision]:
        """`turn_started` for several turns of one worker, in order. `told`: what the worker has had to tell before, as to `told`.

        Raises:
            RuntimeError: there is no server.
        """
        self.told(told)
        return [self.turn_started(turn) for turn in turns]

    def turn_started(self, turn: TurnStart) -> Decision:
        """Where the turn goes, how urgently, and why.

        Raises:
            RuntimeError: there is no server.
            NotConfiguredError: a restarted process does not know the fleet; the worker does, and goes by verl's rule.
        """
        if self._restarted and not self._configured:
            raise NotConfiguredError("the router has been restarted and not been set up yet")
        try:
            decision = self._orchestrator.turn_started(turn, time.monotonic())
            if decision.replica:
                self._verls_rule.note(turn.conversation, decision.replica)
        except Exception as error:
            if not self._servers:
                raise
            self._failed("turn_started", error)
            replica, _ = self._verls_rule.acquire(turn.conversation)
            decision = Decision(replica, 0, Reason.FALLBACK_POLICY)
        self._open[turn.request] = (turn, decision.replica)
        self._counts["held"] += decision.held
        self._counts["moves"] += decision.reason is Reason.MOVED
        self._orders.drop(turn.trajectory.key)
        self._go_on()
        return decision

    def told(self, events: Sequence[tuple[str, Any]]) -> None:
        """Several events of one worker, in their order: names of methods, and what they are told."""
        for name, what in events:
            if name == "turn_finished":
                self._left(what)
            elif name in TOLD:
                getattr(self, name)(what)

    def paused(self, name: str) -> None:
        """A weight update stops this replica's engine and wipes its contexts; it may have left for the trainer before."""
        self._paused.add(name)
        self._time_pause()
        self._tell("paused", name)

    def resumed(self, name: str) -> None:
        """The replica's engine goes on."""
        self._paused.discard(name)
        self._time_pause()
        self._tell("resumed", name)

    def _time_pause(self) -> None:
        self._all_paused.run(bool(self._servers) and self._paused >= self._servers.keys(), time.monotonic())

    async def wait_for_turn(self, request: str) -> tuple[str | None, float]:
        """Until the held turn of this `TurnStart.request` may go: the replica it goes to, None after `ANSWER_S`: ask again. And for how
        many seconds of this call every engine was paused.

        Raises:
            LookupError: the router knows of no such turn, or no replica is left for it.
        """
        if request not in self._open:
            raise LookupError(f"the router knows of no turn {request}")
        if self._watch is None or self._watch.done():
            self._watch = asyncio.get_running_loop().create_task(self._let_in_in_time())
        paused_s = self._all_paused.total_s(time.monotonic())
        replica: str | None = None
        try:
            replica = await self._held.wait(request, ANSWER_S)
            if not replica:
                raise LookupError(f"turn {request} goes nowhere: it is over, or no replica is left")
        except TimeoutError:
            pass
        return replica, self._all_paused.total_s(time.monotonic()) - paused_s

    async def turn_finished(self, turn: TurnEnd) -> Prewarm | None:
        """The engine is done with the turn, or its worker gave up waiting. Returns what to pre-warm now, if the trajectory moves.

        The answer may take as long as the tool runs: pre-warms on one replica come one after the other. None: not wanted any more.
        """
        self._left(turn)
        key = turn.trajectory.key
        return await self._orders.wait(key) if self._orchestrator.awaits_transfer(key) else None

    def transferred(self, key: str) -> None:
        """A worker's pre-warm is done."""
        self._tell("transferred", key)

    def replica_lost(self, name: str) -> None:
        """A worker found the server dead: it is dropped; its trajectories go elsewhere with their next request."""
        if name in self._servers:
            self._counts["replicas_lost"] += 1
            say(f"replica {name} died; its trajectories go on elsewhere")
            self.remove_servers([name])

    def turn_withdrawn(self, turn: TurnStart) -> None:
        """The worker went away before it heard where to go."""
        if turn.request in self._open:
            _, replica = self._open[turn.request]
            self._left(TurnEnd(turn.trajectory, turn.conversation, replica, turn.turn, 0, completed=False, leg=turn.leg))

    def _left(self, turn: TurnEnd) -> None:
        opened = self._open.pop(turn.request, None)
        if opened is not None:
            self._verls_rule.release(opened[1])
        self._held.drop(turn.request)
        self._tell("turn_finished", turn)

    def tool_started(self, start: ToolStart) -> None:
        """A tool begins."""
        self._tell("tool_started", start)

    def trajectory_ended(self, end: TrajectoryEnd) -> None:
        """The episode is over."""
        self._orders.drop(end.trajectory.key)
        self._tell("trajectory_ended", end)
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
                return self._failed("reprioritised", error)

    async def step_ended(self, step: int) -> dict[str, float]:
        """The batch of a training step is complete: fit anew in a thread until the next; returns counts since the start of the run."""
        self._counts["lost_trajectories"] += self._orchestrator.step_ended(step, time.monotonic())
        for turn, replica in [one for one in self._open.values() if one[0].trajectory.prompt and one[0].trajectory.step < step]:
            del self._open[turn.request]
            self._verls_rule.release(replica)
            self._held.drop(turn.request)
        self._drop_orders()
        self._go_on()
        predictor = self._orchestrator.predictor
        if predictor is not None and self._options.predict.trees and (self._fit is None or self._fit.done()):
            began = time.monotonic()
            self._fit = asyncio.get_running_loop().run_in_executor(None, predictor.fit_job().run)
            self._fit.add_done_callback(lambda fit: self._fitted(fit, began))
        return self.stats()

    def stats(self) -> dict[str, float]:
        """Counts since the start of the run; failures of the orchestrator as `failed_<event>`."""
        result: dict[str, float] = {**self._counts, **{f"failed_{event}": count for event, count in self.failures.items()}}
        result["hold_overdue"] = self._orchestrator.overdue
        result |= self._orchestrator.metrics()
        predictor = self._orchestrator.predictor
        if predictor is not None:
            result |= {"fit_s": self._fit_s, "fit_rows": predictor.model.rows if predictor.model else 0}
        return result

    def learnt(self) -> bytes | None:
        """What the predictor knows, for a checkpoint; None if nobody predicts."""
        predictor = self._orchestrator.predictor
        return None if predictor is None else predictor.to_bytes()

    def learn_again(self, state: bytes) -> str | None:
        """Take up what `learnt` gave; returns why not, if not."""
        if self._orchestrator.predictor is None:
            return None
        try:
            self._orchestrator.predictor = Predictor.from_bytes(state, self._cap_tokens)
        except StateError as error:
            return str(error)
        return None

    def _fitted(self, fit: asyncio.Future, began_s: float) -> None:
        self._fit_s = time.monotonic() - began_s
        try:
            model = fit.result()
            if self._orchestrator.predictor is not None:
                self._orchestrator.predictor.adopt(model)
        except Exception as error:
            self.failures["fit"] += 1
            say_once(f"the length model could not be fitted ({type(error).__name__}: {error}); predictions go on without it")

    def _tell(self, event: str, what: Any) -> None:
        try:
            getattr(self._orchestrator, event)(what, time.monotonic())
        except Exception as error:
            self._failed(event, error)
        self._go_on()

    def _go_on(self) -> None:
        """Let in who may go, and start the pre-warms that may."""
        self._admit()
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
            return self._failed("prewarms", error)
        for order in orders:
            self._orders.give(order.trajectory, order)

    def _admit(self) -> None:
        """Tell those who wait that they may go, and where."""
        try:
            admitted = self._orchestrator.admitted(time.monotonic())
        except Exception as error:
            self._failed("admitted", error)
            admitted = [(request, self._open[request][1]) for request in self._held.waiting if request in self._open]
        for request, replica in admitted:
            if request not in self._open:
                continue
            turn, known = self._open[request]
            if not known and replica:
                self._verls_rule.note(turn.conversation, replica)
            elif not replica and self._servers:
                replica, _ = self._verls_rule.acquire(turn.conversation)
            self._open[request] = (turn, replica)
            self._held.give(request, replica)

    async def _let_in_in_time(self) -> None:
        """While turns are held, let in those whose time has come without any event."""
        while self._orchestrator.holds:
            now = time.monotonic()
            due_s = self._orchestrator.due_s(now)
            await asyncio.sleep(min(max(due_s - now, TICK_S), 1.0, self._options.admission.hold_s / 4))
            try:
                self._orchestrator.tick(time.monotonic())
            except Exception as error:
                self._failed("tick", error)
            self._go_on()

    def _failed(self, event: str, error: Exception) -> None:
        self.failures[event] += 1
        say_once(f"orchestrator raised in {event} ({type(error).__name__}: {error}); verl's own rule decided instead")

    # --- verl's RequestLoadBalancer protocol -----------------------------------------------------------------------------

    def acquire_server(self, request_id: str, **extra: Any) -> tuple[str, Any]:
        """A turn of somebody who does not speak of trajectories (verl's own client): verl's rule."""
        replica, _ = self._verls_rule.acquire(request_id)
        return replica, self._servers[replica]

    def release_server(self, server_id: str, request_id: str | None = None) -> None:
        """Counterpart of `acquire_server`."""
        self._verls_rule.release(server_id)

    def add_servers(self, servers: dict[str, Any]) -> None:
        """Replicas joined."""
        self._servers.update(servers)
        for name in servers:
            self._verls_rule.add(name)
            if name not in self._fleet:
                like = next(iter(self._fleet.values()), Replica(name))
                self._fleet[name] = self._known.get(name) or replace(like, name=name)
        self._known |= self._fleet
        self._orchestrator.replicas_added(self._fleet[name] for name in servers)
        self._time_pause()
        self._go_on()

    def remove_servers(self, server_ids: list[str]) -> None:
        """Replicas left."""
        for name in server_ids:
            self._servers.pop(name, None)
            self._fleet.pop(name, None)
            self._verls_rule.remove(name)
        self._time_pause()
        self._orchestrator.replicas_removed(server_ids)
        self._drop_orders()
        self._go_on()
        if not self._servers:
            self._held.drop_all()  # who waits hears that no replica is left

    def clear_sticky_cache(self) -> dict[str, Any]:
        """Conversations are placed anew at their next turn."""
        self._orchestrator.homes_forgotten()
        self._go_on()
        return {"cleared_entries": self._verls_rule.forget(), "server_loads": dict(self._verls_rule.inflight)}


RouterActor = ray.remote(max_restarts=3, max_concurrency=100_000, enable_task_events=False)(HeddleRouter)  # type: ignore[call-overload]
"""As verl gets it, with room for any number of held turns. A router whose process dies is started again with the same servers; the workers
route alone until the manager, at the next step, finds it back. Three times, because a router that dies more often has a reason. Its calls
are not listed among Ray's tasks: thousands a second would only keep Ray's control process busy."""
