"""What can be wrong with a verl configuration that asks for heddle, one plain line each: what is wrong, and what to change.

Reads the composed config only; imports neither verl nor ray, so that it answers before anything expensive starts.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from verl_heddle.layout.feasible import problems as layout_problems
from verl_heddle.options import Options, check
from verl_heddle.shape.settings import check as shape_problems
from verl_heddle.verl_plugin.layout_choice import first, times
from verl_heddle.verl_plugin.settings import ADVANTAGES, options_of

GATE = "verl_heddle.verl_plugin.gate"
TRAINER_RANK = "verl_heddle.verl_plugin.trainer_rank"
SCHEDULER = "verl_heddle.verl_plugin.vllm_scheduler.HeddleScheduler"

MODES = {
    "colocate_async": "its trainer aborts and resumes requests inside a trajectory, which heddle does not follow",
    "separate_async": "its rollout replicas come and go with the trainer's, which heddle does not follow",
}
"""verl's other trainer modes, and why heddle refuses them."""


@dataclass(frozen=True, slots=True)
class Finding:
    """`fatal` stops the run; others are said and the run goes on."""

    fatal: bool
    text: str

    def __str__(self) -> str:
        return f"{'error' if self.fatal else 'warning'}: {self.text}"


def options_or_none(config: DictConfig) -> Options | None:
    """The options if they fit the schema."""
    try:
        return options_of(config)
    except OmegaConfBaseException:
        return None


def lint(config: DictConfig) -> list[Finding]:
    """Findings, fatal ones first."""
    findings = [Finding(True, text) for text in _options(config)]
    if not findings:
        options = options_of(config)
        findings += [Finding(True, text) for text in _verl(config, options)]
        findings += [Finding(False, text) for text in _weakened(config, options)]
    return findings


def _get(config: DictConfig, key: str) -> Any:
    return OmegaConf.select(config, key, throw_on_missing=False)


def _options(config: DictConfig) -> list[str]:
    try:
        options = options_of(config)
    except OmegaConfBaseException as error:
        return [" ".join(str(error).split())]
    return check(options)


def _verl(config: DictConfig, options: Options) -> list[str]:
    problems = []
    plugins = os.environ.get("VERL_USE_EXTERNAL_PLUGINS", "auto").strip().lower()
    if plugins != "auto" and "heddle" not in (name.strip() for name in plugins.split(",")):
        problems.append(f"VERL_USE_EXTERNAL_PLUGINS={plugins} keeps verl from loading heddle: unset it, or add heddle to the list")
    if not _get(config, "trainer.use_v1"):
        problems.append("heddle needs verl's v1 trainer: set trainer.use_v1=true")
    mode = _get(config, "trainer.v1.trainer_mode")
    if mode != "sync":
        why = MODES.get(mode, "heddle does not know it")
        problems.append(f"trainer.v1.trainer_mode={mode} is not supported ({why}): set trainer.v1.trainer_mode=sync or drop the flag")
    rollout = "actor_rollout_ref.rollout"
    if _get(config, f"{rollout}.name") != "vllm":
        name = _get(config, f"{rollout}.name") or "(not set)"
        problems.append(f"heddle runs on vLLM, but {rollout}.name={name}: set {rollout}.name=vllm or drop the flag")
    priority = options.priority.enable and not options.observe
    if priority and _get(config, f"{rollout}.scheduling_policy") != "priority":
        policy = _get(config, f"{rollout}.scheduling_policy")
        problems.append(
            f"heddle.priority.enable=true needs {rollout}.scheduling_policy=priority, but it is {policy}: set one of them accordingly"
        )
    if options.preempt.enable and not priority and not options.observe:
        problems.append("heddle.preempt.enable=true needs heddle.priority.enable=true: set both, or heddle.preempt.enable=false")
    if options.shape.enable and not options.observe:
        problems += shape_problems(options.shape, int(_get(config, f"{rollout}.n") or 1))
        estimator = _get(config, "algorithm.adv_estimator")
        if options.shape.corrected and estimator != ADVANTAGES:
            problems.append(
                f"heddle.shape.corrected=true weights advantages, but algorithm.adv_estimator={estimator} takes no weights: "
                f"set algorithm.adv_estimator={ADVANTAGES} (verl's grpo, weighted), or heddle.shape.corrected=false"
            )
    if options.layout.enable:
        problems += _layout(config, options)
    folder = str(_get(config, "heddle.trace.dir"))
    if options.trace.enable and not _writable(folder):
        problems.append(f"heddle.trace.dir={folder} cannot be written: name another folder, or set heddle.trace.enable=false")
    return problems


def _layout(config: DictConfig, options: Options) -> list[str]:
    """Why the GPUs cannot be cut as asked."""
    rollout = "actor_rollout_ref.rollout"
    if options.observe:
        return ["heddle.observe=true lets verl make the replicas: set heddle.layout.enable=false, or drop observe"]
    problems = []
    for name in ("tensor_model_parallel_size", "data_parallel_size", "pipeline_model_parallel_size"):
        if _get(config, f"{rollout}.{name}") != 1:
            now = _get(config, f"{rollout}.{name}")
            problems.append(f"heddle.layout.enable=true needs {rollout}.{name}=1, but it is {now}: set it to 1")
    for name in ("disaggregation.enabled", "prometheus.enable"):
        if _get(config, f"{rollout}.{name}"):
            problems.append(f"heddle.layout.enable=true does not go with {rollout}.{name}=true: set one of them to false")
    if not _get(config, f"{rollout}.engine_kwargs.vllm.additional_config.heddle_layout"):
        problems.append(
            f"{rollout}.engine_kwargs.vllm.additional_config is not heddle's, so heddle.layout.enable=true would be without effect: "
            "add heddle_layout to it as configs/plugin/heddle.yaml has it, or set heddle.layout.enable=false"
        )
    per_node, nodes = int(_get(config, "trainer.n_gpus_per_node") or 1), int(_get(config, "trainer.nnodes") or 1)
    heads, kv_heads = model_heads(str(_get(config, "actor_rollout_ref.model.path")))
    given = {"heddle.layout.fixed": options.layout.fixed} if options.layout.fixed else {}
    given |= {f"heddle.layout.schedule[{step}]": layout for step, layout in (options.layout.schedule or {}).items()}
    if not given:
        try:
            times(options.layout.times)
            first({"times": options.layout.times}, per_node * nodes, per_node, float(_get(config, f"{rollout}.gpu_memory_utilization")))
        except ValueError as error:
            problems.append(f"heddle.layout.times: {error}; or name the degrees yourself, as heddle.layout.fixed=[2,1,1]")
    for key, layout in given.items():
        problems += [f"{key}: {text}" for text in layout_problems(layout, per_node * nodes, per_node, heads, kv_heads)]
    return problems


def model_heads(model: str) -> tuple[int | None, int | None]:
    """Attention heads and KV heads of a model in a folder; None where that cannot be told."""
    try:
        with open(os.path.join(model, "config.json"), encoding="utf-8") as file:
            told = json.load(file)
        heads = told.get("num_attention_heads")
        return heads, told.get("num_key_value_heads", heads)
    except (OSError, ValueError):
        return None, None


def _weakened(config: DictConfig, options: Options) -> list[str]:
    rollout = "actor_rollout_ref.rollout"
    warnings = []
    expected = {
        f"{rollout}.agent.agent_loop_manager_class": (f"{GATE}.AgentLoopManager", "heddle does nothing"),
        "trainer.v1.sampler.custom_sampler.path": (f"pkg://{GATE}", "no heddle metrics, no trace, verl's 2 s poll"),
    }
    for key, (value, consequence) in expected.items():
        if _get(config, key) != value:
            warnings.append(f"{key} is not heddle's: {consequence}")
    if options.predict.checkpoint and not options.observe:
        expected_callback = f"{GATE}.CheckpointCallback"
        if _get(config, "trainer.checkpoint_callback_class") != expected_callback:
            warnings.append(
                "trainer.checkpoint_callback_class is not heddle's: what is learnt of lengths is not saved "
                "(heddle.predict.checkpoint=false silences this)"
            )
    if not options.observe and TRAINER_RANK not in str(_get(config, "actor_rollout_ref.model.external_lib")):
        warnings.append(
            f"actor_rollout_ref.model.external_lib does not name {TRAINER_RANK}: a replica that dies ends the run at the next weight update"
        )
    scheduler = _get(config, f"{rollout}.engine_kwargs.vllm.scheduler_cls")
    if options.preempt.enable and not options.observe and scheduler != SCHEDULER:
        warnings.append(f"{rollout}.engine_kwargs.vllm.scheduler_cls is not heddle's: no preemption on arrival")
    if options.shape.enable and not options.observe and scheduler != SCHEDULER:
        warnings.append(f"{rollout}.engine_kwargs.vllm.scheduler_cls is not heddle's: samples of no more use run to their turn's end")
    if options.layout.enable and not options.place.enable:
        warnings.append("heddle.layout.enable=true without heddle.place.enable=true: verl's rule places, as if replicas were alike")
    if not str(_get(config, f"{rollout}.router_config_path")).endswith("verl_plugin/router.yaml"):
        warnings.append(f"{rollout}.router_config_path is not heddle's: heddle does nothing")
    if _get(config, f"{rollout}.disable_log_stats"):
        warnings.append(f"{rollout}.disable_log_stats=true: queueing cannot be told from generation, preemptions are not counted")
    if _get(config, f"{rollout}.disaggregation.enabled"):
        warnings.append(f"{rollout}.disaggregation.enabled=true: queueing cannot be told from generation, preemptions are not counted")
    return warnings


def _writable(folder: str) -> bool:
    """Whether the folder, or the nearest parent that exists, takes new files."""
    path = os.path.abspath(folder)
    while not os.path.exists(path):
        path = os.path.dirname(path)
    return os.path.isdir(path) and os.access(path, os.W_OK)
