"""The engines of a layout and who speaks for them, in any order of changes and failures. Engines and trainer ranks are fakes, named so;
their real twins run in tests/e2e/test_layouts.py.
"""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_heddle.trajectory import Trajectory, Turn
from verl_heddle.verl_plugin import layout_choice, layouts, trainer_rank
from verl_heddle.verl_plugin.layouts import Home, Layouts, spans

GPUS = 4
CUTS = [(1, 1, 1, 1), (2, 1, 1), (2, 2), (4,), (1, 1, 2)]


class FakeWorker:
    """A trainer rank: hears where it sits."""

    def __init__(self):
        self.seat = None
        self.__ray_call__ = self

    async def remote(self, sit, engine, rank):
        assert sit is trainer_rank.sit
        self.seat = (engine, rank)


@dataclass
class FakeConfig:
    tensor_model_parallel_size: int = 1
    gpu_memory_utilization: float = 0.5
    custom: dict = field(default_factory=dict)

    def get(self, name):
        return getattr(self, name)


class FakeEngine:
    """Stands for `HeddleReplica`: launched, put to sleep, shut down."""

    failing: tuple = ()
    """(replica rank) of engines that do not come up."""

    def __init__(self, replica_rank, config, model_config, gpus_per_node):
        self.replica_rank, self.tp = replica_rank, config.tensor_model_parallel_size
        self.asleep = self.ended = False
        self.workers = []

    async def launch_servers(self):
        assert len(self.workers) == self.tp
        if self.replica_rank in FakeEngine.failing:
            self.servers = []
            raise RuntimeError("no memory")
        self.servers = [self]
        self._server_address, self._server_handle = f"e{self.replica_rank}", self

    async def sleep(self):
        self.asleep = True

    async def end(self):
        self.ended = True


class FakeHome:
    """Stands for `Home`, which needs verl's configuration to be made."""

    def __init__(self, rank, config):
        self.replica_rank, self.config, self.model_config, self.gpus_per_node, self.servers = rank, config, None, GPUS, []


class Group:
    def __init__(self):
        self.workers = [FakeWorker() for _ in range(GPUS)]


async def opened(most):
    asked = {"enable": True, "fixed": [], "schedule": {}, "engines": most}
    config = FakeConfig(custom={"heddle": {"layout": asked}})
    made, group = Layouts(), Group()
    made.homes = [FakeHome(rank, config) for rank in range(GPUS)]
    await asyncio.gather(*(made.open(home, group) for home in made.homes))
    return made, group


async def night(made):
    """Everybody falls asleep, as verl lets them after a step."""
    for home in made.homes:
        for server in home.servers:
            await server.sleep()
        await made.fell_asleep()


def check(made, group, most):
    parts = spans(made.layout)
    assert sum(made.layout) == GPUS and not any(engine.ended for engine in made._engines.values())
    for start, tp in parts:
        engine = made._engines[start, tp]
        assert made.homes[start].servers == [engine]
        assert [home.servers for home in made.homes[start + 1 : start + tp]] == [[]] * (tp - 1)
        assert {home._server_address for home in made.homes[start : start + tp]} == {engine._server_address}
        assert [worker.seat for worker in group.workers[start : start + tp]] == [(engine.replica_rank, rank) for rank in range(tp)]
    assert list(made.servers()) == [f"e{made._engines[span].replica_rank}" for span in parts]
    assert len({engine.replica_rank for engine in made._engines.values()}) == len(made._engines)
    for gpu in range(GPUS):
        held = [span for span in made._engines if span[0] <= gpu < span[0] + span[1]]
        assert len(held) <= most


@pytest.fixture(autouse=True)
def fakes(monkeypatch):
    monkeypatch.setattr(layouts, "HeddleReplica", FakeEngine)
    monkeypatch.setattr(layouts, "replace", lambda config, **changes: FakeConfig(**changes))
    monkeypatch.setattr(layouts, "end", FakeEngine.end)
    monkeypatch.setattr(layouts.ray, "get", lambda refs, timeout: refs)
    monkeypatch.setattr(FakeEngine, "failing", ())


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(CUTS), max_size=6), st.integers(1, 3), st.sets(st.integers(GPUS, 4 * GPUS - 1), max_size=2))
def test_whatever_changes_the_homes_speak_for_one_layout(wanted, most, failing):
    async def play():
        FakeEngine.failing = tuple(failing)
        made, group = await opened(most)
        told = []
        made.changed = lambda servers: told.append(list(servers))
        await night(made)
        check(made, group, most)
        for layout in wanted:
            before, was_static = made.layout, made.static
            made.wanted = layout
            await night(made)
            check(made, group, most)
            assert made.layout == (before if made.static else layout)
            assert was_static <= made.static
            assert all(made._engines[span].asleep for span in spans(made.layout)), "weights come to engines that sleep"
            assert not told or told[-1] == list(made.servers())
        failed = any(made._engines.get(span) is None and span[0] + GPUS * (span[1] - 1) in failing for w in wanted for span in spans(w))
        assert made.static == failed == bool(made.counts["failures"])

    asyncio.run(play())


def test_an_engine_that_sleeps_is_used_again():
    async def play():
        made, _ = await opened(2)
        for layout in ((2, 1, 1), (1, 1, 1, 1), (2, 1, 1), (1, 1, 1, 1)):
            made.wanted = layout
            await night(made)
        assert (made.counts["launches"], made.counts["switches"], made.counts["shut_down"]) == (5, 4, 0)

    asyncio.run(play())


def test_with_room_for_one_engine_a_change_is_a_relaunch():
    async def play():
        made, _ = await opened(1)
        assert made.reshard_s is not None and not made.counts["switches"], "what launching took"
        made.wanted = (2, 1, 1)
        await night(made)
        assert (made.counts["launches"], made.counts["shut_down"]) == (5, 2) and made.reshard_s is not None

    asyncio.run(play())


class Updating(Group):
    sent = ()

    def update_weights(self, global_steps, mode):
        self.sent = (*self.sent, (global_steps, mode))
        return []


def test_the_first_layout_takes_over_with_the_weights_of_the_step(monkeypatch):
    made, group = asyncio.run(opened(2))
    made._group = Updating()
    made.wanted = (2, 1, 1)
    asyncio.run(night(made))
    dead = []
    monkeypatch.setattr(made, "_dead", lambda: dead)
    made.repair(6)
    assert made._group.sent == () and made.layout == (2, 1, 1) and not made.static, "nobody is dead"
    dead = [(0, 2)]
    made.repair(7)
    check(made, group, 2)
    assert made.layout == (1,) * GPUS and made.static and made._group.sent == ((7, "naive"),)
    made.wanted = (4,)
    asyncio.run(night(made))
    assert made.layout == (1,) * GPUS, "for the rest of the run"
    before = made._engines[2, 1]
    dead = [(2, 1)]
    made.repair(8)
    check(made, group, 2)
    assert made._engines[2, 1] is not before and before.ended, "an engine of that layout is launched anew"
    made.repair(9)
    made.repair(10)
    assert len(made._group.sent) == layouts.MOST_REPAIRS and made.counts["failures"] == layouts.MOST_REPAIRS + 1


def test_what_cannot_be_repaired_is_left_to_those_that_live(monkeypatch, capsys):
    made, _ = asyncio.run(opened(2))
    made._group = Updating()
    monkeypatch.setattr(FakeEngine, "failing", (1,))
    monkeypatch.setattr(made, "_dead", lambda: [(1, 1)])
    before = dict(made._engines)
    made.repair(3)
    assert made._engines == before and len(made.servers()) == GPUS
    assert made._group.sent == ((3, "naive"),), "those that live were put to sleep: without weights they would serve nobody"
    assert "goes on with the live engines" in capsys.readouterr().err


def test_schedules_and_first_layouts():
    told = {3: [2, 1, 1], 5: [4]}
    assert [layout_choice.scheduled(told, step) for step in (1, 3, 4, 9)] == [None, (2, 1, 1), (2, 1, 1), (4,)]
    assert layout_choice.first({"schedule": {1: [2, 2]}, "fixed": [4]}, 4, 4, 0.5) == (2, 2)
    assert layout_choice.first({"fixed": [4]}, 4, 4, 0.5) == (4,)
    assert layout_choice.first({}, 4, 4, 0.5) == (1, 1, 1, 1)
    assert layout_choice.first({"times": "qwen3-8b/h200"}, 4, 4, 0.5) == (1, 1, 1, 1)
    assert layout_choice.first({"times": "qwen3-32b/h100"}, 8, 8, 0.5)[0] > 1, "one GPU does not hold it"
    assert layout_choice.first({"times": "llama-3.1-70b/a100"}, 8, 8, 0.5)[0] > 1, "what plan knows, a run knows"
    assert "roofline" in layout_choice.times("glm-4.5-air/l40s").source
    with pytest.raises(ValueError, match="qwen3-14b/h200"):
        layout_choice.times("qwen3-14b")


def test_settings_reach_the_replica_as_vllm_gets_them():
    rollout = {"custom": {"heddle": {"layout": {"enable": True, "schedule": {"3": [2, 1]}}}}}
    assert layouts.settings(rollout) == {"enable": True, "schedule": {3: [2, 1]}}, "JSON makes text of numbers"
    for off in ({}, {"custom": None}, {"custom": {"heddle": None}}, {"custom": {"heddle": {"layout": {"enable": False}}}}):
        assert layouts.settings(off) is None


def test_a_rank_takes_the_names_that_verl_would_give(monkeypatch):
    """Sender and receiver find each other by replica rank and local rank: as verl's own arithmetic for equal replicas."""
    from verl.workers.rollout.vllm_rollout import ServerAdapter, utils

    adapter = object.__new__(trainer_rank.ServerAdapter)
    adapter.zmq_handle = "ipc:///tmp/rl-colocate-zmq-01000000-replica-1-rank-0.sock"
    monkeypatch.setattr(trainer_rank, "SLOT", trainer_rank.EngineSlot(5, 1))
    adapter._sit_down()

    class Receiver:
        local_rank, model_runner = 1, None

    monkeypatch.setattr(utils, "_resolve_vllm_weight_sync_local_rank", lambda local, config: local)
    monkeypatch.setitem(os.environ, "VERL_REPLICA_RANK", "5")
    monkeypatch.setitem(os.environ, "VERL_RAY_JOB_ID", "01000000")
    theirs = next(value for value in vars(utils).values() if hasattr(value, "_get_zmq_handle"))._get_zmq_handle(Receiver())
    assert adapter.zmq_handle == theirs
    assert (adapter.replica_rank, adapter.rollout_rank, adapter._has_server, adapter.server_handle) == (5, 1, False, None)
    assert issubclass(trainer_rank.ServerAdapter, ServerAdapter)


def test_a_home_overrides_what_needs_a_first_server():
    """verl's replica asks `servers[0]` in these; a home may have none."""
    import inspect

    from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMReplica

    asks = {name for name, one in vars(vLLMReplica).items() if inspect.isfunction(one) and "self.servers[0]" in inspect.getsource(one)}
    assert asks - {"launch_servers"} <= set(vars(Home))


def test_the_plan_follows_the_lengths_and_says_why(capsys):
    """One long trajectory beside a crowd, foreseen: mixed degrees. All alike: nothing to mix. An odd table: the layout stays."""
    from omegaconf import OmegaConf

    from verl_heddle.options import Layout

    rollout = OmegaConf.create({"response_length": 40960, "prompt_length": 2048, "gpu_memory_utilization": 0.8, "max_num_seqs": 256})
    chooser = layout_choice.Chooser(Layout(enable=True, times="qwen3-14b/h200"), rollout, 8, 8, 40, 8)

    def records(lengths):
        return [
            Trajectory(
                "verl", "w", f"p{i}", 0, 100, (Turn(0, tokens, gen_s=1.0, predicted_remaining=float(tokens)),), meta={"outcome": "finished"}
            )
            for i, tokens in enumerate(lengths)
        ]

    skewed = chooser.next(2, records([40_000] * 2 + [1000] * 800), (1,) * 8, 5.0)
    assert sum(skewed) == 8 and max(skewed) > 1
    assert chooser.metrics["gain_s"] > 0 and chooser.metrics["forecast_s"] < chooser.metrics["current_s"]
    assert sum(value for name, value in chooser.metrics.items() if name.startswith("reason/")) == 1
    assert "s per step expected" in capsys.readouterr().err
    assert chooser.next(3, records([40_000] * 2 + [1000] * 800), skewed, 5.0) == skewed, "the same again: it stays"
    assert chooser.next(4, [], skewed, None) is None
    told = layout_choice.Chooser(Layout(enable=True, schedule={2: [4, 4]}), rollout, 8, 8, 40, 8)
    assert told.next(2, [], (1,) * 8, None) == (4, 4) and told.metrics == {}


def test_where_neither_layout_can_be_had_verl_gets_on_and_the_next_rollout_repairs(monkeypatch, capsys):
    """With room for one engine a GPU, the old layout's engines are gone when the new one's do not come up, nor perhaps they."""

    async def play():
        made, group = await opened(1)
        FakeEngine.failing = (0, GPUS)
        before = dict(made._engines)
        made.wanted = (2, 1, 1)
        await night(made)  # raises out of verl's own sleep_replicas otherwise, and ends the run
        assert made.layout == (1,) * GPUS and made.static and set(made.servers()) == {e._server_address for e in before.values()}
        assert [worker.seat for worker in group.workers] == [(rank, 0) for rank in range(GPUS)]
        return made

    made = asyncio.run(play())
    assert "begins with repairs" in capsys.readouterr().err
    FakeEngine.failing = ()
    made._group = Updating()
    monkeypatch.setattr(made, "_dead", lambda: [span for span, engine in made._engines.items() if engine.ended])
    made.repair(4)
    assert not any(made._engines[span].ended for span in spans(made.layout)) and made._group.sent == ((4, "naive"),)


def test_a_rank_feeds_an_engine_launched_anew_in_its_old_place(monkeypatch):
    """Its server had been given up for dead; the seat that is given again is a new one."""
    adapter = object.__new__(trainer_rank.ServerAdapter)
    adapter.zmq_handle = "ipc:///tmp/rl-colocate-zmq-01000000-replica-1-rank-0.sock"
    monkeypatch.setattr(trainer_rank, "SLOT", None)
    trainer_rank.sit(None, 5, 0)
    adapter._sit_down()
    adapter._gone = True
    adapter._sit_down()
    assert adapter._gone
    trainer_rank.sit(None, 5, 0)
    adapter._sit_down()
    assert not adapter._gone and adapter.server_handle is None
