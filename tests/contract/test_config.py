"""The flag on verl's own config: stock without it, documented keys with it, everything overridable, mistakes refused early."""

import os
import pickle
import subprocess
import sys
from functools import cache, partial
from pathlib import Path

import pytest
from engines import PREDICTING
from omegaconf import OmegaConf

pytest.importorskip("verl")

from preloaded import Preloaded

from verl_heddle.verl_plugin import lint, parts, startup
from verl_heddle.verl_plugin.overrides import GROUPS, compose, read
from verl_heddle.verl_plugin.settings import handed_on

BASE = ["actor_rollout_ref.rollout.name=vllm", "trainer.default_local_dir=/tmp/heddle-test"]
stock_config = cache(partial(compose, []))


def flat(config, prefix=""):
    for key, value in config.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def plain(overrides):
    return dict(flat(OmegaConf.to_container(compose(overrides), resolve=False)))


@pytest.mark.parametrize("flag", ["+plugin=heddle", "+plugin=observe", "+machine=cpu"])
def test_with_a_flag_only_documented_keys_differ(flag):
    stock, ours = plain(BASE), plain([*BASE, flag])
    documented = {item.key for group in GROUPS for item in read(group, stock_config())}
    changed = {key for key in ours if key not in stock or ours[key] != stock[key]}
    undocumented = {key for key in changed if key not in documented and not key.startswith("heddle.")}
    # an interpolation of a whole node shows as its key; an empty node of verl's vanishes when it gets its first key
    assert not undocumented
    gone = {key for key in stock if key not in ours}
    empty = ("trainer.v1.sampler.sampler_kwargs", "actor_rollout_ref.model.override_config", "actor_rollout_ref.rollout.engine_kwargs.vllm")
    assert gone <= set(empty)


@pytest.mark.parametrize("group", GROUPS)
def test_every_key_says_why_and_can_be_overridden_after_the_flag(group):
    flag, items = "+" + group.replace("/", "="), read(group, stock_config())
    assert [item.key for item in items if not item.why] == []
    keys = [item.key for item in items if not item.key.startswith("hydra.") and "observe" not in item.key]
    composed = plain([*BASE, flag, *(f"{key}=7" for key in keys)])
    assert [key for key in keys if composed[key] not in (7, "7")] == []


def test_what_stock_verl_takes_with_a_plus_it_takes_beside_the_flag():
    """Hydra refuses `+key` where the key has a value: the flag must not be what gives it one."""
    stock = [item for item in read("plugin/heddle", stock_config()) if item.stock is None and "heddle" not in item.key]
    assert len(stock) >= 6
    for sign in ("+", "++"):
        words = [f"{sign}{item.key}=7" for item in stock]
        composed, ours = plain([*BASE, *words]), plain([*BASE, "+plugin=heddle", *words])
        assert all(composed[item.key] == ours[item.key] == 7 for item in stock)
    assert all(plain([*BASE, *words, "+plugin=heddle"])[item.key] == 7 for item in stock), "in any order"
    config = compose([*BASE, "+plugin=heddle"])
    for item in stock:  # and where nobody does, they are the flag's
        assert str(OmegaConf.select(config, item.key)).endswith(str(item.value).rpartition(":")[2].rstrip("}")), item.key


@pytest.fixture(scope="module")
def bare():
    """Python that has imported verl alone, as every process of a run does."""
    python = Preloaded("verl")
    yield python
    python.close()


def test_the_flags_values_hold_in_the_task_runners_process(tmp_path, bare):
    """verl resolves the configuration there, once Ray has carried it over."""
    (tmp_path / "config").write_bytes(pickle.dumps(compose([*BASE, "+plugin=heddle"])))
    code = (
        "import pickle, verl; from omegaconf import OmegaConf\n"
        f"config = pickle.load(open({str(tmp_path / 'config')!r}, 'rb')); OmegaConf.resolve(config)\n"
        "print(config.trainer.v1.sampler.custom_sampler, config.actor_rollout_ref.rollout.router_config_path)"
    )
    done = bare.run(["-c", code], tmp_path, os.environ)
    assert "{'path': 'pkg://verl_heddle.verl_plugin.gate', 'name': 'Sampler'}" in done.stdout and "router.yaml" in done.stdout, done.stderr


@pytest.mark.parametrize("name", ["project_name", "experiment_name"])
def test_a_run_without_a_name_has_a_trace_all_the_same(name):
    config = compose([*BASE, "+plugin=heddle", f"trainer.{name}=null"])
    assert lint.lint(config) == [] and lint.options_or_none(config).trace.workload


def test_what_the_flag_hands_on_may_be_missing():
    config = compose(
        [*BASE, "+plugin=heddle", "~algorithm.filter_groups", "~reward.reward_model", "~trainer.v1.sampler.sync_refill_failed_groups"]
    )
    ours = OmegaConf.to_container(config.trainer.v1.sampler.sampler_kwargs.heddle, resolve=True)
    assert ours["filter_groups"] is None and ours["reward_model"] is None and not ours["sync_refill_failed_groups"]


def test_options_can_be_set_and_are_typed():
    config = compose([*BASE, "+plugin=heddle", "heddle.priority.quantum_tokens=8", "heddle.observe=true"])
    assert config.heddle.priority.quantum_tokens == 8 and lint.options_or_none(config).observe
    with pytest.raises(Exception, match=r"quantum_tokens"):
        compose([*BASE, "+plugin=heddle", "heddle.priority.quantum_tokens=many"])


def test_a_good_config_has_no_findings():
    assert lint.lint(compose([*BASE, "+plugin=heddle"])) == []
    assert lint.lint(compose([*BASE, "+plugin=observe"])) == []


def test_a_flag_that_verl_is_told_not_to_load_is_refused(monkeypatch):
    config = compose([*BASE, "+plugin=heddle"])
    for value, fatal in (("none", True), ("other", True), ("other, heddle", False), ("auto", False)):
        monkeypatch.setenv("VERL_USE_EXTERNAL_PLUGINS", value)
        assert [f.fatal for f in lint.lint(config)] == [True] * fatal


@pytest.mark.parametrize(
    ("override", "word"),
    [
        ("actor_rollout_ref.rollout.disable_log_stats=true", "disable_log_stats"),
        ("actor_rollout_ref.rollout.agent.agent_loop_manager_class=mine.Manager", "agent_loop_manager_class"),
        ("actor_rollout_ref.rollout.router_config_path=mine.yaml", "router_config_path"),
        ("actor_rollout_ref.model.external_lib=null", "a replica that dies"),
        ("trainer.v1.sampler.custom_sampler.path=pkg://mine", "custom_sampler"),
    ],
)
def test_what_weakens_heddle_is_a_warning(override, word):
    findings = lint.lint(compose([*BASE, "+plugin=heddle", override]))
    assert [f.fatal for f in findings] == [False] and word in findings[0].text


VLLM = "actor_rollout_ref.rollout.engine_kwargs.vllm"

TAKEN = {
    "its scheduler": (["~" + VLLM], ["priority updates", "preemption"]),
    "another scheduler": ([f"{VLLM}.scheduler_cls=theirs.Scheduler"], ["priority updates", "preemption"]),
    "a KV connector": ([f"+{VLLM}={{kv_transfer_config: {{kv_connector: NixlConnector}}}}"], ["preemption"]),
    "speculative decoding": ([f"+{VLLM}.speculative_config={{method: ngram}}"], ["preemption"]),
    "verl's speculative decoding": (
        ["actor_rollout_ref.model.mtp.enable=true", "actor_rollout_ref.model.mtp.enable_rollout=true"],
        ["preemption"],
    ),
    "pipeline parallelism": (["actor_rollout_ref.rollout.pipeline_model_parallel_size=2"], ["preemption"]),
    "pipeline parallelism in vLLM's words": ([f"+{VLLM}.pipeline_parallel_size=2"], ["preemption"]),
    "no statistics in vLLM's words": ([f"+{VLLM}.disable_log_stats=true"], ["queueing"]),
    "no sampler": (
        ["trainer.v1.sampler.custom_sampler.path=null"],
        ["metrics", "trace", "prediction", "checkpoint"],
    ),
    "a callback": (["trainer.checkpoint_callback_class=theirs.Callback"], ["checkpoint"]),
    "the ranks' module": (["actor_rollout_ref.model.external_lib=theirs"], ["replica loss"]),
    "a router": (["actor_rollout_ref.rollout.router_config_path=theirs.yaml"], "everything"),
    "a manager": (["actor_rollout_ref.rollout.agent.agent_loop_manager_class=theirs.Manager"], "everything"),
    "no manager": (["actor_rollout_ref.rollout.agent.agent_loop_manager_class=null"], "everything"),
}
"""Accepted by verl -> overrides, and the parts that are off by it."""


@pytest.mark.parametrize("what", TAKEN)
def test_the_table_shows_what_a_configuration_takes_away(what):
    overrides, off = TAKEN[what]
    config = compose([*BASE, "+plugin=heddle", *PREDICTING, *overrides])
    options = lint.options_or_none(config)
    wanted = [part for part, why in parts.asked(options).items() if not why]
    assert [row.part for row in parts.table(config, options) if not row.on and row.part in wanted] == (
        wanted if off == "everything" else off
    )
    findings = lint.lint(config)
    assert findings and not any(finding.fatal for finding in findings), "stock would run"
    assert any(finding.grave for finding in findings) == (what in ("a router", "a manager", "no manager", "no sampler"))
    assert (lint.idle(config) is not None) == (off == "everything")


def test_the_table_shows_what_is_off_by_choice():
    config = compose([*BASE, "+plugin=heddle"])
    off = {row.part: row.why for row in parts.table(config, lint.options_or_none(config)) if not row.on}
    assert off == {
        "priority updates": "heddle.priority.order=arrival",
        "preemption": "heddle.preempt.enable=false",
        "admission": "replaced by heddle.residents",
        "offload": "heddle.offload.enable=false",
        "prediction": "no part needs it",
        "checkpoint": "no part learns",
        "placement": "heddle.place.enable=false",
        "layout": "heddle.layout.enable=false",
        "shaping": "heddle.shape.enable=false",
        "stopping": "heddle.shape.enable=false",
    }
    quiet = compose([*BASE, "+plugin=heddle", f"+{VLLM}.kv_transfer_config={{a: 1}}"])
    assert lint.lint(quiet) == [], "a part nobody asked for is not missed"


def test_what_resident_sets_cannot_work_with_is_said():
    ours = [*BASE, "+plugin=heddle"]
    config = compose(ours)
    on = {row.part: row.why for row in parts.table(config, lint.options_or_none(config))}
    assert on["residents"] == parts.DOES["residents"] and on["admission"] == "replaced by heddle.residents" and lint.lint(config) == []
    for key, text in (
        ("full_determinism=true", "assigned to replicas by hash"),
        ("enable_prefix_caching=false", "nothing stays resident during a tool call"),
    ):
        findings = lint.lint(compose([*ours, f"actor_rollout_ref.rollout.{key}"]))
        assert len(findings) == 1 and not findings[0].fatal and text in findings[0].text
    for tier in ("kv_offloading_size=100", "kv_transfer_config={kv_connector: OffloadingConnector}"):
        findings = lint.lint(compose([*ours, f"+{VLLM}.{tier}"]))
        assert (
            len(findings) == 1 and not findings[0].fatal and "(OffloadingConnector): evicted contexts are loaded back" in findings[0].text
        )
    (tier, old) = lint.lint(compose([*ours, f"+{VLLM}.kv_transfer_config={{kv_connector: LMCacheConnectorV1}}"]))
    assert "evicted contexts" in tier.text and old.grave and "contexts of the old weights" in old.text
    planned = compose([*ours, "heddle.place.enable=true"])
    off = {row.part: row.why for row in parts.table(planned, lint.options_or_none(planned)) if not row.on}
    assert off["residents"] == "heddle.place.enable=true" and "admission" not in off


def test_offload_is_handed_on_or_refused():
    ours = [*BASE, "+plugin=heddle", "heddle.offload.enable=true", "heddle.offload.gib=64"]
    config = compose(ours)
    told = handed_on(config.actor_rollout_ref.rollout, "offload")
    assert told == {"enable": True, "gib": 64.0, "host_share": 0.4, "gpus_per_host": config.trainer.n_gpus_per_node}
    rows = {row.part: row for row in parts.table(config, lint.options_or_none(config))}
    assert rows["offload"].on and not rows["residents"].on and not any(finding.fatal for finding in lint.lint(config))
    for key, text in {
        "trainer.device=cpu": "needs CUDA",
        f"+{VLLM}.kv_offloading_size=10": "kv_offloading_size both set vLLM's KV connector",
        f"+{VLLM}.kv_transfer_config={{kv_connector: NixlConnector}}": "kv_transfer_config both set",
        "actor_rollout_ref.rollout.enable_prefix_caching=false": "to find offloaded contexts",
        "heddle.layout.enable=true": "sleeping engines would pin host memory",
        "heddle.offload.host_share=0": "host_share must be above 0",
        "heddle.offload.gib=0": "gib must be positive",
    }.items():
        assert any(finding.fatal and text in finding.text for finding in lint.lint(compose([*ours, key]))), key
    assert not any(finding.fatal for finding in lint.lint(compose([*BASE, "+plugin=observe", "heddle.offload.enable=true"])))


def test_what_the_engine_is_told_beside_verls_keys_counts():
    findings = lint.lint(compose([*BASE, "+plugin=heddle", f"+{VLLM}.max_num_seqs=512"]))
    assert len(findings) == 1 and "set actor_rollout_ref.rollout.max_num_seqs=512" in findings[0].text
    findings = lint.lint(compose([*BASE, "+plugin=heddle", f"+{VLLM}.scheduling_policy=fcfs"]))
    assert [f.fatal for f in findings] == [True] and f"{VLLM}.scheduling_policy=priority" in findings[0].text
    findings = lint.lint(compose([*BASE, "+plugin=heddle", *PREDICTING, "actor_rollout_ref.rollout.custom=null"]))
    assert [f.fatal for f in findings] == [False] and "heddle.preempt.* does not reach" in findings[0].text


def test_a_class_that_derives_from_heddles_is_heddles(tmp_path, monkeypatch):
    (tmp_path / "theirs_on_ours.py").write_text(
        "from verl_heddle.verl_plugin import gate\n"
        "class Manager(gate.AgentLoopManager): pass\nclass Callback(gate.CheckpointCallback): pass\nclass Other: pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    keys = "actor_rollout_ref.rollout.agent.agent_loop_manager_class", "trainer.checkpoint_callback_class"
    assert lint.lint(compose([*BASE, "+plugin=heddle", f"{keys[0]}=theirs_on_ours.Manager", f"{keys[1]}=theirs_on_ours.Callback"])) == []
    assert lint.idle(compose([*BASE, "+plugin=heddle", f"{keys[0]}=theirs_on_ours.Other"])) is not None


def test_a_trainer_that_derives_from_verls_sync_is_taken(monkeypatch):
    from verl.trainer.ppo.v1 import PPOTrainer, PPOTrainerSync, trainer_base

    theirs = {"sync_theirs": type("Theirs", (PPOTrainerSync,), {}), "other": type("Other", (PPOTrainer,), {})}
    monkeypatch.setattr(trainer_base, "TRAINER_REGISTRY", trainer_base.TRAINER_REGISTRY | theirs)
    known = {
        "sync_theirs": "",
        "other": "does not derive from verl's PPOTrainerSync",
        "nowhere": "VERL_USE_EXTERNAL_MODULES",
    }
    for mode, why in known.items():
        findings = lint.lint(compose([*BASE, "+plugin=heddle", f"trainer.v1.trainer_mode={mode}"]))
        assert [f.fatal for f in findings] == [True] * bool(why) and all(why in f.text for f in findings)


@pytest.mark.parametrize("mode", lint.MODES)
def test_what_asynchronous_trainers_do_not_go_with_is_refused(mode):
    flags = [*BASE, "+plugin=heddle", f"trainer.v1.trainer_mode={mode}"]
    assert lint.lint(compose(flags)) == [] == lint.lint(compose([*flags[:-2], "+plugin=observe", flags[-1]]))
    assert f"trainer: {mode}" in startup.banner(compose(flags))
    refused = {
        "place": ["heddle.place.enable=true"],
        "shape": ["heddle.shape.enable=true", "actor_rollout_ref.rollout.n=4"],
        "order": ["heddle.priority.order=longest"],
    }
    for key, overrides in refused.items():
        fatal = [finding.text for finding in lint.lint(compose([*flags, *overrides])) if finding.fatal]
        assert len(fatal) == 1 and f"heddle.{'priority.order' if key == 'order' else key}" in fatal[0] and mode in fatal[0], fatal


def test_weights_need_an_estimator_that_takes_them():
    shaped = [*BASE, "+plugin=heddle", "actor_rollout_ref.rollout.n=4", "heddle.shape.enable=true", "heddle.shape.corrected=true"]
    findings = lint.lint(compose([*shaped, "algorithm.adv_estimator=grpo"]))
    assert [f.fatal for f in findings] == [True] and "set algorithm.adv_estimator=heddle_grpo" in findings[0].text
    assert lint.lint(compose([*shaped, "algorithm.adv_estimator=heddle_grpo"])) == []


LAYOUT = [
    "+plugin=heddle",
    "heddle.layout.enable=true",
    "heddle.place.enable=true",
    "actor_rollout_ref.rollout.tensor_model_parallel_size=1",
]


@pytest.mark.parametrize(
    ("overrides", "word"),
    [
        (["heddle.layout.fixed=[4,2,1]"], "takes 7 GPUs, there are 8"),
        (["heddle.layout.fixed=[8,0]"], "degree 0"),
        (["heddle.layout.fixed=[6,2]"], "tp=6 does not divide the model's 4 attention heads"),
        (["heddle.layout.fixed=[2,1,1]", "trainer.n_gpus_per_node=2"], "takes 4 GPUs, there are 2"),
        (["heddle.layout.fixed=[1,2,1]", "trainer.n_gpus_per_node=2", "trainer.nnodes=2"], "spans two nodes"),
        (["heddle.layout.schedule={1: [8], 5: [4,4,4]}"], "schedule[5]"),
        (["heddle.layout.schedule={0: [8]}"], "from 1"),
        (["heddle.layout.schedule=[8]"], "must map"),
        (["heddle.layout.engines=0"], "engines"),
        (["heddle.layout.margin=2"], "margin"),
        ([], "qwen3-14b/h200"),
        (["heddle.layout.times=gpt-9/h200"], "gpt-9"),
        (["heddle.layout.times=qwen3-8b/h200", "actor_rollout_ref.rollout.gpu_memory_utilization=0.02"], "in 0.02 of the memory"),
        (["heddle.layout.fixed=[4,4]", "heddle.observe=true"], "observe"),
        (["heddle.layout.fixed=[4,4]", "actor_rollout_ref.rollout.tensor_model_parallel_size=2"], "set it to 1"),
        (["heddle.layout.fixed=[4,4]", "actor_rollout_ref.rollout.custom=null"], "would have no effect"),
        (["heddle.layout.fixed=[4,4]", "actor_rollout_ref.model.lora_rank=8"], "does not work with unmerged LoRA"),
        (["heddle.layout.fixed=[4,4]", "actor_rollout_ref.model.lora.rank=8"], "does not work with unmerged LoRA"),
        (["heddle.layout.schedule={1: [8], 5: [4,4]}", "+actor_rollout_ref.rollout.enable_sleep_mode=false"], "free their memory"),
        (["heddle.layout.times=qwen3-8b/h200", "actor_rollout_ref.rollout.free_cache_engine=false"], "free their memory"),
    ],
)
def test_layouts_that_cannot_be_are_refused_with_the_reason(overrides, word, tmp_path):
    (tmp_path / "config.json").write_text('{"num_attention_heads": 4, "num_key_value_heads": 4}')
    findings = lint.lint(compose([*BASE, *LAYOUT, f"actor_rollout_ref.model.path={tmp_path}", *overrides]))
    assert [f for f in findings if f.fatal and word in f.text], [f.text for f in findings]


def test_layouts_that_can_be_are_not():
    for good in ("heddle.layout.fixed=[4,2,1,1]", "heddle.layout.schedule={1: [8], 5: [4,4]}", "heddle.layout.times=qwen3-8b/h200"):
        assert lint.lint(compose([*BASE, *LAYOUT, good])) == []
    for good in (
        ["heddle.layout.fixed=[4,4]", "actor_rollout_ref.rollout.free_cache_engine=false"],
        ["heddle.layout.schedule={1: [8], 5: [8]}", "actor_rollout_ref.rollout.free_cache_engine=false"],
        ["heddle.layout.schedule={1: [8], 5: [4,4]}", "+machine=cpu", "trainer.n_gpus_per_node=8"],
        ["heddle.layout.fixed=[4,4]", "actor_rollout_ref.model.lora_rank=8", "actor_rollout_ref.model.lora.merge=true"],
    ):
        assert lint.lint(compose([*BASE, *LAYOUT, *good])) == [], good
    words = [*LAYOUT[:2], LAYOUT[3], "heddle.layout.fixed=[8]"]
    assert [f.fatal for f in lint.lint(compose([*BASE, *words]))] == [False], "without placement: a warning"


BAD = {
    "unknown option": ["heddle.nonsense=1"],
    "unknown option, appended": ["+heddle.nonsense=1"],
    "wrong type": ["heddle.priority.enable=perhaps"],
    "not a number": ["heddle.poll_interval_s=soon"],
    "out of range": ["heddle.priority.quantum_tokens=0"],
    "unknown transport": ["heddle.place.transport=pigeon"],
    "negative deadline": ["heddle.deadlines.router_s=-1"],
    "legacy trainer": ["trainer.use_v1=false"],
    "asynchronous trainer": ["trainer.v1.trainer_mode=separate_async", "heddle.place.enable=true"],
    "another engine": ["actor_rollout_ref.rollout.name=sglang"],
    "priority without the policy": ["actor_rollout_ref.rollout.scheduling_policy=fcfs"],
    "layout over the GPUs": [
        "heddle.layout.fixed=[4,2]",
        "heddle.layout.enable=true",
        "actor_rollout_ref.rollout.tensor_model_parallel_size=1",
    ],
    "trace folder is a file": ["heddle.trace.dir=/dev/null/x"],
    "misspelt flag": ["+plugin=hedle"],
}
"""Name -> what is wrong; run by verl's own entry point, one process each."""


@pytest.mark.parametrize("name", BAD)
def test_bad_config_ends_in_one_clear_line_before_ray_starts(name, tmp_path, preloaded):
    flag = [] if name == "misspelt flag" else ["+plugin=heddle"]
    words = ["-m", "verl.trainer.main_ppo", *BASE, *flag, *BAD[name], f"hydra.run.dir={tmp_path}"]
    done = preloaded.run(words, tmp_path, {k: v for k, v in os.environ.items() if k != "HYDRA_FULL_ERROR"})
    assert done.returncode not in (0, None)
    word = BAD[name][0].lstrip("+").split("=")[0].removeprefix("heddle.").split(".")[-1]
    ours = [line for line in done.stderr.splitlines() if "heddle: error" in line]
    hydras = [line for line in done.stderr.splitlines() if word in line or "hedle" in line]
    assert len(ours) == 1 or (not ours and hydras), done.stderr
    assert "Traceback" not in done.stderr
    assert "Started a local Ray instance" not in done.stderr


def test_the_banner_tells_what_is_on(capsys, monkeypatch):
    monkeypatch.setattr(startup.nodes, "ready", lambda config: True)
    start = startup.Startup().on_job_start
    start(compose([*BASE, "+plugin=heddle"]))
    assert "placement: resident sets, least served first; priority: by arrival, validation first; poll" in capsys.readouterr().err
    start(compose([*BASE, "+plugin=heddle", *PREDICTING]))
    assert ", preempting on arrival" in capsys.readouterr().err
    start(compose([*BASE, "+plugin=heddle", *PREDICTING, "actor_rollout_ref.rollout.pipeline_model_parallel_size=2"]))
    assert ", preempting on arrival" not in capsys.readouterr().err
    start(compose([*BASE, "+plugin=heddle", "actor_rollout_ref.rollout.router_config_path=theirs.yaml"]))
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and "heddle does nothing" in said[0] and "OFF, the run continues as without the flag" in said[1]


def test_a_sweep_is_checked_job_by_job(tmp_path, preloaded):
    words = ["-m", "verl.trainer.main_ppo", *BASE, "+plugin=heddle", f"hydra.sweep.dir={tmp_path}", "heddle.poll_interval_s=-1,-2", "-m"]
    done = preloaded.run(words, tmp_path, os.environ)
    assert done.returncode == 2 and "heddle: error: heddle.poll_interval_s" in done.stderr and "Ray instance" not in done.stderr, (
        done.stderr
    )


def test_without_the_flag_verls_config_is_byte_for_byte_the_same(tmp_path, preloaded):
    """`--cfg job` with our distribution visible and with it hidden from Hydra and from verl's entry points."""
    hide = tmp_path / "hide"
    hide.mkdir()
    (hide / "sitecustomize.py").write_text(HIDE)
    words = ["-m", "verl.trainer.main_ppo", *BASE, "--cfg", "job"]
    visible = preloaded.run(words, tmp_path, os.environ)
    command, without = [sys.executable, "-W", "ignore", *words], os.environ | {"PYTHONPATH": str(hide)}
    hidden = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path, env=without)
    assert visible.returncode == hidden.returncode == 0, visible.stderr + hidden.stderr
    assert "HIDDEN" in hidden.stdout and hidden.stdout.replace("HIDDEN\n", "") == visible.stdout


HIDE = """
import importlib.metadata as metadata, importlib.util, sys
class Hider:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "verl_heddle" or name.startswith("hydra_plugins.verl_heddle"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hider())
original = metadata.entry_points
metadata.entry_points = lambda **kw: [e for e in original(**kw) if not e.value.startswith("verl_heddle")] if kw else original()
import warnings; warnings.simplefilter("ignore")
if any("main_ppo" in a for a in sys.orig_argv): print("HIDDEN")
"""


def test_importing_the_plugin_imports_nothing_more_than_verl_does(tmp_path, bare):
    """But for modules of our own and of the standard library."""
    code = (
        "import verl, sys\n"
        "for name in [n for n in sys.modules if n.startswith('verl_heddle')]: del sys.modules[name]\n"
        "before = set(sys.modules)\n"
        "import verl_heddle.verl_plugin.plugin\n"
        "print(sorted({n.partition('.')[0] for n in set(sys.modules) - before} - sys.stdlib_module_names))"
    )
    done = bare.run(["-c", code], tmp_path, os.environ)
    assert done.stdout.splitlines()[-1:] == ["['verl_heddle']"], done.stderr


def test_the_generated_docs_page_is_up_to_date():
    from verl_heddle.verl_plugin.overrides import markdown

    page = Path(__file__).parents[2] / "docs" / "configuration.md"
    assert page.read_text() == markdown(), "run `make docs`"
