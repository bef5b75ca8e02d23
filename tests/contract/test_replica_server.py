"""What a rollout server tells of its engines and hands on to them. The engines are fakes, named so; real ones: tests/e2e/test_engine.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import vllm.distributed.kv_transfer.kv_connector.v1 as kv_connectors
from omegaconf import OmegaConf
from vllm.v1.core.sched.scheduler import Scheduler

from verl_heddle.verl_plugin import log
from verl_heddle.verl_plugin.client import HeddleClient
from verl_heddle.verl_plugin.overrides import compose
from verl_heddle.verl_plugin.parts import KEEPS_OLD, TIERS
from verl_heddle.verl_plugin.replicas import HeddleHttpServer, vLLMHttpServer
from verl_heddle.verl_plugin.settings import handed_on
from verl_heddle.verl_plugin.vllm_scheduler import SETTINGS, HeddleScheduler


class FakeCore:
    """Stands for vLLM's client of one engine, or of several: its own call asks all and answers with the first one's answer."""

    def __init__(self, answers):
        self.answers, self.calls = answers, []
        self.core_engines = [bytes([rank]) for rank in range(len(answers))]

    async def _call_utility_async(self, method, *args, engine):
        self.calls.append((method, *args))
        return self.answers[engine[0]][method]

    async def call_utility_async(self, method, *args):
        first, *_ = [await self._call_utility_async(method, *args, engine=engine) for engine in self.core_engines]
        return first


def server(answers=({},), scheduler=HeddleScheduler, preempt=None, connector=None, **cache):
    """A server without an engine. `answers`: by engine, what each utility call returns."""
    made = object.__new__(HeddleHttpServer)
    made.replica_rank = 3
    made.config = OmegaConf.create({"tensor_model_parallel_size": 1, "max_num_seqs": None, "custom": {"heddle": {"preempt": preempt}}})
    cache = {"num_gpu_blocks": 100, "block_size": 16, "kv_cache_size_tokens": None, "enable_prefix_caching": True} | cache
    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_seqs=48, get_scheduler_cls=lambda: scheduler),
        parallel_config=SimpleNamespace(data_parallel_size=len(answers), tensor_parallel_size=2),
        cache_config=SimpleNamespace(**cache),
        kv_transfer_config=connector and SimpleNamespace(kv_connector=connector),
    )
    made.engine = SimpleNamespace(vllm_config=config, engine_core=FakeCore(answers))
    return made


async def test_the_engine_is_asked_what_it_is_not_verls_config():
    """`rollout.max_num_seqs` is null here, and says another number where engine_kwargs.vllm does."""
    known = {"tp": 2, "slots": 48, "calls": 1000, "caches": True, "tier": False}
    assert await server(enable_prefix_caching=False).heddle_facts() == known | {"kv_tokens": 1600, "caches": False}
    assert await server().heddle_facts() == known | {"kv_tokens": 1600}
    assert await server(kv_cache_size_tokens=900).heddle_facts() == known | {"kv_tokens": 900}
    assert await server(connector="OffloadingConnector").heddle_facts() == known | {"kv_tokens": 1600, "tier": True}
    assert await server(connector="NixlConnector").heddle_facts() == known | {"kv_tokens": 1600}
    assert await server(num_gpu_blocks=None).heddle_facts() == known | {"kv_tokens": None}


async def test_a_data_parallel_server_has_the_slots_of_all_its_engines():
    facts = await server(({}, {}), num_gpu_blocks=200, kv_cache_size_tokens=1600).heddle_facts()
    assert facts == {"tp": 2, "slots": 96, "kv_tokens": 3200, "calls": 1000, "caches": True, "tier": False}


async def test_every_engine_of_a_data_parallel_server_is_asked():
    first = {"heddle_set_priorities": 1, "heddle_set_limits": {"a": 5}, "heddle_counts": {"requests": 2, "preempted_by_rule": 1}}
    second = {"heddle_set_priorities": 2, "heddle_set_limits": {"b": 7}, "heddle_counts": {"requests": 3, "preempted_by_rule": 4}}
    both = server((first, second))
    assert await both.heddle_priorities({"a": 1, "b": 2, "c": 3}) == 3
    assert await both.heddle_limits({"a": 9, "b": 9}) == {"a": 5, "b": 7}
    assert await both.heddle_counts() == {"requests": 5, "preempted_by_rule": 5}


async def test_another_scheduler_is_never_called(capsys):
    """vLLM logs a traceback for each utility call that it does not know."""
    other = server(scheduler=Scheduler)
    assert (await other.heddle_counts(), await other.heddle_priorities({"a": 1}), await other.heddle_limits({"a": 9})) == ({}, 0, {"a": 0})
    assert other.engine.engine_core.calls == []


@pytest.mark.parametrize(
    ("preempt", "scheduler", "off", "word"),
    [
        ({"enable": True}, HeddleScheduler, [None, None], None),
        ({"enable": True}, HeddleScheduler, [None, "not tested with a KV connector"], "KV connector"),
        ({"enable": True}, Scheduler, [None], "does not run heddle's scheduler"),
        ({"enable": False}, HeddleScheduler, ["not enabled"], None),
        (None, Scheduler, [None], None),
    ],
)
async def test_what_the_scheduler_does_not_do_is_said_once_it_is_up(monkeypatch, capsys, preempt, scheduler, off, word):
    monkeypatch.setattr(log, "_said", set())
    monkeypatch.setenv(SETTINGS, "before")
    asked = server([{"heddle_why_off": why} for why in off], scheduler, preempt)
    engine, seen = asked.engine, []

    async def launch(self, args):
        seen.append(os.environ[SETTINGS])
        self.engine = engine

    monkeypatch.setattr(vLLMHttpServer, "run_server", launch)
    await asked.run_server(None)
    assert seen == [json.dumps(preempt) if preempt else "before"], "the engine's processes inherit it"
    said = [line for line in capsys.readouterr().err.splitlines() if "preemption" in line]
    assert [word in line and "OFF on replica 3" in line for line in said] == [True] * (word is not None)


@pytest.mark.parametrize(
    ("given", "most"), [({}, 60), ({"max_tokens": 20}, 20), ({"max_new_tokens": 20}, 20), ({"max_new_tokens": 90}, 60)]
)
def test_a_limited_turn_names_its_tokens_once(given, most):
    """verl takes `max_tokens` and then hands a `max_new_tokens` beside it on to vLLM's SamplingParams, which refuses it."""
    client = object.__new__(HeddleClient)
    client.config = OmegaConf.create({"actor_rollout_ref": {"rollout": {"response_length": 500, "prompt_length": 500}}})
    turn = SimpleNamespace(context_tokens=100, generated_tokens=40)
    assert client._limited({"top_p": 0.9, **given}, turn, limit=100) == {"top_p": 0.9, "max_tokens": most}


def vllm_arguments(*overrides):
    """What of verl's rollout config goes to vLLM as it is, and the whole rollout config."""
    config = compose(["actor_rollout_ref.rollout.name=vllm", *overrides])
    rollout = OmegaConf.to_container(config.actor_rollout_ref.rollout, resolve=False)
    return {name: value for name, value in rollout["engine_kwargs"]["vllm"].items() if value is not None}, config


def test_our_settings_are_no_part_of_vllms_compile_hash(tmp_path, monkeypatch):
    from transformers import Qwen2Config
    from vllm.engine.arg_utils import EngineArgs

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    shape = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    Qwen2Config(architectures=["Qwen2ForCausalLM"], **shape).save_pretrained(tmp_path)

    def compile_hash(*overrides):
        given, _ = vllm_arguments(*overrides)
        arguments = EngineArgs(model=str(tmp_path), skip_tokenizer_init=True, dtype="float32", max_model_len=512, **given)
        return arguments.create_engine_config().compute_hash()

    stock = compile_hash()
    layout = ("heddle.layout.enable=true", "heddle.layout.fixed=[2,1,1]")
    for changed in ([], ["heddle.preempt.margin=9"], ["heddle.priority.quantum_tokens=9"], layout, ["heddle.preempt.enable=false"]):
        assert compile_hash("+plugin=heddle", *changed) == stock


def test_our_settings_reach_the_rollout_config():
    _, config = vllm_arguments("+plugin=heddle", "heddle.preempt.margin=9", "heddle.layout.fixed=[2,1,1]")
    rollout = config.actor_rollout_ref.rollout
    assert handed_on(rollout, "preempt")["margin"] == 9 and handed_on(rollout, "layout")["fixed"] == [2, 1, 1]
    _, config = vllm_arguments("+plugin=observe")
    assert handed_on(config.actor_rollout_ref.rollout, "preempt") == {}


WORKER = "verl_heddle.verl_plugin.agent_loop"
"""Imported by every agent-loop worker."""

VERLS_OWN = "verl.trainer.ppo.v1.agent_loop_tq"


def test_a_worker_does_not_import_vllm():
    """vLLM is 700 modules and 150 MB in each worker; what verl itself imports of it (none in 0.9.1) is not counted."""

    count = "sum(name.partition('.')[0] == 'vllm' for name in sys.modules)"
    script = f"import sys, {VERLS_OWN}; before = {count}; import {WORKER}; print(before, {count})"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, timeout=300, check=True)
    before, after = map(int, done.stdout.split()[-2:])
    assert after == before


def test_vllm_has_the_connectors_that_are_taken_for_host_tiers():
    from vllm.config import CacheConfig
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    missing = [name for name in TIERS if name not in KVConnectorFactory._registry]
    assert set(missing) <= {"SimpleCPUOffloadConnector", "LMCacheMPConnector"}, "which came after 0.24"
    assert "kv_offloading_size" in {field.name for field in fields(CacheConfig)}


def test_which_host_tiers_vllm_empties_with_a_weight_update():
    """A tier that does not implement `reset_cache` is taken for empty, and turns find contexts of the old weights: those are named."""
    folder = Path(kv_connectors.__file__).parent
    files = {"OffloadingConnector": "offloading_connector.py", "SimpleCPUOffloadConnector": "simple_cpu_offload_connector.py"}
    files |= {"LMCacheConnectorV1": "lmcache_connector.py", "LMCacheMPConnector": "lmcache_mp_connector.py"}
    empties = {name: "def reset_cache(" in (folder / files[name]).read_text() for name in TIERS if (folder / files[name]).exists()}
    assert empties == {name: not name.startswith(KEEPS_OLD) for name in empties}


@pytest.mark.parametrize(
    ("mode", "call"),
    [(mode, "wake_up") for mode in ("HYBRID", "COLOCATED")] + [("HYBRID", "resume_kv_cache"), ("HYBRID", "clear_kv_cache")],
)
async def test_verl_empties_the_host_tier_with_every_weight_update(mode, call):
    from verl.workers.rollout.replica import RolloutMode

    made, done = server(), []

    class Engine:
        def __getattr__(self, name):
            async def method(*args, **kwargs):
                done.append((name, kwargs))

            return method

    made.engine, made.node_rank, made.rollout_mode = Engine(), 0, RolloutMode[mode]
    made.config = OmegaConf.create({"free_cache_engine": True, "enable_sleep_mode": True})
    made._get_wake_up_tags = lambda: ["kv_cache", "weights"]
    await getattr(made, call)()
    woken = [number for number, (name, _) in enumerate(done) if name == "wake_up"]
    emptied = [number for number, (name, told) in enumerate(done) if name == "reset_prefix_cache" and told.get("reset_connector")]
    assert emptied and emptied[-1] > max(woken, default=-1), done


@pytest.mark.parametrize(
    ("told", "gib", "said"),
    [
        ({"gib": None}, 40.0, "is kept in 40.0 GiB"),
        ({"gib": 12}, 12.0, "is kept in 12.0 GiB"),
        ({"gib": 790}, None, "OFF: its share would be 790.0 GiB of the host's 800.0 GiB"),
        ({"gib": None, "host_share": 0.001}, None, "OFF: its share would be 0.1 GiB"),
        ({"enable": False}, None, None),
    ],
)
def test_a_host_tier_has_its_part_of_what_is_free(told, gib, said, monkeypatch, capsys):
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=800 * 2**30))
    monkeypatch.setattr(log, "_said", set())
    made, args = server(), SimpleNamespace(kv_offloading_size=None)
    whole = {"enable": True, "gib": None, "host_share": 0.4, "gpus_per_host": 16} | told
    made.config = OmegaConf.create({"tensor_model_parallel_size": 2, "custom": {"heddle": {"offload": whole}}})
    made._hand_on(args)
    assert args.kv_offloading_size == gib and (said or "") in capsys.readouterr().err


def test_vllm_takes_the_size_of_a_host_tier_from_its_command_line():
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    args = parser.parse_args(["--model", "m"])
    assert args.kv_offloading_size is None and "kv_offloading_size" in {field.name for field in fields(AsyncEngineArgs)}
