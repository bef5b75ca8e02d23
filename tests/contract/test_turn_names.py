"""Turns through the client and the router where names could clash: loops that share verl's request id, several generations of one
trajectory at a time, `full_determinism`, generations that weight updates interrupt.

The engines are fakes that refuse two requests of one name; the client, the router and verl's own `generate`
are the real ones. Real engines: tests/e2e/test_engine.py."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("verl")

from omegaconf import OmegaConf
from verl.workers.rollout.replica import TokenOutput

from verl_heddle.options import Admission, Deadlines, Options
from verl_heddle.traces.recorder import Recorder
from verl_heddle.trajectory import Outcome, TrajectoryEnd, TrajectoryId
from verl_heddle.verl_plugin.client import HeddleAsyncClient, HeddleClient
from verl_heddle.verl_plugin.live import CURRENT
from verl_heddle.verl_plugin.request_life import FIELD
from verl_heddle.verl_plugin.router import HeddleRouter, alike


class FakeActor:
    """An object in this process behind the `.method.remote(...)` of a Ray actor."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=lambda *args, **kwargs: asyncio.ensure_future(self._call(name, args, kwargs)))

    async def _call(self, name: str, args: tuple, kwargs: dict) -> Any:
        result = getattr(self.inner, name)(*args, **kwargs)
        return await result if asyncio.iscoroutine(result) else result


class FakeEngine:
    """A server that generates `max_tokens` tokens, one every millisecond; it knows requests by the id it was given, as vLLM does."""

    def __init__(self) -> None:
        self.open: dict[str, list[int]] = {}
        """Tokens so far and at most, by request id."""
        self.seen: list[str] = []
        self.priorities: dict[str, int] = {}
        self.unknown: list[str] = []
        self.most = self.updates = 0
        """Weight updates so far; each aborts what is open."""

    async def generate(
        self, request_id: str, prompt_ids: list[int], sampling_params: dict, priority: int = 0, **kwargs: Any
    ) -> TokenOutput:
        assert request_id not in self.open, f"two requests are named {request_id}"
        self.seen.append(request_id)
        state = self.open[request_id] = [0, sampling_params["max_tokens"]]
        self.most, updates = max(self.most, len(self.open)), self.updates
        try:
            while state[0] < state[1] and self.updates == updates:
                await asyncio.sleep(0.001)
                state[0] += 1
        finally:
            del self.open[request_id]
        told = {"global_steps": updates, FIELD: {"server_s": 0.001 * state[0]}, "num_cached_tokens": 0}
        stop_reason = "completed" if state[0] >= state[1] else "aborted"
        return TokenOutput(token_ids=[1] * state[0], stop_reason=stop_reason, log_probs=[0.0] * state[0], extra_fields=told)

    async def heddle_priorities(self, table: dict[str, int]) -> int:
        self.priorities |= {name: priority for name, priority in table.items() if name in self.open}
        self.unknown += [name for name in table if name not in self.open]
        return len(table)

    async def heddle_limits(self, table: dict[str, int]) -> dict[str, int]:
        found = {name: self.open[name] for name in table if name in self.open}
        for name, state in found.items():
            state[1] = min(state[1], table[name])
        return {name: state[0] for name, state in found.items()}


class Rig:
    """One worker's client, a router and engines."""

    def __init__(
        self,
        options: Options,
        engines: int = 1,
        slots: int = 1,
        deterministic: bool = False,
        client: type = HeddleClient,
        kv_tokens: int | None = None,
    ) -> None:
        self.engines = {f"s{number}": FakeEngine() for number in range(engines)}
        handles: dict[str, Any] = {name: FakeActor(engine) for name, engine in self.engines.items()}
        self.router = HeddleRouter(handles)
        self.router.configure(options, deterministic, alike(handles, slots=slots, kv_tokens=kv_tokens))
        rollout = {"name": "vllm", "scheduling_policy": "priority", "prompt_length": 500, "response_length": 1500}
        config = OmegaConf.create({"actor_rollout_ref": {"rollout": rollout | {"full_determinism": deterministic}}})
        self.client = client(config=config, load_balancer_handle=FakeActor(self.router), servers=handles, options=options)

    def start(self, uid: str, sample: int, **more: Any) -> Recorder:
        """A trajectory begins in this task."""
        recorder = Recorder(TrajectoryId("p", uid, sample, 1), time.monotonic(), time.time(), **more)
        CURRENT.set(recorder)
        return recorder

    async def turn(self, conversation: str, tokens: int = 3) -> TokenOutput:
        """One generation of this task's trajectory."""
        return await self.client.generate(conversation, prompt_ids=[7] * 10, sampling_params={"max_tokens": tokens})

    def end(self, recorder: Recorder, turns: int) -> None:
        """The trajectory is over."""
        self.client.trajectory_ended(TrajectoryEnd(recorder.id, Outcome.FINISHED, recorder.output_tokens, turns))

    async def settled(self) -> None:
        """Nothing is left of the turns anywhere."""
        await asyncio.sleep(0.1)
        mind = self.router._orchestrator
        assert not mind.turns and not mind._lives and not mind.turns.groups and not self.router._stays
        assert set(mind.inflight.values()) == {0} and self.router.get_total_inflight() == 0
        assert not self.router._held and not self.router._orders.names
        link = self.client._link
        assert not link._stays and not link._asking and not link._let_in.names
        assert not self.client._flying and not self.client._warming and self.client.counts == {}
        assert not mind.admission and not any(mind.admission.inside(name) for name in self.engines if mind.admission is not None)
        seen = [name for engine in self.engines.values() for name in engine.seen]
        assert len(set(seen)) == len(seen)


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
    """Far longer than one answer of the router may take, and than `hold_s`."""
    monkeypatch.setattr("verl_heddle.verl_plugin.news.ANSWER_S", 0.05)

    async def play() -> None:
        rig = Rig(Options.longest(admission=Admission(per_slot=1.0, hold_s=0.3), deadlines=Deadlines(router_s=5.0)))

        async def episode(sample: int) -> None:
            recorder = rig.start("u", sample)
            await rig.turn(f"c{sample}", 100)
            rig.end(recorder, 1)

        await asyncio.gather(*(episode(sample) for sample in range(8)))
        await rig.settled()
        stats = rig.router.stats()
        assert stats["held"] == 7 and stats["hold_overdue"] == 0 and rig.engines["s0"].most == 1

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
        rig.router.configure(options, False, alike(rig.router.handles(), slots=1))
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
