"""The flag on verl's own config: stock without it, documented keys with it, everything overridable, mistakes refused early."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

pytest.importorskip("verl")

from verl_heddle.verl_plugin import lint
from verl_heddle.verl_plugin.overrides import GROUPS, arguments_of, compose, read

BASE = ["actor_rollout_ref.rollout.name=vllm", "trainer.default_local_dir=/tmp/heddle-test"]


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
    documented = {item.key for group in GROUPS for item in read(group)}
    changed = {key for key in ours if key not in stock or ours[key] != stock[key]}
    undocumented = {key for key in changed if key not in documented and not key.startswith("heddle.")}
    # an interpolation of a whole node shows as its key; an empty node of verl's vanishes when it gets its first key
    assert not undocumented
    gone = {key for key in stock if key not in ours}
    empty = ("trainer.v1.sampler.sampler_kwargs", "actor_rollout_ref.model.override_config", "actor_rollout_ref.rollout.engine_kwargs.vllm")
    assert gone <= set(empty)


@pytest.mark.parametrize("group", GROUPS)
def test_every_key_says_why_and_can_be_overridden_after_the_flag(group):
    flag = "+" + group.replace("/", "=")
    for item in read(group):
        assert item.why, item.key
        if item.key.startswith("hydra."):
            continue
        value = plain([*BASE, flag, f"{item.key}=7"])[item.key] if "observe" not in item.key else 7
        assert value in (7, "7"), item.key


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
        (["heddle.layout.fixed=[1,2,1]", "trainer.n_gpus_per_node=2", "trainer.nnodes=2"], "across nodes"),
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
        (["heddle.layout.fixed=[4,4]", "actor_rollout_ref.rollout.custom=null"], "without effect"),
    ],
)
def test_layouts_that_cannot_be_are_refused_with_the_reason(overrides, word, tmp_path):
    (tmp_path / "config.json").write_text('{"num_attention_heads": 4, "num_key_value_heads": 4}')
    findings = lint.lint(compose([*BASE, *LAYOUT, f"actor_rollout_ref.model.path={tmp_path}", *overrides]))
    assert [f for f in findings if f.fatal and word in f.text], [f.text for f in findings]


def test_layouts_that_can_be_are_not():
    for good in ("heddle.layout.fixed=[4,2,1,1]", "heddle.layout.schedule={1: [8], 5: [4,4]}", "heddle.layout.times=qwen3-8b/h200"):
        assert lint.lint(compose([*BASE, *LAYOUT, good])) == []
    words = [*LAYOUT[:2], LAYOUT[3], "heddle.layout.fixed=[8]"]
    assert [f.fatal for f in lint.lint(compose([*BASE, *words]))] == [False], "without placement: a warning"


def test_arguments_of_a_command_line():
    command = ["python", "-W", "ignore", "-m", "verl.trainer.main_ppo", "a.b=1", "+plugin=heddle", "~c"]
    assert arguments_of(command) == ["a.b=1", "+plugin=heddle", "~c"]
    assert arguments_of(["a.b=1"]) == ["a.b=1"]


BAD = {
    "unknown option": ["heddle.nonsense=1"],
    "unknown option, appended": ["+heddle.nonsense=1"],
    "wrong type": ["heddle.priority.enable=perhaps"],
    "not a number": ["heddle.poll_interval_s=soon"],
    "out of range": ["heddle.priority.quantum_tokens=0"],
    "unknown transport": ["heddle.place.transport=pigeon"],
    "negative deadline": ["heddle.deadlines.router_s=-1"],
    "legacy trainer": ["trainer.use_v1=false"],
    "asynchronous trainer": ["trainer.v1.trainer_mode=separate_async"],
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
"""Name -> what is wrong; run as a user would, one process each."""


@pytest.mark.parametrize("name", BAD)
def test_bad_config_ends_in_one_clear_line_before_ray_starts(name, tmp_path):
    flag = [] if name == "misspelt flag" else ["+plugin=heddle"]
    command = [sys.executable, "-W", "ignore", "-m", "verl.trainer.main_ppo", *BASE, *flag, *BAD[name], f"hydra.run.dir={tmp_path}"]
    environment = {k: v for k, v in os.environ.items() if k not in ("HYDRA_FULL_ERROR", "PYTHONDONTWRITEBYTECODE")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path, env=environment)
    assert done.returncode not in (0, None)
    word = BAD[name][0].lstrip("+").split("=")[0].removeprefix("heddle.").split(".")[-1]
    ours = [line for line in done.stderr.splitlines() if "heddle: error" in line]
    hydras = [line for line in done.stderr.splitlines() if word in line or "hedle" in line]
    assert len(ours) == 1 or (not ours and hydras), done.stderr
    assert "Traceback" not in done.stderr
    assert "Started a local Ray instance" not in done.stderr


def test_without_the_flag_verls_config_is_byte_for_byte_the_same(tmp_path):
    """`--cfg job` with our distribution visible and with it hidden from Hydra and from verl's entry points."""
    hide = tmp_path / "hide"
    hide.mkdir()
    (hide / "sitecustomize.py").write_text(HIDE)
    command = [sys.executable, "-W", "ignore", "-m", "verl.trainer.main_ppo", *BASE, "--cfg", "job"]
    outputs = []
    for extra in ({}, {"PYTHONPATH": str(hide)}):
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path, env=os.environ | extra)
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout)
    assert "HIDDEN" in outputs[1] and outputs[1].replace("HIDDEN\n", "") == outputs[0]


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


def test_importing_the_plugin_imports_nothing_more_than_verl_does():
    """But for modules of our own and of the standard library."""
    code = (
        "import verl, sys\n"
        "for name in [n for n in sys.modules if n.startswith('verl_heddle')]: del sys.modules[name]\n"
        "before = set(sys.modules)\n"
        "import verl_heddle.verl_plugin.plugin\n"
        "print(sorted({n.partition('.')[0] for n in set(sys.modules) - before} - sys.stdlib_module_names))"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines()[-1:] == ["['verl_heddle']"], done.stderr


def test_the_generated_docs_page_is_up_to_date():
    from verl_heddle.verl_plugin.overrides_page import markdown

    page = Path(__file__).parents[2] / "docs" / "configuration.md"
    assert page.read_text() == markdown(), "run `make docs`"
