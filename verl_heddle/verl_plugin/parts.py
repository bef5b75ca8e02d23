"""Lists heddle's parts, whether each is on under a configuration, and why: the one source for doctor and lint.

Reads only the composed config. A key in `engine_kwargs.vllm` overrides verl's key of the same meaning, here as in verl's server.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

from omegaconf import DictConfig, OmegaConf

from verl_heddle.options import Options
from verl_heddle.verl_plugin.overrides import read

GATE = "verl_heddle.verl_plugin.gate"
TRAINER_RANK = "verl_heddle.verl_plugin.trainer_rank"
SCHEDULER = "verl_heddle.verl_plugin.vllm_scheduler.HeddleScheduler"

ROLLOUT = "actor_rollout_ref.rollout"
VLLM = f"{ROLLOUT}.engine_kwargs.vllm"
MANAGER = f"{ROLLOUT}.agent.agent_loop_manager_class"
CALLBACK = "trainer.checkpoint_callback_class"

EVERYTHING = "everything"

TIERS = ("OffloadingConnector", "SimpleCPUOffloadConnector", "LMCacheConnectorV1", "LMCacheMPConnector")
"""vLLM's KV connectors that keep evicted KV cache in host memory."""

KEEPS_OLD = "LMCache"
"""Prefix of the connectors that vLLM cannot empty: they do not implement `reset_cache`, and vLLM treats the call as done."""


@dataclass(frozen=True, slots=True)
class Loss:
    """A setting of verl's that switches `parts` off or, if `off` is false, weakens them. `grave`: it costs most of what the flag is
    for."""

    parts: tuple[str, ...]
    text: str
    grave: bool = False
    off: bool = True


@dataclass(frozen=True, slots=True)
class Row:
    """One part; `why` is what it does, or what switches it off or weakens it."""

    part: str
    on: bool
    why: str


def asked(options: Options) -> dict[str, str]:
    """Part -> the option that switches it off, empty if it is enabled; in the order of the table."""
    observing = "heddle.observe=true" if options.observe else ""

    def unless(enabled: bool, key: str, policy: bool = True) -> str:
        return (observing if policy else "") or ("" if enabled else key)

    return {
        "trajectories": "",
        "metrics": "",
        "trace": unless(options.trace.enable, "heddle.trace.enable=false", policy=False),
        "queueing": "",
        "tools": unless(options.tools.enable, "heddle.tools.enable=false", policy=False),
        "priority": unless(options.priority.enable, "heddle.priority.enable=false"),
        "priority updates": unless(
            options.priority.enable and options.priority.refresh_s > 0 and options.priority.order == "longest",
            "heddle.priority.order=arrival" if options.priority.order == "arrival" else "heddle.priority.refresh_s=0",
        ),
        "preemption": unless(options.preempt.enable, "heddle.preempt.enable=false"),
        "residents": unless(
            options.admits, "heddle.residents.enable=false" if not options.residents.enable else "heddle.place.enable=true"
        ),
        "admission": unless(
            options.admission.per_slot > 0 and not options.admits,
            "replaced by heddle.residents" if options.admits else "heddle.admission.per_slot=0",
        ),
        "offload": unless(options.offload.enable, "heddle.offload.enable=false"),
        "prediction": unless(options.predicts, "no part needs it"),
        "checkpoint": unless(
            options.predict.checkpoint and (options.predicts or options.shape.enable),
            "no part learns" if options.predict.checkpoint else "heddle.predict.checkpoint=false",
        ),
        "placement": unless(options.place.enable, "heddle.place.enable=false"),
        "layout": unless(options.layout.enable, "heddle.layout.enable=false"),
        "shaping": unless(options.shape.enable, "heddle.shape.enable=false"),
        "stopping": unless(options.shape.enable, "heddle.shape.enable=false"),
        "replica loss": unless(True, ""),
    }


DOES = {
    "trajectories": "identifies every request by prompt, sample and turn",
    "metrics": "logs heddle/* at every step, and polls for the batch at a shorter interval",
    "trace": "writes trace.jsonl, one line per trajectory",
    "queueing": "separates queueing from generation, and counts preemptions",
    "tools": "watches tool calls for hangs",
    "priority": "runs queued turns in heddle's order: validation first, or the longest predicted",
    "priority updates": "updates a turn's priority when its prediction changes",
    "preemption": "gives a running turn's slot to a more urgent one",
    "residents": "admits trajectories while the KV cache has room, and keeps their contexts resident during tool calls",
    "admission": "limits the turns in flight, and holds the others in the router",
    "offload": "keeps evicted KV cache in host memory and loads it back",
    "prediction": "predicts the remaining tokens of each trajectory",
    "checkpoint": "saves the learned lengths with verl's checkpoints",
    "placement": "assigns trajectories to replicas by a plan",
    "layout": "runs replicas of different tensor-parallel degrees",
    "shaping": "adds spare samples to prompts with long tails",
    "stopping": "stops samples that are no longer needed in the middle of a turn",
    "replica loss": "keeps the run alive when a replica dies",
}
"""Part -> what it does when it is on."""


def table(config: DictConfig, options: Options) -> list[Row]:
    """One row per part. A setting that switches it off is shown before one that weakens it."""
    found = losses(config, options)
    rows = []
    for part, off in asked(options).items():
        hit = sorted((loss for loss in found if part in loss.parts or EVERYTHING in loss.parts), key=lambda loss: not loss.off)
        rows.append(Row(part, not off and not any(loss.off for loss in hit), off or (hit[0].text if hit else DOES[part])))
    return rows


def losses(config: DictConfig, options: Options) -> list[Loss]:
    """Settings that switch off or weaken enabled parts; those that switch off everything come first."""
    wanted = {part for part, off in asked(options).items() if not off}
    found = [*_classes(config), *_engine(config), *_residents(config), *_statistics(config)]
    return [loss for loss in found if EVERYTHING in loss.parts or wanted & set(loss.parts)]


def get(config: DictConfig, key: str) -> Any:
    """A value of the configuration; None if the key is missing."""
    return OmegaConf.select(config, key, throw_on_missing=False)


@cache
def carrier(option: str) -> str:
    """The verl key through which the flag passes an option to processes that see only part of verl's configuration."""
    return next(item.key for item in read("plugin/heddle", OmegaConf.create()) if item.value == f"${{{option}}}")


def engine(config: DictConfig, name: str, vllm_name: str | None = None) -> Any:
    """The engine's value of verl's `rollout.<name>`, which vLLM calls `vllm_name`."""
    direct = get(config, f"{VLLM}.{vllm_name or name}")
    return direct if direct is not None else get(config, f"{ROLLOUT}.{name}")


def _classes(config: DictConfig) -> list[Loss]:
    """Keys that should name one of heddle's classes or files, but name a different one."""
    found = []
    if not _is(get(config, MANAGER), "AgentLoopManager", "HeddleAgentLoopManager"):
        text = f"heddle does nothing; do not set the key, or derive your class from {GATE}.AgentLoopManager"
        found.append(Loss((EVERYTHING,), f"{MANAGER}={get(config, MANAGER)} is not heddle's: {text}", grave=True))
    if not str(get(config, f"{ROLLOUT}.router_config_path")).endswith("verl_plugin/router.yaml"):
        text = "heddle does nothing, because its router makes the decisions; do not set the key, or drop the flag"
        found.append(Loss((EVERYTHING,), f"{ROLLOUT}.router_config_path is not heddle's: {text}", grave=True))
    sampler = "trainer.v1.sampler.custom_sampler"
    if (get(config, f"{sampler}.path"), get(config, f"{sampler}.name")) != (f"pkg://{GATE}", "Sampler"):
        text = f"no heddle metrics, no trace, verl's 2 s poll, and no learning between steps; do not set {sampler}.path and .name"
        parts = ("metrics", "trace", "prediction", "checkpoint", "placement", "layout", "shaping")
        found.append(Loss(parts, f"{sampler}.path is not heddle's: {text}", grave=True))
    if not _is(get(config, CALLBACK), "CheckpointCallback", "HeddleCheckpoint"):
        text = f"the learned lengths are not saved; derive your class from {GATE}.CheckpointCallback and call super().on_save"
        found.append(Loss(("checkpoint",), f"{CALLBACK} is not heddle's: {text} (heddle.predict.checkpoint=false silences this)"))
    library = "actor_rollout_ref.model.external_lib"
    if TRAINER_RANK not in str(get(config, library)):
        text = f"a replica that dies ends the run at the next weight update; set {library}=[yours,{TRAINER_RANK}]"
        found.append(Loss(("replica loss", "layout"), f"{library} does not name {TRAINER_RANK}: {text}"))
    return found


def _is(name: Any, seam: str, ours: str) -> bool:
    """Whether a class name is the gate's, or names a subclass of the class that the gate provides; imports the subclass."""
    if name in (None, f"{GATE}.{seam}"):
        return name is not None
    module, _, attribute = str(name).rpartition(".")
    try:
        bases = getattr(import_module(module), attribute).__mro__
    except Exception:
        return False
    return any(base.__name__ == ours and base.__module__.startswith("verl_heddle.") for base in bases)


def _residents(config: DictConfig) -> list[Loss]:
    """Settings that rule out resident sets, or leave them little use."""
    found = []
    if get(config, f"{ROLLOUT}.full_determinism"):
        text = "turns are assigned to replicas by hash"
        found.append(Loss(("residents",), f"{ROLLOUT}.full_determinism=true: {text}"))
    if engine(config, "enable_prefix_caching") is False:
        text = "every turn recomputes its whole context, so nothing stays resident during a tool call"
        found.append(Loss(("residents",), f"{ROLLOUT}.enable_prefix_caching=false: {text}", off=False))
    connector = engine_connector(config)
    if connector in TIERS:
        text = "evicted contexts are loaded back from host memory, and verl's rule is better there"
        found.append(Loss(("residents",), f"evicted KV cache is kept in host memory ({connector}): {text}"))
    if str(connector).startswith(KEEPS_OLD):
        text = "vLLM cannot empty it, so turns after a weight update reuse contexts of the old weights"
        advice = f"use vLLM's offloading instead, {VLLM}.kv_offloading_size (GiB)"
        message = f"KV cache is kept in LMCache ({connector}): {text}, with or without heddle; {advice}"
        found.append(Loss(("trajectories",), message, grave=True, off=False))
    return found


def engine_connector(config: DictConfig) -> str | None:
    """Class name of the KV connector that vLLM will use."""
    named = get(config, f"{VLLM}.kv_transfer_config.kv_connector")
    if get(config, "heddle.offload.enable") and not get(config, "heddle.observe"):
        return "OffloadingConnector"
    if get(config, f"{VLLM}.kv_offloading_size") is None:
        return named
    return "LMCacheMPConnector" if get(config, f"{VLLM}.kv_offloading_backend") == "lmcache" else "OffloadingConnector"


def _engine(config: DictConfig) -> list[Loss]:
    """vLLM settings that heddle's scheduler cannot work with, or that contradict what heddle assumes about the engine."""
    found = []
    ours = ("preemption", "priority updates", "stopping")
    if get(config, f"{VLLM}.scheduler_cls") != SCHEDULER:
        text = "no preemption on arrival, no new priorities for turns in flight, and unneeded samples run to the end of their turn"
        found.append(Loss(ours, f"{VLLM}.scheduler_cls is not heddle's: {text}; do not set the key"))
    if get(config, key := carrier("heddle.preempt.enable")) is None:
        text = "heddle.preempt.* does not reach the engines, which use the rule's defaults; add your keys to the node, do not replace it"
        found.append(Loss(("preemption",), f"{key} is missing: {text}", off=False))
    unchecked = {
        f"{VLLM}.kv_transfer_config": ("a KV connector", get(config, f"{VLLM}.kv_transfer_config")),
        f"{VLLM}.kv_offloading_size": ("a KV connector", get(config, f"{VLLM}.kv_offloading_size")),
        "heddle.offload.enable": ("a KV connector", get(config, "heddle.offload.enable")),
        f"{VLLM}.speculative_config": ("speculative decoding", get(config, f"{VLLM}.speculative_config")),
        "actor_rollout_ref.model.mtp.enable_rollout": (
            "speculative decoding",
            get(config, "actor_rollout_ref.model.mtp.enable") and get(config, "actor_rollout_ref.model.mtp.enable_rollout"),
        ),
        f"{ROLLOUT}.pipeline_model_parallel_size": (
            "pipeline parallelism",
            int(engine(config, "pipeline_model_parallel_size", "pipeline_parallel_size") or 1) > 1,
        ),
    }
    found += [
        Loss(("preemption",), f"{key}: preemption on arrival is off, because it is untested with {what}")
        for key, (what, used) in unchecked.items()
        if used
    ]
    if int(engine(config, "data_parallel_size") or 1) > 1:
        text = "vLLM spreads a replica's turns over its engines, so a turn may run on one that does not hold its context"
        found.append(Loss(("placement",), f"{ROLLOUT}.data_parallel_size > 1: {text}", off=False))
    slots, verl_slots = get(config, f"{VLLM}.max_num_seqs"), get(config, f"{ROLLOUT}.max_num_seqs")
    if slots is not None and slots != verl_slots:
        text = f"verl sizes its server for {verl_slots}, but the engine has {slots}; set {ROLLOUT}.max_num_seqs={slots} instead"
        message = f"{VLLM}.max_num_seqs={slots} contradicts {ROLLOUT}.max_num_seqs={verl_slots}: {text}"
        found.append(Loss(("residents", "admission"), message, off=False))
    return found


def _statistics(config: DictConfig) -> list[Loss]:
    keys = {f"{ROLLOUT}.disable_log_stats": engine(config, "disable_log_stats")}
    keys[f"{ROLLOUT}.disaggregation.enabled"] = get(config, f"{ROLLOUT}.disaggregation.enabled")
    text = "queueing cannot be separated from generation, and preemptions are not counted"
    return [Loss(("queueing",), f"{key}=true: {text}") for key, value in keys.items() if value]
