"""Turns that are told instead of asked: which they are, that each is counted once where it runs, and what happens when the ground is gone.

Client, link, router and orchestrator are the real ones; engines and Ray are fakes (rig.py). Calls take random times on their way, so that
news, answers and turns overtake each other.
"""

from __future__ import annotations

import asyncio
import pickle
from collections import Counter
from random import Random
from types import SimpleNamespace

import pytest

pytest.importorskip("verl")

from ray.exceptions import ActorDiedError
from rig import FakeActor, Rig

from verl_heddle.options import Admission, Deadlines, Options, Place, Residents
from verl_heddle.trajectory import Decision, Outcome, Reason, TrajectoryEnd, TrajectoryId, TurnEnd, TurnStart
from verl_heddle.verl_plugin.client import HeddleAsyncClient
from verl_heddle.verl_plugin.link import Link
from verl_heddle.verl_plugin.news import LetIn, Mailboxes, News, PutOut
from verl_heddle.verl_plugin.router import HeddleRouter, uniform_fleet

OPTIONS = Options(admission=Admission(hold_s=20.0), deadlines=Deadlines(router_s=5.0))


async def episode(rig: Rig, uid: str, turns: int, tokens: int = 3, tool_s: float = 0.002, sample: int = 0) -> list[str]:
    """Reasons of its turns."""
    recorder = rig.start(uid, sample)
    for number in range(turns):
        if number:
            await asyncio.sleep(tool_s)
        await rig.turn(uid, tokens)
    rig.end(recorder, turns)
    return [str(turn.reason) for turn in recorder.turns]


def watch_questions(rig: Rig, monkeypatch) -> list[str]:
    """Requests that are asked for from now on."""
    asked, answer = [], rig.router.turn_started
    monkeypatch.setattr(rig.router, "turn_started", lambda turn, worker: asked.append(turn.request) or answer(turn, worker))
    return asked


def test_a_resident_is_asked_for_once_and_its_turns_are_counted_where_they_run(monkeypatch):
    async def play() -> None:
        rig = Rig(OPTIONS, engines=2, slots=8)
        asked = watch_questions(rig, monkeypatch)
        reasons = await asyncio.gather(*(episode(rig, f"u{number}", 6) for number in range(4)))
        assert sorted(asked) == [f"u{number}_0:0" for number in range(4)]
        assert reasons == [["admitted", *["sticky"] * 5]] * 4
        await rig.settled()
        assert rig.router.stats()["told"] == 20 and rig.router.stats()["told_late"] == 0
        assert rig.router._orchestrator.counts == {Reason.ADMITTED: 4, Reason.STICKY: 20}
        long = asyncio.ensure_future(episode(rig, "long", 2, tokens=50))
        await asyncio.sleep(0.085)
        assert rig.router.get_total_inflight() == 1, "its second turn was told of"
        await long

    asyncio.run(play())


@pytest.mark.parametrize(
    "options",
    [
        Options(observe=True),
        Options.longest(),
        Options(residents=Residents(enable=False)),
        Options.longest(residents=Residents(enable=True)),
    ],
)
def test_where_the_next_turn_may_be_another_every_turn_is_asked_for(options, monkeypatch):
    """verl's own rule forgets, predictions change priorities, a bound on admission may hold a turn."""

    async def play() -> None:
        rig = Rig(options, engines=2, slots=8)
        asked = watch_questions(rig, monkeypatch)
        await asyncio.gather(*(episode(rig, f"u{number}", 3) for number in range(3)))
        assert len(asked) == 9 and rig.router.stats().get("told", 0) == 0

    asyncio.run(play())


def test_a_trajectory_that_was_put_out_asks_again(monkeypatch):
    """Contexts are held for no time at all here where somebody waits: who is in a tool call loses its place to him."""

    async def play() -> None:
        rig = Rig(OPTIONS, slots=8, kv_tokens=20)
        rig.router._orchestrator.residents.hold("s0", 0.0)
        asked = watch_questions(rig, monkeypatch)
        await asyncio.gather(*(episode(rig, f"u{number}", 3, tool_s=0.05) for number in range(6)))
        await rig.settled()
        stats = rig.router.stats()
        evicted = stats["residents/rent"] + stats["residents/full"]
        assert stats["residents/rent"] > 2 and len(asked) == 6 + evicted, "once for each eviction"
        assert stats["told"] + len(asked) == 18

    asyncio.run(play())


class Delays:
    """Delays: mostly short, some longer than a tool call."""

    def __init__(self, seed: int) -> None:
        self._rng = Random(seed)

    def __call__(self) -> float:
        return self._rng.choice((0.0005, 0.001, 0.002, 0.02))


@pytest.mark.parametrize("seed", range(6))
def test_however_calls_overtake_each_other_every_turn_is_counted_once(seed, monkeypatch):
    """Evictions, weight updates, replicas that leave and come back, trajectories that are cancelled: nothing is left or counted twice.
    After each event the router counts in flight what its open turns say."""
    monkeypatch.setattr("verl_heddle.verl_plugin.news.ANSWER_S", 0.05)

    async def play() -> None:
        rng = Random(seed)
        rig = Rig(OPTIONS, engines=3, slots=8, kv_tokens=60, client=HeddleAsyncClient, delay_s=Delays(seed))
        mind = rig.router._orchestrator
        dispatch = rig.router._dispatch

        def checked() -> None:
            dispatch()
            placed = Counter(opened.replica for opened in mind.turns)
            assert mind.inflight == {name: placed[name] for name in rig.router._servers}
            assert sum(home.running for home in mind.residents._homes.values()) <= len(mind.turns)

        monkeypatch.setattr(rig.router, "_dispatch", checked)

        async def life(number: int) -> None:
            try:
                await episode(rig, f"u{number}", rng.randint(1, 8), rng.randint(1, 30), rng.choice((0.001, 0.01, 0.04)), number)
            except asyncio.CancelledError:
                rig.end_cancelled(f"u{number}", number)
                raise

        lives = [asyncio.ensure_future(life(number)) for number in range(30)]
        for _ in range(40):
            await asyncio.sleep(0.02)
            kind, name = rng.choice("phrc"), f"s{rng.randrange(1, 3)}"
            if kind == "p":  # a weight update
                rig.router.paused(name)
                rig.engines[name].updates += 1
                await asyncio.sleep(0.005)
                rig.router.resumed(name)
            elif kind == "h":
                mind.residents.hold("s0", rng.choice((0.0, 0.01)))
            elif kind == "r" and name in rig.router._servers:  # it leaves for the trainer; what runs there ends
                handle = rig.router._servers[name]
                rig.router.remove_servers([name])
                rig.engines[name].updates += 1
                while any(opened.replica == name for opened in mind.turns):
                    await asyncio.sleep(0.01)
                rig.router.add_servers({name: handle})
            elif kind == "c":
                lives[rng.randrange(len(lives))].cancel()
        await asyncio.wait_for(asyncio.gather(*lives, return_exceptions=True), 30)
        assert not [one for one in lives if not one.cancelled() and one.exception()]
        await asyncio.sleep(0.3)
        await rig.settled()
        assert not rig.router.failures and not +mind.residents.now and rig.router.stats()["told"] > 30

    asyncio.run(play())


def test_a_worker_that_goes_away_before_it_hears_where_its_turn_was_let_in_leaves_no_count():
    router = HeddleRouter({"s0": "h0"})
    router.configure(Options(), False, uniform_fleet({"s0": "h0"}, slots=8, kv_tokens=100))
    first, later = (TrajectoryId(name, name, 0, 1) for name in "uv")
    home = router.turn_started(TurnStart(first, "c", 0, 90, 0), "w").replica
    assert router.turn_started(TurnStart(later, "d", 0, 90, 0), "w").held
    router.handle_events(
        [("turn_finished", TurnEnd(first, "c", home, 0, 5)), ("trajectory_ended", TrajectoryEnd(first, Outcome.FINISHED, 5, 1))]
    )
    assert router.get_inflight_count(home) == 1, "the later one has been let in"
    router.handle_events([("turn_finished", TurnEnd(later, "d", "", 0, 0, False))])
    assert router.get_total_inflight() == 0 == router._orchestrator.residents.now["waiting"]


def test_a_turn_that_the_news_of_its_eviction_did_not_reach_is_counted_where_it_runs():
    router = HeddleRouter({"s0": "h0", "s1": "h1"})
    router.configure(Options(), False, uniform_fleet({"s0": "h0", "s1": "h1"}, slots=8, kv_tokens=100))
    who = TrajectoryId("p", "u", 0, 1)
    home = router.turn_started(TurnStart(who, "c", 0, 10, 0), "w").replica
    end = TurnEnd(who, "c", home, 0, 5)
    router.handle_events([("turn_finished", end)])
    router.clear_sticky_cache()
    mind = router._orchestrator
    assert mind.residents.home_of(who.key) is None and not router._promised.stays
    again = TurnStart(who, "c", 1, 20, 5)
    router.handle_events([("turn_begun", (again, home))])
    assert mind.residents.home_of(who.key) == home and router.get_inflight_count(home) == 1 == router.get_total_inflight()
    assert router.stats()["told_late"] == 1 and router.stats()["residents/admitted"] == 2
    router.handle_events([("turn_finished", TurnEnd(who, "c", home, 1, 5))])
    router.remove_servers([home])
    router.handle_events([("turn_begun", (TurnStart(who, "c", 2, 30, 10), home))])
    assert router.get_total_inflight() == 0 and not mind.turns, "it will fail, and be asked for"
    assert router.turn_started(TurnStart(who, "c", 2, 30, 10, leg=1), "w").replica != home


def test_told_turns_are_counted_by_verls_rule_while_the_policy_raises(monkeypatch):
    router = HeddleRouter({"s0": "h0", "s1": "h1"})
    router.configure(Options(), False, uniform_fleet({"s0": "h0", "s1": "h1"}))
    who = TrajectoryId("p", "u", 0, 1)
    home = router.turn_started(TurnStart(who, "c", 0, 10, 0), "w").replica
    for method in ("turn_begun", "turn_finished"):
        monkeypatch.setattr(router._orchestrator.residents, method, lambda *args: 1 / 0)
    router.handle_events([("turn_finished", TurnEnd(who, "c", home, 0, 5))])
    assert router.get_total_inflight() == 0
    router.handle_events([("turn_begun", (TurnStart(who, "c", 1, 10, 5), home))])
    assert router.get_inflight_count(home) == 1 == router.get_total_inflight()
    router.handle_events([("turn_finished", TurnEnd(who, "c", home, 1, 5))])
    assert router.get_total_inflight() == 0 and router.failures == {"turn_finished": 2, "turn_begun": 1}


def test_a_worker_whose_router_dies_asks_nothing_and_believes_nothing():
    async def play() -> None:
        rig = Rig(OPTIONS, engines=2, slots=8)
        first = asyncio.ensure_future(episode(rig, "u", 3, tool_s=0.2))
        await asyncio.sleep(0.1)
        assert rig.client._link._stays

        class Dead:
            def __getattr__(self, name):
                raise ActorDiedError()

        rig.actor.inner = Dead()
        for box in rig.router._promised.mail._boxes.values():
            box.call.set_exception(ActorDiedError())
        await asyncio.sleep(0.05)
        assert not rig.client._link._stays and rig.client._link.local is not None, "found out by the open call, between turns"
        assert await first == ["admitted", "fallback_router", "fallback_router"]
        assert rig.client.counts == {"fallback_router": 2}

    asyncio.run(play())


def test_a_router_that_was_started_again_is_not_told_of_places_that_another_gave():
    async def play() -> None:
        rig = Rig(OPTIONS, engines=2, slots=1, kv_tokens=10)
        held = [asyncio.ensure_future(episode(rig, f"u{number}", 2, tokens=60, tool_s=0.1)) for number in range(4)]
        await asyncio.sleep(0.03)
        link = rig.client._link
        assert link._stays and rig.router._promised.held
        old, rig.actor.inner = rig.router, HeddleRouter(rig.router.handles())
        rig.actor.inner.configure(OPTIONS, False, uniform_fleet(old.handles()))
        for box in old._promised.mail._boxes.values():
            old._promised.mail._answer(box)
        await asyncio.sleep(0.02)
        assert not link._stays and link._process == rig.actor.inner._promised.mail.router
        reasons = await asyncio.wait_for(asyncio.gather(*held), 10)
        assert rig.client.counts["hold_lost"] == 2 and sum(one.count("fallback_router") for one in reasons) >= 2
        link.router_is_back()
        await asyncio.sleep(0.1)
        assert rig.actor.inner.get_total_inflight() == 0, "of what it never saw begin"

    asyncio.run(play())


def test_a_router_that_is_set_up_again_has_everybody_ask():
    async def play() -> None:
        rig = Rig(OPTIONS, engines=2, slots=8)
        task = asyncio.ensure_future(episode(rig, "u", 2, tool_s=0.1))
        await asyncio.sleep(0.06)
        rig.router.configure(OPTIONS, False, uniform_fleet(rig.router.handles(), slots=8))
        await asyncio.sleep(0.02)
        assert not rig.client._link._stays
        assert await task == ["admitted", "admitted"]
        await rig.settled()

    asyncio.run(play())


def test_trajectories_of_a_step_that_is_over_ask_and_held_ones_hear_that_they_go_nowhere():
    async def play() -> None:
        router = HeddleRouter({"s0": "h0"})
        router.configure(Options(), False, uniform_fleet({"s0": "h0"}, slots=8, kv_tokens=10))
        turns = [TurnStart(TrajectoryId(f"p{number}", f"u{number}", 0, 1), "c", 0, 10, 0) for number in range(2)]
        (first, second), number = router.turns_started(turns, (), "w")
        assert first.stays and second.held and not second.stays
        await router.step_ended(2)
        news = await router.news("w", "", 0)
        assert [item for _, item in news.items] == [LetIn("u1_0:0", None), PutOut("u0_0")]
        assert all(later > number for later, _ in news.items) and not router._promised.stays and not router._promised.held

    asyncio.run(play())


def test_news_are_given_again_until_they_have_been_heard_and_to_nobody_else(monkeypatch):
    monkeypatch.setattr("verl_heddle.verl_plugin.news.ANSWER_S", 0.05)

    async def play() -> None:
        mail = Mailboxes()
        assert await mail.wait("a", "", 0) == await mail.wait("b", "another process", 9) == News(mail.router, []), "who we are"
        call = asyncio.ensure_future(mail.wait("a", mail.router, 0))
        other = asyncio.ensure_future(mail.wait("b", mail.router, 0))
        await asyncio.sleep(0)
        mail.put("a", PutOut("x"))
        mail.put("a", PutOut("y"))
        assert (await call).items == [(1, PutOut("x")), (2, PutOut("y"))], "all there is goes together"
        assert (await mail.wait("a", "", 0)).items == (await mail.wait("a", mail.router, 0)).items == (await call).items, "it was lost"
        mail.put("a", PutOut("z"))
        assert (await mail.wait("a", mail.router, 2)).items == [(3, PutOut("z"))]
        assert (await mail.wait("a", "another process", 9)).items == [(3, PutOut("z"))], "its numbers mean nothing here"
        assert (await other).items == [] and (await mail.wait("a", mail.router, 3)).items == []
        given_up = asyncio.ensure_future(mail.wait("a", mail.router, 3))
        await asyncio.sleep(0)
        again = asyncio.ensure_future(mail.wait("a", mail.router, 3))
        await asyncio.sleep(0.01)
        assert given_up.done() and not again.done()
        monkeypatch.setattr("verl_heddle.verl_plugin.news.SILENT_S", -1.0)
        mail.put("dead", PutOut("z"))
        mail.forget_silent()
        assert set(mail._boxes) == {"a"}, "whose call is open"
        again.cancel()

    asyncio.run(play())


STAY = Decision("s0", 0, Reason.ADMITTED, stays=True)


class Router:
    """Answers what the test says, when it says so."""

    def __init__(self) -> None:
        self.answer, self.news_of = asyncio.Event(), asyncio.Queue()
        self.told_of: list[str] = []

    async def turns_started(self, turns, told, worker):
        await self.answer.wait()
        return [STAY] * len(turns), 5

    async def news(self, worker, router, heard):
        return await self.news_of.get()

    async def handle_events(self, events):
        self.told_of += [name for name, _ in events]


@pytest.mark.parametrize(("number", "trajectory", "stays"), [(6, "u_0", False), (4, "u_0", True), (6, None, False), (6, "v_0", True)])
def test_an_answer_that_later_news_have_overtaken_is_not_believed(number, trajectory, stays):
    async def play() -> None:
        router = Router()
        link = Link(FakeActor(router), {"s0": "h0"}, 5.0, Counter())
        turn = TurnStart(TrajectoryId("p", "u", 0, 1), "c", 0, 10, 0)
        asked = asyncio.ensure_future(link.ask(turn))
        await asyncio.sleep(0.01)
        router.news_of.put_nowait(News("r", [(number, PutOut(trajectory))]))
        await asyncio.sleep(0.01)
        router.answer.set()
        assert await asked == STAY
        next_turn = TurnStart(turn.trajectory, "c", 1, 20, 5)
        assert (link.begin(next_turn) is not None) == stays
        await asyncio.sleep(0.05)
        assert router.told_of == ["turn_begun"] * stays
        router.news_of.put_nowait(News("r", [(number + 1, PutOut("u_0"))]))
        await asyncio.sleep(0.01)
        assert link.begin(next_turn) is None and not link._asking

    asyncio.run(play())


def test_every_worker_has_a_name_of_its_own():
    """The manager sends one client to all of them."""
    link = Link(None, {"s0": None}, 5.0, Counter())
    sent = [pickle.loads(pickle.dumps(link)) for _ in range(3)]
    assert len({one.name for one in [link, *sent]}) == 4


def test_what_a_trajectory_is_told_ends_with_it():
    async def play() -> None:
        rig = Rig(OPTIONS, slots=8)
        await episode(rig, "u", 2)
        assert not rig.client._link._stays
        rig.client.trajectory_ended(TrajectoryEnd(TrajectoryId("p", "u", 0, 1), Outcome.CANCELLED, 0, 0))
        await rig.settled()

    asyncio.run(play())


def test_before_a_step_is_closed_the_router_has_been_told_of_everything(monkeypatch):
    """The manager collects from the workers, and then tells the router that the step is over."""
    from verl_heddle.verl_plugin.agent_loop import HeddleWorker

    monkeypatch.setattr("verl_heddle.verl_plugin.outbox.LATEST_S", 60.0)

    async def play() -> None:
        rig = Rig(OPTIONS, slots=8)
        await episode(rig, "u", 3)
        assert rig.router._orchestrator.turns, "of its last turn nothing has been told yet"
        worker = object.__new__(HeddleWorker)
        worker.llm_client, worker._records = rig.client, []
        worker._selection = SimpleNamespace(take=list, failures=0)
        await worker.collect()
        await rig.settled()

    asyncio.run(play())


def test_under_planned_placement_the_end_of_a_turn_waits_for_the_order_to_prewarm():
    async def play() -> None:
        rig = Rig(Options(place=Place(enable=True)), engines=2, slots=8)
        reasons = await asyncio.gather(*(episode(rig, f"u{number}", 3) for number in range(3)))
        assert rig.actor.calls["turn_finished"] == 9 and rig.router.stats()["told"] == 0
        assert all(one[1:] == ["sticky"] * 2 for one in reasons)
        await rig.settled()

    asyncio.run(play())


def test_the_bench_of_the_router_plays_a_step_through_the_workers_link():
    from bench.router.load import Loader

    async def play() -> None:
        rig = Rig(OPTIONS, engines=4, slots=8)
        loader = Loader(rig.actor, list(rig.engines), "load", 20, warms=False, predicts=False)
        told = await loader.step(5, 0.02)
        assert len(told.first_s) == 20 and told.seconds > 0.05 and (told.busy_s > 0.05).all() and (told.first_s > 0).all()
        await asyncio.sleep(0.1)
        stats = rig.router.stats()
        assert stats["told"] == 80 and rig.router.get_total_inflight() == 0 and not rig.router._orchestrator._lives

    asyncio.run(play())
