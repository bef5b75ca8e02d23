"""The manager gets over a router that is late, dead or restarted, and over recoveries that fail. Ray is a fake: calls are made at once."""

from __future__ import annotations

import asyncio
import inspect
from collections import Counter

import pytest

pytest.importorskip("verl")

from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopManagerTQ
from verl_batches import batch

from verl_heddle.fleet import Replica
from verl_heddle.options import Admission, Options
from verl_heddle.traces.columns import Columns
from verl_heddle.trajectory import Outcome, Reason, TrajectoryEnd, TrajectoryId, TurnEnd, TurnStart
from verl_heddle.verl_plugin import manager as managers
from verl_heddle.verl_plugin import router as routers
from verl_heddle.verl_plugin.manager import HeddleAgentLoopManager
from verl_heddle.verl_plugin.router import HeddleRouter, NotConfiguredError, uniform_fleet


class Actor:
    """Stands for an actor's handle: `dead` or `late`, its calls raise when they are got."""

    def __init__(self, target):
        self.target, self.trouble, self.calls = target, None, Counter()

    def __getattr__(self, name):
        actor = self

        class Method:
            @staticmethod
            def remote(*args):
                actor.calls[name] += 1
                if actor.trouble is not None:
                    return actor.trouble
                try:
                    value = getattr(actor.target, name)(*args)
                    return asyncio.run(value) if inspect.iscoroutine(value) else value
                except Exception as error:
                    return error

        return Method


def got(ref, timeout=None):
    if isinstance(ref, Exception):
        raise ref
    return [got(one) for one in ref] if isinstance(ref, list) else ref


class Server:
    async def heddle_facts(self):
        return {"tp": 1, "slots": 4}


class Worker:
    def __init__(self):
        self.fallbacks, self.back = 0, 0

    async def collect(self):
        return Columns(), {"fallback_router": self.fallbacks}, []

    async def router_is_back(self):
        self.back += 1


@pytest.fixture
def made(monkeypatch):
    """(manager, its router's actor, its worker)."""
    monkeypatch.setattr(managers.ray, "get", got)
    monkeypatch.setattr(managers.ray, "wait", lambda refs, num_returns=1, timeout=None: (list(refs), []))
    monkeypatch.setattr(AgentLoopManagerTQ, "generate_sequences", lambda self, prompts: self.dispatched.append(prompts))
    manager = object.__new__(HeddleAgentLoopManager)
    worker = Worker()
    server = Actor(Server())
    router = Actor(HeddleRouter({"s0": server}))
    manager.options, manager.router = Options.longest(admission=Admission(per_slot=1.0)), router
    manager.servers, manager.fleet = {"s0": server}, {}
    manager._deterministic, manager._cap_tokens, manager._samples = False, 20_000, (2, 1)
    manager.learnt = manager._learnt_asked = manager._latency = manager.planner = manager.layouts = None
    manager._fallbacks = manager._silent = manager._replicas_lost = 0
    manager._replicas, manager.sync, manager._paused, manager.rests = 8, True, {}, False
    manager._troubles, manager._visits, manager._plans, manager._router_lost, manager._weights = Counter(), [], False, False, -1
    manager.agent_loop_workers, manager.dispatched = [Actor(worker)], []
    manager._configure_router(1.0)
    return manager, router, worker


def step(manager, number=1):
    """What the trainer's process does for one."""
    manager.generate_sequences(batch(["x"])[0])
    manager.collect()
    manager.step_ended(number, Columns())


def teach(router, prompts=6):
    for number in range(prompts):
        who = TrajectoryId(f"p{number}", f"u{number}", 0, 1)
        router.turn_started(TurnStart(who, who.key, 0, 10, 0))
        asyncio.run(router.turn_finished(TurnEnd(who, who.key, "s0", 0, 500)))
        router.trajectory_ended(TrajectoryEnd(who, Outcome.FINISHED, 500, 1))


def knows(router):
    predictor = router._orchestrator.predictor
    who = TrajectoryId("p0", "v", 0, 2)
    predictor.turn_started(TurnStart(who, who.key, 0, 10, 0))
    return predictor.predict(who.key).median_tokens


def test_a_router_that_was_late_once_keeps_what_it_knows_and_is_not_set_up_again(made):
    manager, router, worker = made
    cold = knows(router.target)
    teach(router.target)
    worker.fallbacks = 3  # since the start of the run: it stays so
    for number in range(1, 6):
        step(manager, number)
    assert router.calls["configure"] == 1 and worker.back == 1 and not manager._router_lost
    assert knows(router.target) != cold
    worker.fallbacks = 4
    step(manager, 6)
    step(manager, 7)
    assert worker.back == 2 and router.calls["configure"] == 1


def test_a_restarted_router_is_told_what_the_one_before_it_had_learnt(made, monkeypatch):
    manager, router, worker = made
    cold = knows(router.target)
    teach(router.target)
    step(manager, 1)
    step(manager, 2)
    warm = knows(router.target)
    monkeypatch.setattr(routers, "_restarted", lambda: True)
    router.target = HeddleRouter({"s0": router})
    worker.fallbacks = 1
    step(manager, 3)
    assert not router.target.configured(), "found out at the end of the step"
    step(manager, 4)
    assert router.target.configured() and worker.back == 1 and router.calls["configure"] == 2
    assert abs(knows(router.target) - warm) < abs(cold - warm) / 4
    assert router.target.turn_started(TurnStart(TrajectoryId("p", "w", 0, 4), "w_0", 0, 10, 0)).reason is Reason.LEAST_INFLIGHT


def test_a_restarted_router_is_told_that_resident_sets_rest(made, monkeypatch):
    manager, router, worker = made
    manager.rest(True)
    monkeypatch.setattr(routers, "_restarted", lambda: True)
    router.target = HeddleRouter({"s0": router})
    worker.fallbacks = 1
    step(manager, 1)
    step(manager, 2)
    assert router.target.configured() and router.calls["rest"] == 2 and router.target._orchestrator._rests
    manager.rest(False)
    assert not router.target._orchestrator._rests


def test_a_restarted_router_that_knows_nothing_decides_nothing(monkeypatch):
    """The worker then goes by verl's rule, with the servers of now: those the router was built with may sleep."""
    monkeypatch.setattr(routers, "_restarted", lambda: True)
    router = HeddleRouter({"s0": "h0", "s1": "h1"})
    who = TurnStart(TrajectoryId("p", "u", 0, 1), "c", 0, 10, 0)
    with pytest.raises(NotConfiguredError):
        router.turns_started([who])
    router.configure(Options(), False, uniform_fleet({"s1": "h1"}))
    assert router.turn_started(who).replica == "s1"


def test_until_it_is_told_a_router_is_verls_and_holds_nobody():
    router = HeddleRouter({"s0": "h0"})
    started = [router.turn_started(TurnStart(TrajectoryId("p", "u", n, 1), f"c{n}", 0, 10, 0)) for n in range(3000)]
    assert not any(one.held or one.priority for one in started) and router.learnt() is None


def test_a_dead_router_is_tried_every_step_and_costs_none(made):
    manager, router, worker = made
    router.trouble = OSError("dead")
    for number in range(1, 4):
        step(manager, number)
    assert len(manager.dispatched) == 3 and worker.back == 0 and manager._router_lost


@pytest.mark.parametrize("what", ["layouts", "router", "workers"])
def test_a_recovery_that_fails_costs_no_step(made, what, monkeypatch, capsys):
    manager, _, _ = made
    if what == "layouts":

        class Layouts:
            def repair(self, weights):
                raise OSError("no memory")

        manager.layouts = Layouts()
    else:
        manager._router_lost = True

        def broken(*args, **more):
            raise OSError(f"no {what}")

        if what == "router":
            monkeypatch.setattr(HeddleAgentLoopManager, "_try_router", broken)
        else:
            monkeypatch.setattr(managers.ray, "wait", broken)
    manager.generate_sequences(batch(["x"])[0])
    assert len(manager.dispatched) == 1
    assert sum(manager._troubles.values()) == 1 and capsys.readouterr().err.count("the step continues") == 1


def test_a_layout_that_cannot_be_told_does_not_raise_where_engines_wait_for_weights(made, monkeypatch):
    manager, _, _ = made
    manager.fleet = {"s0": Replica("s0")}
    monkeypatch.setattr(HeddleAgentLoopManager, "_know", lambda *args: 1 / 0)
    manager._relaid({"s0": object()})
    assert manager._troubles["recovery_layout"] == 1


def test_what_is_lost_with_a_replica_is_said_once(made, capsys):
    manager, router, _ = made
    router.target.add_servers({"s1": "h1", "s2": "h2"})
    router.target.replica_lost("s1")
    for number in (1, 2):
        step(manager, number)
    assert capsys.readouterr().err.count("1 of 8 replicas have died; 7 are left for the rest of the run") == 1
    router.target.replica_lost("s2")
    step(manager, 3)
    assert "2 of 8 replicas have died; 6 are left" in capsys.readouterr().err
