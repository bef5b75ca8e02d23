"""Turns through the client and the router where names could clash: loops that share verl's request id, several generations of one
trajectory at a time, `full_determinism`, generations that weight updates interrupt.

The engines are fakes that refuse two requests of one name; the client, the router and verl's own `generate`
are the real ones. Real engines: tests/e2e/test_engine.py."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

pytest.importorskip("verl")

from rig import Rig

from verl_heddle.options import Admission, Deadlines, Options
from verl_heddle.verl_plugin.client import HeddleAsyncClient, HeddleClient
from verl_heddle.verl_plugin.router import uniform_fleet

HOLDING = Options.longest(admission=Admission(per_slot=1.0, hold_s=20.0), deadlines=Deadlines(router_s=5.0))
RESIDENTS = Options(admission=Admission(hold_s=20.0), deadlines=Deadlines(router_s=5.0))


@pytest.mark.parametrize(("deterministic", "options", "held"), [(False, HOLDING, 12), (True, HOLDING, 12), (False, RESIDENTS, 4)])
def test_samples_that_share_a_request_id_and_generations_side_by_side(deterministic, options, held):
    """With `full_determinism` verl's trainer names every conversation `det-0`, and its client names requests so in vLLM."""

    async def play() -> None:
        rig = Rig(options, deterministic=deterministic, kv_tokens=10)

        async def episode(sample: int) -> None:
            recorder = rig.start("u", sample)
            await asyncio.gather(*(rig.turn("det-0", tokens) for tokens in (2, 4, 6)))
            await rig.turn("det-0")
            await rig.turn("det-0")
            rig.end(recorder, 5)
            assert recorder.output_tokens == 18

        await asyncio.wait_for(asyncio.gather(*(episode(sample) for sample in range(6))), 15)
        await rig.settled()
        assert rig.router.stats()["held"] > held, "a place at a time: they waited in the router, and each was let in"
        assert sorted(rig.engines["s0"].seen) == sorted(f"u_{sample}:{number}" for sample in range(6) for number in range(5))

    asyncio.run(play())


@pytest.mark.parametrize("deterministic", [False, True])
def test_new_priorities_name_the_requests_as_the_engine_knows_them(deterministic):
    async def play() -> None:
        rig = Rig(Options.longest(), slots=64, deterministic=deterministic)

        async def episode(sample: int, *turns: int) -> None:
            recorder = rig.start("u", sample)
            await asyncio.gather(*(rig.turn("shared", tokens) for tokens in turns))
            rig.end(recorder, len(turns))

        long = asyncio.ensure_future(episode(0, 900, 900))
        await asyncio.sleep(0.05)
        for sample in range(1, 9):
            await episode(sample, 2)
        await asyncio.sleep(1.2)  # a refresh a second
        engine = rig.engines["s0"]
        assert set(engine.priorities) == {"u_0:0", "u_0:1"} and engine.unknown == []
        await long
        await rig.settled()

    asyncio.run(play())


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_limit_reaches_every_turn_of_its_trajectory_that_is_under_way(deterministic):
    async def play() -> None:
        rig, told = Rig(Options(), engines=2, slots=64, deterministic=deterministic), []
        recorder = rig.start("u", 0, counter=told.append)
        await rig.turn("first", 10)
        turns = [asyncio.ensure_future(rig.turn(name, 1000)) for name in ("first", "second", "first")]
        await asyncio.sleep(0.05)
        rig.client.limit({"u_0": 12})
        outputs = await asyncio.wait_for(asyncio.gather(*turns), 0.8)
        assert all(len(output.token_ids) < 200 for output in outputs)
        assert told == sorted(told) and told[-1] == recorder.output_tokens, "never less than before"
        rig.end(recorder, 4)
        await rig.settled()

    asyncio.run(play())


def test_requests_outside_any_trajectory_have_names_of_their_own():
    async def play() -> None:
        rig = Rig(Options())
        other = HeddleClient(rig.client.config, rig.client._load_balancer, rig.client._servers, Options())
        calls = [
            client.generate("reward", prompt_ids=[1], sampling_params={"max_tokens": 5}) for client in (rig.client, other) for _ in range(3)
        ]
        await asyncio.gather(*calls)
        await rig.settled()

    asyncio.run(play())


def test_a_held_turn_waits_for_as_long_as_its_replica_lives(monkeypatch):
    """Far longer than one answer of the router may take, and than `hold_s`: in all, while each turn takes a small part of it."""
    monkeypatch.setattr("verl_heddle.verl_plugin.news.ANSWER_S", 0.05)

    async def play() -> None:
        rig = Rig(Options.longest(admission=Admission(per_slot=1.0, hold_s=0.5), deadlines=Deadlines(router_s=5.0)))

        async def episode(sample: int) -> None:
            recorder = rig.start("u", sample)
            await rig.turn(f"c{sample}", 20)
            rig.end(recorder, 1)

        await asyncio.gather(*(episode(sample) for sample in range(40)))
        await rig.settled()
        stats = rig.router.stats()
        assert stats["held"] == 39 and stats["hold_overdue"] == 0 and rig.engines["s0"].most == 1

    asyncio.run(play())


def test_what_happens_while_the_router_does_not_answer_is_told_when_it_is_back():
    async def play() -> None:
        rig = Rig(Options(deadlines=Deadlines(router_s=0.1)))
        recorder = rig.start("u", 0)
        turn = asyncio.ensure_future(rig.turn("c", 400))
        await asyncio.sleep(0.05)
        answer, rig.router.turns_started = rig.router.turns_started, lambda *args: asyncio.sleep(0.3, answer(*args))
        other = rig.start("u", 1)
        await rig.turn("d", 3)
        assert rig.client.counts.pop("fallback_router") == 1 and rig.client._link.local.get_total_inflight() == 0
        rig.end(other, 1)
        await turn
        rig.end(recorder, 1)
        assert len(rig.router._orchestrator.turns) == 2, "the slow router placed the turn after all"
        rig.router.turns_started = answer
        rig.client.router_is_back()
        await rig.settled()

    asyncio.run(play())


@pytest.mark.parametrize("options", [HOLDING, RESIDENTS])
def test_a_router_that_is_set_up_again_lets_held_turns_go(options):
    async def play() -> None:
        rig = Rig(options)

        async def episode(sample: int) -> None:
            recorder = rig.start("u", sample)
            await rig.turn(f"c{sample}", 100)
            rig.end(recorder, 1)

        tasks = [asyncio.ensure_future(episode(sample)) for sample in range(3)]
        await asyncio.sleep(0.05)
        rig.router.configure(options, False, uniform_fleet(rig.router.handles(), slots=1))
        await asyncio.wait_for(asyncio.gather(*tasks), 2)
        await rig.settled()

    asyncio.run(play())


def test_a_generation_goes_on_after_weight_updates_as_one_turn(monkeypatch):
    """Several at a time, some more often than others; nobody is let into a paused engine, and the loop above sees one output."""
    quick = {**vars(asyncio), "sleep": lambda seconds: asyncio.sleep(seconds / 20)}
    monkeypatch.setattr("verl.workers.rollout.llm_server.asyncio", SimpleNamespace(**quick))

    async def play() -> None:
        rig = Rig(RESIDENTS, engines=2, slots=2, client=HeddleAsyncClient, kv_tokens=200)
        records, ends = [], []
        mind = rig.router._orchestrator
        told = mind.turn_finished
        monkeypatch.setattr(mind, "turn_finished", lambda turn, now: ends.append(turn) or told(turn, now))

        async def episode(sample: int) -> None:
            recorder = rig.start(f"u{sample}", sample)
            outputs = await asyncio.gather(*(rig.turn(f"c{sample}", tokens) for tokens in (40, 400)))
            assert [len(output.token_ids) for output in outputs] == [40, 400] == [len(output.log_probs) for output in outputs]
            assert {output.stop_reason for output in outputs} == {"length"}, "as verl says of a generation that has all it may"
            await rig.turn(f"c{sample}", 5)
            rig.end(recorder, 3)
            records.append(recorder)

        async def update() -> None:
            for name in rig.engines:
                rig.router.paused(name)
            for engine in rig.engines.values():
                engine.updates += 1
            await asyncio.sleep(0.2)
            assert not any(engine.open for engine in rig.engines.values()), "nobody is let in"
            for name in rig.engines:
                rig.router.resumed(name)

        life = asyncio.gather(*(episode(sample) for sample in range(5)))
        for _ in range(3):
            await asyncio.sleep(0.15)
            await update()
        await asyncio.wait_for(life, 30)
        await rig.settled()
        for recorder in records:
            assert recorder.output_tokens == 445 and sorted(turn.output_tokens for turn in recorder.turns) == [5, 40, 400]
            [long] = [turn for turn in recorder.turns if turn.output_tokens == 400]
            assert long.legs and long.paused_s and long.weights and long.ctx_tokens == 10
        assert sorted(end.before_tokens + end.output_tokens for end in ends if end.completed) == [5] * 5 + [40] * 5 + [400] * 5
        assert any(end.interrupted and end.before_tokens for end in ends)
        stats = rig.router.stats()
        assert stats["residents/interrupted"] > 0 and not rig.router.failures and stats["hold_overdue"] == 0

    asyncio.run(play())


@pytest.mark.parametrize("when", ["asleep", "held", "running"])
def test_a_trajectory_cancelled_in_an_interrupted_turn_leaves_nothing(when, monkeypatch):
    async def play() -> None:
        rig = Rig(RESIDENTS, client=HeddleAsyncClient)
        recorder = rig.start("u", 0)
        task = asyncio.ensure_future(rig.turn("c", 5000))
        await asyncio.sleep(0.05)
        rig.router.paused("s0")
        rig.engines["s0"].updates += 1
        await asyncio.sleep(0.1 if when == "asleep" else 1.2)  # verl waits a second
        if when == "running":
            rig.router.resumed("s0")
            await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        rig.end(recorder, 1)
        await asyncio.sleep(0.1)
        rig.router.resumed("s0")
        await rig.settled()
        [cut] = recorder.turns
        assert cut.legs == 1 and 0 < cut.output_tokens < 100 and (cut.paused_s > 0.05)
        assert [name.rpartition(":")[2] for name in rig.engines["s0"].seen] == (["0", "0.1"] if when == "running" else ["0"])

    asyncio.run(play())


def test_without_the_router_verls_rule_goes_on_after_weight_updates():
    async def play() -> None:
        rig = Rig(RESIDENTS, engines=2, client=HeddleAsyncClient)
        recorder = rig.start("u", 0)
        task = asyncio.ensure_future(rig.turn("c", 100))
        await asyncio.sleep(0.03)
        rig.client._load_balancer.inner = None
        for engine in rig.engines.values():
            engine.updates += 1
        assert len((await asyncio.wait_for(task, 10)).token_ids) == 100
        assert rig.client.counts["fallback_router"] == 1 and recorder.turns[0].legs == 2

    asyncio.run(play())
