"""Finds what is wrong with a verl configuration that enables heddle; each finding is one line that says what is wrong and what to change.

Reads only the composed config, so it runs before anything expensive starts. It imports verl only to look up a trainer mode that verl does
not ship.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass

from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from verl_heddle.layout.feasible import problems as layout_problems
from verl_heddle.options import Options, check
from verl_heddle.shape.settings import check as shape_problems
from verl_heddle.verl_plugin.layout_choice import first, times
from verl_heddle.verl_plugin.parts import EVERYTHING, ROLLOUT, VLLM, carrier, engine, get, losses
from verl_heddle.verl_plugin.settings import ADVANTAGES, options_of

MODES = ("colocate_async", "separate_async")
"""verl's asynchronous trainers."""

WITHOUT = {
    "heddle.place.enable": "it plans whole batches, but this trainer submits prompts one by one",
    "heddle.layout.enable": "it changes the layout between steps, while no request is running",
    "heddle.shape.enable": "it forecasts when a step's batch ends",
}
"""Option that an asynchronous trainer does not support -> why."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One problem. `fatal` stops the run; the others are logged. `grave`: the run goes on, but loses most of what the flag is for."""

    fatal: bool
    text: str
    grave: bool = False

    def __str__(self) -> str:
        return f"{'error' if self.fatal else 'warning'}: {self.text}"


def options_or_none(config: DictConfig) -> Options | None:
    """The options; None if they do not match the schema."""
    try:
        return options_of(config)
    except OmegaConfBaseException:
        return None


def lint(config: DictConfig) -> list[Finding]:
    """All findings, fatal ones first."""
    findings = [Finding(True, text) for text in _options(config)]
    if not findings:
        options = options_of(config)
        findings += [Finding(True, text) for text in _verl(config, options)]
        findings += _weakened(config, options)
    return findings


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
    if not get(config, "trainer.use_v1"):
        problems.append("heddle needs verl's v1 trainer: set trainer.use_v1=true")
    problems += _mode(str(get(config, "trainer.v1.trainer_mode")), options)
    rollout = ROLLOUT
    name = get(config, f"{rollout}.name")
    if name is None:
        problems.append(f"{rollout}.name is not set, and verl has no default for it: set {rollout}.name=vllm")
    elif name != "vllm":
        problems.append(f"heddle runs on vLLM, but {rollout}.name={name}: set {rollout}.name=vllm or drop the flag")
    priority = options.priority.enable and not options.observe
    policy = engine(config, "scheduling_policy")
    if priority and policy != "priority":
        key = f"{VLLM}.scheduling_policy" if get(config, f"{VLLM}.scheduling_policy") else f"{rollout}.scheduling_policy"
        problems.append(
            f"heddle.priority.enable=true needs {key}=priority, but it is {policy}: set {key}=priority, or heddle.priority.enable=false"
        )
    if options.preempt.enable and not options.observe and not (priority and options.priority.order == "longest"):
        problems.append(
            "heddle.preempt.enable=true needs heddle.priority.enable=true and heddle.priority.order=longest: set both, or set "
            "heddle.preempt.enable=false"
        )
    if options.shape.enable and not options.observe:
        problems += shape_problems(options.shape, int(get(config, f"{rollout}.n") or 1))
        estimator = get(config, "algorithm.adv_estimator")
        if options.shape.corrected and estimator != ADVANTAGES:
            problems.append(
                f"heddle.shape.corrected=true weights advantages, but algorithm.adv_estimator={estimator} takes no weights: "
                f"set algorithm.adv_estimator={ADVANTAGES} (verl's grpo, weighted), or heddle.shape.corrected=false"
            )
    if options.layout.enable:
        problems += _layout(config, options)
    if options.offload.enable and not options.observe:
        problems += _offload(config, options)
    folder = str(get(config, "heddle.trace.dir"))
    if options.trace.enable and not _writable(folder):
        problems.append(f"heddle.trace.dir={folder} is not writable: set a different folder, or heddle.trace.enable=false")
    return problems


def _mode(mode: str, options: Options) -> list[str]:
    """Problems of this trainer mode, or of these options with it. A mode that verl does not ship is looked up in verl's registry."""
    if mode in MODES:
        asked = {key: getattr(options, key.split(".")[1]).enable and not options.observe for key in WITHOUT}
        problems = [
            f"{key}=true does not work with trainer.v1.trainer_mode={mode} ({why}): set {key}=false, or trainer_mode=sync"
            for key, why in WITHOUT.items()
            if asked[key]
        ]
        if options.priority.order == "longest" and not options.observe:
            problems.append(
                f"heddle.priority.order=longest does not work with trainer.v1.trainer_mode={mode} (new prompts would overtake old ones "
                "until those are too stale to train on): set heddle.priority.order=arrival, or trainer_mode=sync"
            )
        return problems
    instead = "set trainer.v1.trainer_mode=sync or drop the flag"
    try:
        if derives_from_sync(mode):
            return []
        why = "its class does not derive from verl's PPOTrainerSync"
    except ImportError as error:
        why = f"verl's trainers cannot be imported: {error}"
    except ValueError:
        why = "no such trainer is registered; set VERL_USE_EXTERNAL_MODULES, in every process, to the module that registers yours"
    return [f"trainer.v1.trainer_mode={mode} is not supported ({why}): {instead}"]


def derives_from_sync(mode: str) -> bool:
    """Whether this trainer alternates rollout and update, as verl's sync trainer does.

    Raises:
        ImportError: verl's trainers cannot be imported.
        ValueError: verl has no such trainer.
    """
    if mode == "sync" or mode in MODES:
        return mode == "sync"
    from verl.trainer.ppo.v1 import PPOTrainerSync, get_trainer_cls

    return issubclass(get_trainer_cls(mode), PPOTrainerSync)


def _offload(config: DictConfig, options: Options) -> list[str]:
    """Problems of keeping evicted KV cache in host memory."""
    off = "set heddle.offload.enable=false"
    problems = []
    if get(config, "trainer.device") == "cpu":
        problems.append(f"heddle.offload.enable=true needs CUDA, because vLLM's host tier does: {off}")
    for name in ("kv_offloading_size", "kv_transfer_config"):
        if get(config, f"{VLLM}.{name}") is not None:
            problems.append(f"heddle.offload.enable=true and {VLLM}.{name} both set vLLM's KV connector: remove the key, or {off}")
    if options.layout.enable:
        problems.append(
            f"heddle.offload.enable=true does not work with heddle.layout.enable=true, whose sleeping engines would pin host memory: {off}"
        )
    if engine(config, "enable_prefix_caching") is False:
        problems.append(f"heddle.offload.enable=true needs {ROLLOUT}.enable_prefix_caching=true to find offloaded contexts: {off}")
    return problems


def _layout(config: DictConfig, options: Options) -> list[str]:
    """Problems of the requested layouts."""
    rollout = ROLLOUT
    if options.observe:
        return ["heddle.observe=true leaves the replicas to verl: set heddle.layout.enable=false, or heddle.observe=false"]
    problems = []
    model = "actor_rollout_ref.model"
    schedule = options.layout.schedule or {}
    changes = len({tuple(layout) for layout in schedule.values()}) > 1 if schedule else not options.layout.fixed
    for name in ("tensor_model_parallel_size", "data_parallel_size", "pipeline_model_parallel_size"):
        if get(config, f"{rollout}.{name}") != 1:
            now = get(config, f"{rollout}.{name}")
            problems.append(f"heddle.layout.enable=true needs {rollout}.{name}=1, but it is {now}: set it to 1")
    for name in ("disaggregation.enabled", "prometheus.enable"):
        if get(config, f"{rollout}.{name}"):
            problems.append(f"heddle.layout.enable=true does not work with {rollout}.{name}=true: set one of them to false")
    if int(get(config, f"{model}.lora_rank") or get(config, f"{model}.lora.rank") or 0) > 0 and not get(config, f"{model}.lora.merge"):
        problems.append(
            f"heddle.layout.enable=true does not work with unmerged LoRA, because verl sends the base weights only once, to the engines "
            f"running then: set {model}.lora.merge=true, or heddle.layout.enable=false"
        )
    if changes and get(config, "trainer.device") != "cpu":
        for name in ("enable_sleep_mode", "free_cache_engine"):
            if get(config, f"{rollout}.{name}") is False:
                problems.append(
                    f"a changing layout needs engines that free their memory, but {rollout}.{name}=false: set it to true, "
                    "or set one layout for the whole run with heddle.layout.fixed"
                )
    if get(config, key := carrier("heddle.layout.enable")) is None:
        problems.append(
            f"{key} is missing, so heddle.layout.enable=true would have no effect: "
            "restore it from configs/plugin/heddle.yaml, or set heddle.layout.enable=false"
        )
    per_node, nodes = int(get(config, "trainer.n_gpus_per_node") or 1), int(get(config, "trainer.nnodes") or 1)
    heads, kv_heads = model_heads(str(get(config, "actor_rollout_ref.model.path")))
    given = {"heddle.layout.fixed": options.layout.fixed} if options.layout.fixed else {}
    given |= {f"heddle.layout.schedule[{step}]": layout for step, layout in (options.layout.schedule or {}).items()}
    if not given:
        try:
            times(options.layout.times)
            first({"times": options.layout.times}, per_node * nodes, per_node, float(get(config, f"{rollout}.gpu_memory_utilization")))
        except ValueError as error:
            problems.append(f"heddle.layout.times: {error}; or set the degrees yourself, for example heddle.layout.fixed=[2,1,1]")
    for key, layout in given.items():
        problems += [f"{key}: {text}" for text in layout_problems(layout, per_node * nodes, per_node, heads, kv_heads)]
    return problems


def model_heads(model: str) -> tuple[int | None, int | None]:
    """Attention heads and KV heads from a model folder's config.json; None if it cannot be read."""
    try:
        with open(os.path.join(model, "config.json"), encoding="utf-8") as file:
            model_config = json.load(file)
        heads = model_config.get("num_attention_heads")
        return heads, model_config.get("num_key_value_heads", heads)
    except (OSError, ValueError):
        return None, None


def idle(config: DictConfig) -> str | None:
    """Why heddle does nothing at all under this configuration; None if it does something."""
    options = options_or_none(config) or Options()
    return next((loss.text for loss in losses(config, options) if EVERYTHING in loss.parts), None)


def _weakened(config: DictConfig, options: Options) -> list[Finding]:
    found = [Finding(False, loss.text, loss.grave) for loss in losses(config, options)]
    if options.layout.enable and not options.place.enable:
        found.append(
            Finding(False, "heddle.layout.enable=true without heddle.place.enable=true: verl's rule assigns as if all replicas were equal")
        )
    return found


def _writable(folder: str) -> bool:
    """Whether the folder, or its nearest existing parent, is writable."""
    path = os.path.abspath(folder)
    while not os.path.exists(path):
        path = os.path.dirname(path)
    return os.path.isdir(path) and os.access(path, os.W_OK)
