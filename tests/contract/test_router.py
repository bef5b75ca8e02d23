"""Our router against verl's own: the same choices for the same events, and the whole protocol."""

import asyncio
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("verl")

from verl.workers.rollout.router import GlobalRequestLoadBalancer, get_router_handle  # noqa: F401

from verl_heddle.fleet import Replica
from verl_heddle.latency.model import LatencyModel
from verl_heddle.options import Admission, Options, Place, Residents
from verl_heddle.place.sticky import CACHE_SIZE, StickyLeastInflight
from verl_heddle.trajectory import Outcome, Reason, ToolStart, TrajectoryEnd, TrajectoryId, TurnEnd, TurnStart
from verl_heddle.verl_plugin.news import LetIn
from verl_heddle.verl_plugin.router import HeddleRouter, uniform_fleet

EVENTS = st.lists(st.tuples(st.sampled_from("aaaaarrrARc"), st.integers(0, 11)), max_size=200)


@settings(max_examples=200, deadline=None)
@given(EVENTS, st.integers(0, 99), st.booleans())
def test_choice_for_choice_like_verl(events, seed, deterministic):
    """a acquire, r release, A add a server, R remove one, c clear the sticky cache; a table of 4 conversations, so that it overflows."""
    servers = ["s0", "s1", "s2"]
    theirs = GlobalRequestLoadBalancer(dict.fromkeys(servers), max_cache_size=4, full_determinism=deterministic)
    ours = StickyLeastInflight(random.Random(seed), deterministic, cache_size=4)
    for server in servers:
        ours.add(server)
    random.seed(seed)
    for kind, number in events:
        server = f"s{number % 5}"
        if kind == "a" and theirs.get_all_servers():
            assert ours.acquire(f"c{number}")[0] == theirs.acquire_server(f"c{number}")[0]
        elif kind == "r":
            ours.release(server)
            theirs.release_server(server)
        elif kind == "A":
            ours.add(server)
            theirs.add_servers({server: None})
        elif kind == "R" and len(theirs.get_all_servers()) > 1:
            ours.remove(server)
            theirs.remove_servers([server])
        elif kind == "c":
            assert ours.forget() == theirs.clear_sticky_cache()["cleared_entries"]
        assert ours.inflight == theirs.get_status()["servers"]


def test_same_cache_size():
    from verl.workers.rollout import router

    assert router.DEFAULT_ROUTING_CACHE_SIZE == CACHE_SIZE


def turn(sample: int, number: int = 0) -> TurnStart:
    return TurnStart(TrajectoryId("p", "u", sample, 1), f"c{sample}", number, 10, 0)


def test_the_router_serves_trajectories_and_verls_own_clients():
    router = HeddleRouter({"s0": "h0", "s1": "h1", None: None}, {"router_class": "x"})
    router.configure(Options(), False, uniform_fleet({"s0": "h0", "s1": "h1"}, tp=2, slots=8))
    assert router.handles() == {"s0": "h0", "s1": "h1"}
    decision = router.turn_started(turn(0))
    assert decision.reason is Reason.ADMITTED
    server, handle = router.acquire_server("somebody")
    assert server != decision.replica and handle == f"h{server[1]}", "verl's clients see our turns in flight"
    assert router.get_total_inflight() == 2
    asyncio.run(router.turn_finished(TurnEnd(turn(0).trajectory, "c0", decision.replica, 0, 5)))
    router.trajectory_ended(TrajectoryEnd(turn(0).trajectory, Outcome.FINISHED, 5, 1))
    router.release_server(server, request_id="somebody")
    assert router.get_total_inflight() == 0
    router.add_servers({"s2": "h2"})
    router.remove_servers(["s0"])
    assert router.get_all_servers() == ["s1", "s2"] and router.handles() == {"s1": "h1", "s2": "h2"}
    assert router.get_status()["active_servers"] == 2
    assert router.clear_sticky_cache()["cleared_entries"] >= 1


BOUNDED = Options(admission=Admission(per_slot=1.0), residents=Residents(enable=False))
"""One turn in flight per slot."""


def test_what_is_told_along_with_a_question_comes_before_it():
    async def play():
        router = HeddleRouter({"s0": "h0"}, {})
        router.configure(BOUNDED, False, uniform_fleet({"s0": "h0"}, slots=1))
        first = router.turn_started(turn(0))
        end = TurnEnd(turn(0).trajectory, "c0", first.replica, 0, 5)
        (second, third), _ = router.turns_started([turn(1), turn(2)], [("turn_finished", end), ("remove_servers", ["s0"])])
        assert not second.held and third.held, "the place is free; what is no event is not heard"
        router.handle_events(
            [
                ("turn_withdrawn", turn(2)),
                ("turn_withdrawn", turn(1)),
                ("trajectory_ended", TrajectoryEnd(turn(1).trajectory, Outcome.CANCELLED, 0, 0)),
            ]
        )
        assert router.get_total_inflight() == 0 and set(router._orchestrator.inflight.values()) == {0}

    asyncio.run(play())


def test_a_raising_orchestrator_gives_way_to_verls_rule(monkeypatch, capsys):
    router = HeddleRouter({"s0": "h0", "s1": "h1"})
    home = router.turn_started(turn(0)).replica

    def broken(*args):
        raise ZeroDivisionError("policy bug")

    for method in ("turn_started", "turn_finished", "trajectory_ended"):
        monkeypatch.setattr(router._orchestrator, method, broken)
    again = router.turn_started(turn(0, 1))
    assert again.reason is Reason.FALLBACK_POLICY and again.replica == home, "still sticky"
    other = router.turn_started(turn(1))
    assert other.replica != home, "still least in flight"
    asyncio.run(router.turn_finished(TurnEnd(turn(0).trajectory, "c0", home, 1, 5)))
    router.trajectory_ended(TrajectoryEnd(turn(0).trajectory, Outcome.FINISHED, 5, 2))
    failures = {name: count for name, count in router.stats().items() if name.startswith("failed_")}
    assert failures == {"failed_turn_started": 2, "failed_turn_finished": 1, "failed_trajectory_ended": 1}
    assert router.get_inflight_count(home) == 1
    assert capsys.readouterr().err.count("turn_started") == 1, "said once"


def test_another_fleet_takes_over_between_steps_and_is_planned_once_its_times_are_known():
    async def play():
        router = HeddleRouter({"s0": "h0", "s1": "h1"}, {})
        router.configure(Options(place=Place(enable=True)), False, uniform_fleet({"s0": "h0", "s1": "h1"}))
        router.step_times_known(STEP_TIMES)
        first = router.turn_started(turn(0))
        assert first.reason is Reason.PLANNED
        await router.turn_finished(TurnEnd(turn(0).trajectory, "c0", first.replica, 0, 5))
        router.trajectory_ended(TrajectoryEnd(turn(0).trajectory, Outcome.FINISHED, 5, 1))
        mixed = uniform_fleet({"s1": "h1"}) | uniform_fleet({"t0": "g0"}, tp=2)
        router.fleet_is(mixed)
        assert router.handles() == {"s1": "h1", "t0": "g0"} and router.get_total_inflight() == 0
        places = {router.turn_started(turn(sample)).replica for sample in (1, 2)}
        assert places == {"s1", "t0"}
        assert router.stats().get("failed_turn_started") is None
        who = turn(3)
        assert router.turn_started(who).reason is Reason.LEAST_INFLIGHT, "nothing is known of tp=2"
        for sample in (1, 2, 3):
            router.trajectory_ended(TrajectoryEnd(turn(sample).trajectory, Outcome.FINISHED, 5, 1))
        router.step_times_known(LatencyModel.affine(0.01, 0.001, prefill_per_token_s=1e-4, tps=(1, 2), speedup={2: 1.5}))
        assert router.turn_started(turn(4)).reason is Reason.PLANNED
        router.fleet_is(uniform_fleet({"s0": "h0", "s1": "h1"}))
        assert router.turn_started(turn(5)).reason is Reason.PLANNED, "what is known of tp=1 is not forgotten"

    asyncio.run(play())


class Ear:
    """A worker that hears the router's news. Made in a running loop."""

    def __init__(self, router: HeddleRouter, worker: str = "") -> None:
        self.router, self.worker = router, worker
        self.let_in: dict[str, LetIn] = {}
        self.out: list[str | None] = []
        self.task = asyncio.ensure_future(self._listen())

    async def _listen(self) -> None:
        heard = 0
        while True:
            news = await self.router.news(self.worker, self.router._promised.mail.router, heard)
            for number, item in news.items:
                heard = number
                if isinstance(item, LetIn):
                    assert item.request not in self.let_in, "let in twice"
                    self.let_in[item.request] = item
                else:
                    self.out.append(item.trajectory)

    async def hears(self, request: str, within_s: float) -> LetIn:
        """How the turn is let in."""
        async with asyncio.timeout(within_s):
            while request not in self.let_in:
                await asyncio.sleep(0.005)
        return self.let_in[request]


def test_an_empty_pool_is_verls_own_error():
    with pytest.raises(RuntimeError, match="No available servers"):
        HeddleRouter({}).turn_started(turn(0))


def test_a_held_turn_waits_in_the_router_until_another_leaves():
    async def play():
        router = HeddleRouter({"s0": "h0"})
        options = Options(admission=Admission(per_slot=1.0, hold_s=0.2), residents=Residents(enable=False))
        router.configure(options, False, uniform_fleet({"s0": "h0"}, slots=1))
        first, second, third = (router.turn_started(turn(sample)) for sample in range(3))
        assert (first.held, second.held, third.held) == (False, True, True)
        ear = Ear(router)
        await asyncio.sleep(0.01)
        assert not ear.let_in
        await router.turn_finished(TurnEnd(turn(0).trajectory, "c0", "s0", 0, 5))
        assert await ear.hears(turn(1).request, 1.0) == LetIn(turn(1).request, "s0")
        assert turn(2).request not in ear.let_in
        assert (await ear.hears(turn(2).request, 5.0)).replica == "s0", "by the deadline"
        assert router.stats()["held"] == 2 and router.stats()["hold_overdue"] == 1
        router.turn_withdrawn(turn(2))
        router.turn_withdrawn(turn(2))
        await router.turn_finished(TurnEnd(turn(1).trajectory, "c1", "s0", 0, 5))
        assert router.get_total_inflight() == 0

    asyncio.run(play())


def test_a_trajectory_without_a_home_waits_for_whichever_replica_has_room_first():
    """At the end of another, where an idle context is not worth holding any more, and not at all once no replica is left."""

    async def play():
        def stranger(sample):
            one = turn(sample)
            return replace(one, trajectory=replace(one.trajectory, prompt=f"p{sample}"))

        router = HeddleRouter({"s0": "h0", "s1": "h1"})
        router.configure(Options(), False, uniform_fleet({"s0": "h0", "s1": "h1"}, slots=4, kv_tokens=15))
        router.step_times_known(LatencyModel.affine(0.01, 0.001, prefill_per_token_s=0.01))  # the KV cache is read in 0.3 s
        homes = {sample: router.turn_started(stranger(sample)).replica for sample in (0, 1)}
        assert set(homes.values()) == {"s0", "s1"}
        held = [router.turn_started(stranger(sample)) for sample in (2, 3, 4)]
        assert {(one.replica, one.held) for one in held} == {("", True)} and router.get_total_inflight() == 2
        ear = Ear(router)
        second, third, fourth = (stranger(sample).request for sample in (2, 3, 4))
        await asyncio.sleep(0)
        await router.turn_finished(TurnEnd(stranger(1).trajectory, "c1", homes[1], 0, 5))
        router.trajectory_ended(TrajectoryEnd(stranger(1).trajectory, Outcome.FINISHED, 5, 1))
        assert await ear.hears(second, 1.0) == LetIn(second, homes[1], stays=True) and third not in ear.let_in
        await router.turn_finished(TurnEnd(stranger(0).trajectory, "c0", homes[0], 0, 5))
        await asyncio.sleep(0.01)
        assert third not in ear.let_in, "its tool may be quick"
        assert await ear.hears(third, 5.0) == LetIn(third, homes[0], stays=True), "it was not"
        assert ear.out == ["u_0"]
        stats = router.stats()
        assert (stats["residents/admitted"], stats["residents/rent"], stats["residents/most_resident"], stats["held"]) == (4, 1, 2, 3)
        router.remove_servers(["s0", "s1"])
        assert (await ear.hears(fourth, 1.0)).replica is None

    asyncio.run(play())


def test_a_replica_that_is_paused_while_it_is_away_is_given_nobody_when_it_comes_back():
    """`separate_async` takes it out of the pool, pauses it, trains, puts it back, and only then lets it go on."""

    async def play():
        router = HeddleRouter({"s0": "h0", "s1": "h1"})
        router.configure(Options(), False, uniform_fleet({"s0": "h0", "s1": "h1"}, kv_tokens=100))
        router.remove_servers(["s1"])
        router.paused("s1")
        router.add_servers({"s1": "h1"})
        assert {router.turn_started(turn(sample)).replica for sample in range(4)} == {"s0"}
        router.resumed("s1")
        assert router.turn_started(turn(4)).replica == "s1"
        router.paused("s0")
        router.paused("s1")
        assert router.turn_started(turn(5)).held
        ear = Ear(router)
        await asyncio.sleep(0.1)
        router.resumed("s0")
        router.resumed("s1")
        _, replica, paused_s, _ = await ear.hears(turn(5).request, 1.0)
        assert replica in ("s0", "s1") and 0.09 < paused_s < 1.0, "all of them were paused"

    asyncio.run(play())


def test_whoever_may_go_is_let_in_after_every_event(monkeypatch):
    """Not after turns alone: the end of a trajectory, and replicas that come and go, may make room too."""

    async def play():
        router = HeddleRouter({"s0": "h0"})
        router.configure(Options(), False, uniform_fleet({"s0": "h0"}))
        asked = []
        admitted = router._orchestrator.admitted
        monkeypatch.setattr(router._orchestrator, "admitted", lambda now: asked.append(1) or admitted(now))
        who = turn(0)
        router.turn_started(who)
        events = {
            "turn_finished": lambda: router.handle_events([("turn_finished", TurnEnd(who.trajectory, "c0", "s0", 0, 5))]),
            "trajectory_ended": lambda: router.trajectory_ended(TrajectoryEnd(who.trajectory, Outcome.FINISHED, 5, 1)),
            "add_servers": lambda: router.add_servers({"s1": "h1"}),
            "replica_lost": lambda: router.replica_lost("s1"),
            "fleet_is": lambda: router.fleet_is(uniform_fleet({"s2": "h2"})),
        }
        for name, event in events.items():
            asked.clear()
            event()
            assert asked, name
        asked.clear()
        await router.step_ended(1)
        assert asked, "turns of dead workers have left"

    asyncio.run(play())


def test_turns_of_dead_workers_are_not_counted_after_the_next_step():
    async def play():
        router = HeddleRouter({"s0": "h0"})
        router.configure(Options(), False, uniform_fleet({"s0": "h0"}))
        router.turn_started(turn(0))
        router.acquire_server("somebody")
        await router.step_ended(1)
        assert router.get_total_inflight() == 2, "it is of this step"
        stats = await router.step_ended(2)
        assert stats["lost_trajectories"] == 1 and router.get_total_inflight() == 1 and not router._orchestrator.turns
        await router.turn_finished(TurnEnd(turn(0).trajectory, "c0", "s0", 0, 5))
        assert router.get_total_inflight() == 1, "somebody's is left alone"

    asyncio.run(play())


def test_questions_are_answered_between_slices_of_new_priorities(monkeypatch):
    monkeypatch.setattr("verl_heddle.orchestrator.SLICE", 5)

    async def play():
        sent = []
        handle = SimpleNamespace(heddle_priorities=SimpleNamespace(remote=sent.append))
        router = HeddleRouter({"s0": handle})
        router.configure(Options.longest(admission=Admission(per_slot=0)), False, uniform_fleet({"s0": handle}))
        for sample in range(40):
            router.turn_started(turn(sample))
        log, reprioritised = [], router._orchestrator.reprioritised
        monkeypatch.setattr(router._orchestrator, "reprioritised", lambda now: log.append("slice") or reprioritised(now))

        async def worker():
            for sample in range(100, 110):
                router.turn_started(turn(sample))
                log.append("answer")
                await asyncio.sleep(0)

        router.handle_events([("trajectory_ended", TrajectoryEnd(turn(0).trajectory, Outcome.FINISHED, 50_000, 1))])
        assert log == [], "who tells does not wait for it"
        await asyncio.gather(worker(), router._refresh)
        assert log.count("slice") == 8 == len(sent) and "slice slice" not in " ".join(log[: 2 * 8])

    asyncio.run(play())


@pytest.mark.parametrize("slots", [8, 256, 990, 1024, 4096])
def test_admission_knows_how_many_calls_verl_lets_a_server_take(slots):
    from verl.workers.rollout.replica import RolloutReplica

    from verl_heddle.schedule.admission import most_turns
    from verl_heddle.verl_plugin.replicas import HeddleReplica, calls_of

    config = SimpleNamespace(max_num_seqs=slots)
    calls = RolloutReplica.max_concurrency.fget(SimpleNamespace(config=config))
    assert calls_of(config) == calls and HeddleReplica.max_concurrency is RolloutReplica.max_concurrency
    assert slots <= most_turns(slots, calls) <= calls - 16
    for options, taken in ((Options(), 5000), (Options.longest(), 4 * slots)):
        router = HeddleRouter({"s0": "h0"})
        router.configure(options, False, {"s0": (Replica("s0", slots=slots, calls=calls), "h0")})
        held = sum(router.turn_started(turn(sample)).held for sample in range(5000))
        assert held == 5000 - min(taken, most_turns(slots, calls))


def test_between_steps_it_fits_and_what_it_learnt_can_be_kept():
    async def live(router, step):
        for prompt in range(40):
            for sample in range(4):
                who = TrajectoryId(f"p{prompt}", f"{step}:p{prompt}", sample, step)
                for number in range(3):
                    start = TurnStart(who, who.key, number, 100, 50 * number * prompt)
                    replica = router.turn_started(start).replica
                    await router.turn_finished(TurnEnd(who, who.key, replica, number, 50 * prompt + sample + 1))
                    router.tool_started(ToolStart(who, "python"))
                router.trajectory_ended(TrajectoryEnd(who, Outcome.FINISHED, 150 * prompt, 3))

    async def play():
        router = HeddleRouter({"s0": "h0"})
        router.configure(Options.longest(), False, uniform_fleet({"s0": "h0"}, slots=64), 5000)
        await live(router, 0)
        await router.step_ended(0)
        await asyncio.wait_for(router._fit, 60)
        await asyncio.sleep(0)
        assert router.stats()["fit_rows"] >= 200
        again = HeddleRouter({"s0": "h0"})
        again.configure(Options.longest(), False, uniform_fleet({"s0": "h0"}, slots=64), 5000)
        assert again.learn_again(b"nonsense") == "not a stored predictor"
        assert again.learn_again(router.learnt()) is None
        who = TrajectoryId("p39", "1:p39", 0, 1)
        told = [one.turn_started(TurnStart(who, "c", 0, 100, 0)).predicted_remaining for one in (router, again)]
        assert told[0] == told[1] > 2000

    asyncio.run(play())


class Engine:
    """Stands for a server's handle where a router only passes it on."""


STEP_TIMES = LatencyModel.affine(0.01, 0.001, prefill_per_token_s=1e-4)


def planner(servers: int = 3, **place) -> HeddleRouter:
    router = HeddleRouter({f"s{number}": Engine() for number in range(servers)})
    fleet = uniform_fleet(router.handles(), slots=64, kv_tokens=1_000_000)
    router.configure(Options(place=Place(**{"enable": True} | place)), False, fleet, 20_000)
    router.step_times_known(STEP_TIMES)
    return router


async def crowd(router, samples=12):
    """Everybody on s0 (the others come later), each with a first turn done; returns the answers that the workers wait for."""
    router.remove_servers(["s1", "s2"])
    who = [TrajectoryId(f"p{sample}", f"u{sample}", 0, 1) for sample in range(samples)]
    for one in who:
        assert router.turn_started(TurnStart(one, one.key, 0, 100, 0)).replica == "s0"
    router.add_servers({"s1": Engine(), "s2": Engine()})
    asked = {one.key: asyncio.ensure_future(router.turn_finished(TurnEnd(one, one.key, "s0", 0, 500))) for one in who}
    await asyncio.sleep(0)
    return who, asked


def test_moves_are_ordered_one_at_a_time_per_target_and_end_with_the_tool():
    async def play():
        router = planner()
        who, asked = await crowd(router)
        orders = [task.result() for task in asked.values() if task.done() and task.result()]
        waiting = [key for key, task in asked.items() if not task.done()]
        assert sorted(order.replica for order in orders) == ["s1", "s2"], "a target reads one context at a time"
        assert waiting and all(order.priority > 10**9 for order in orders)
        router.transferred(orders[0].trajectory)
        await asyncio.sleep(0)
        begun = [key for key in waiting if asked[key].done()]
        assert len(begun) == 1 and asked[begun[0]].result().replica == orders[0].replica
        still = [one for one in who if one.key in waiting and not asked[one.key].done()]
        if still:  # its tool is back first: it goes all the same, and nobody waits for an order
            decision = router.turn_started(TurnStart(still[0], still[0].key, 1, 700, 500))
            await asyncio.sleep(0)
            assert decision.reason is Reason.MOVED and asked[still[0].key].result() is None
        moved = next(one for one in who if one.key == orders[0].trajectory)
        decision = router.turn_started(TurnStart(moved, moved.key, 1, 700, 500))
        assert (decision.replica, decision.reason) == (orders[0].replica, Reason.MOVED)
        for one in who:
            router.trajectory_ended(TrajectoryEnd(one, Outcome.CANCELLED, 500, 1))
        await asyncio.wait_for(asyncio.gather(*asked.values()), 1.0)
        assert not router._orders.waiting and router.stats()["moves"] >= 1

    asyncio.run(play())


@pytest.mark.parametrize("place", [{"transport": "none"}, {"moves": False}, {"enable": False}])
def test_nobody_waits_for_orders_that_do_not_come(place):
    async def play():
        router = planner(**place)
        who, asked = await crowd(router)
        assert [task.result() for task in asked.values()] == [None] * len(who)
        again = [router.turn_started(TurnStart(one, one.key, 1, 700, 500)).reason for one in who]
        assert (Reason.MOVED in again) == (place == {"transport": "none"})

    asyncio.run(play())


def test_a_lost_replica_is_dropped_once_and_its_trajectories_go_elsewhere(capsys):
    async def play():
        router = planner()
        batch = [TurnStart(TrajectoryId(f"p{n}", f"u{n}", 0, 1), f"u{n}_0", 0, 100, 0) for n in range(12)]
        router.batch_expected(batch)
        homes = {turn.conversation: router.turn_started(turn).replica for turn in batch}
        assert set(homes.values()) == {"s0", "s1", "s2"}
        for turn in batch:
            if homes[turn.conversation] == "s1":
                await router.turn_finished(TurnEnd(turn.trajectory, turn.conversation, "s1", 0, 0, completed=False))
                router.replica_lost("s1")
                assert router.turn_started(turn).replica != "s1"
        assert router.stats()["replicas_lost"] == 1 and router.get_all_servers() == ["s0", "s2"]
        assert router.get_total_inflight() == len(batch)
        assert capsys.readouterr().err.count("s1 died") == 1
        router.configure(Options(), False, uniform_fleet({"s2": router.handles()["s2"]}, slots=64))
        assert router.get_all_servers() == ["s2"]

    asyncio.run(play())


def test_in_its_own_process_all_garbage_is_collected_after_a_step_has_been_answered(monkeypatch):
    import gc

    from verl_heddle.verl_plugin.router import RouterProcess

    before, order = gc.get_threshold(), []

    async def play():
        router = RouterProcess({"s0": "h0"})
        assert gc.get_threshold()[:2] == before[:2] and gc.get_threshold()[2] > 10**6
        monkeypatch.setattr(gc, "collect", lambda: order.append("collected"))
        await router.step_ended(1)
        order.append("answered")
        await asyncio.sleep(0)

    try:
        asyncio.run(play())
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()
    assert order == ["answered", "collected"]
