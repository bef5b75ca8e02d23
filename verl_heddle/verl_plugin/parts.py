"""The parts of heddle, which of them a configuration asks for, and what in verl's keys takes a part away: one table for doctor and lint.

Reads the composed config only. What vLLM is told in `engine_kwargs.vllm` goes before verl's own key of the same meaning, as in verl's
server; so does the table.
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
"""vLLM's KV connectors that keep evicted KV cache in the host's memory."""

KEEPS_OLD = "LMCache"
"""How those of them begin that vLLM cannot empty: they do not implement `reset_cache`, and vLLM takes that for done."""


@dataclass(frozen=True, slots=True)
class Loss:
    """Something in verl's configuration that takes `parts` away, or, where not `off`, makes less of them. `grave`: most of what the flag
    is for goes with them."""

    parts: tuple[str, ...]
    text: str
    grave: bool = False
    off: bool = True


@dataclass(frozen=True, slots=True)
class Row:
    """A part, whether it is on, and why."""

    part: str
    on: bool
    why: str


def asked(options: Options) -> dict[str, str]:
    """Part -> the option that keeps it off, empty where it is asked for; in the order in which they are told."""
    watching = "heddle.observe=true" if options.observe else ""

    def unless(enabled: bool, key: str, policy: bool = True) -> str:
        return (watching if policy else "") or ("" if enabled else key)

    return {
        "trajectories": "",
        "metrics": "",
        "trace": unless(options.trace.enable, "heddle.trace.enable=false", policy=False),
        "queueing": "",
        "tools": unless(options.tools.enable, "heddle.tools.enable=false", policy=False),
        "priority": unless(options.priority.enable, "heddle.priority.enable=false"),
        "priority under way": unless(
            options.priority.enable and options.priority.refresh_s > 0 and options.priority.order == "longest",
            "heddle.priority.order=arrival" if options.priority.order == "arrival" else "heddle.priority.refresh_s=0",
        ),
        "preemption": unless(options.preempt.enable, "heddle.preempt.enable=false"),
        "residents": unless(
            options.admits, "heddle.residents.enable=false" if not options.residents.enable else "heddle.place.enable=true"
        ),
        "admission": unless(
            options.admission.per_slot > 0 and not options.admits,
            "heddle.residents does it" if options.admits else "heddle.admission.per_slot=0",
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
    "trajectories": "every request is known by prompt, sample and turn",
    "metrics": "heddle/* with every step, and a short poll for the batch",
    "trace": "trace.jsonl, one line a trajectory",
    "queueing": "queueing told from generation, preemptions counted",
    "tools": "watchdog over tool calls",
    "priority": "waiting turns run in heddle's order: validation first, or the longest predicted",
    "priority under way": "turns get a new priority when what is expected of them changes",
    "preemption": "an urgent turn takes a running one's slot",
    "residents": "trajectories are admitted as KV cache has room, and keep it through their tool calls",
    "admission": "turns in flight are bounded, the rest wait in the router",
    "offload": "evicted KV cache is kept on the host and read back",
    "prediction": "how much of a trajectory is still to come",
    "checkpoint": "what is learnt is saved with verl's checkpoints",
    "placement": "trajectories are placed by plan",
    "layout": "replicas of several tensor-parallel degrees",
    "shaping": "spare samples for prompts with long tails",
    "stopping": "samples of no more use are stopped within their turn",
    "replica loss": "a replica that dies does not end the run",
}
"""Part -> what it does where it is on."""


def table(config: DictConfig, options: Options) -> list[Row]:
    """Every part, on or off, and why."""
    found = losses(config, options)
    rows = []
    for part, off in asked(options).items():
        hit = sorted((loss for loss in found if part in loss.parts or EVERYTHING in loss.parts), key=lambda loss: not loss.off)
        rows.append(Row(part, not off and not any(loss.off for loss in hit), off or (hit[0].text if hit else DOES[part])))
    return rows


def losses(config: DictConfig, options: Options) -> list[Loss]:
    """What the configuration takes away of the parts that are asked for; what takes away everything first."""
    wanted = {part for part, off in asked(options).items() if not off}
    found = [*_classes(config), *_engine(config), *_residents(config), *_statistics(config)]
    return [loss for loss in found if EVERYTHING in loss.parts or wanted & set(loss.parts)]


def get(config: DictConfig, key: str) -> Any:
    """A value of the configuration; None where there is none."""
    return OmegaConf.select(config, key, throw_on_missing=False)


@cache
def carrier(option: str) -> str:
    """The key of verl's by which the flag hands an option on to where only a part of verl's configuration is seen."""
    return next(item.key for item in read("plugin/heddle", OmegaConf.create()) if item.value == f"${{{option}}}")


def engine(config: DictConfig, name: str, vllms: str | None = None) -> Any:
    """What the engine is given for verl's `rollout.<name>`, which vLLM calls `vllms`."""
    own = get(config, f"{VLLM}.{vllms or name}")
    return own if own is not None else get(config, f"{ROLLOUT}.{name}")


def _classes(config: DictConfig) -> list[Loss]:
    """Keys that name a class or a file of ours, and name another's."""
    found = []
    if not _is(get(config, MANAGER), "AgentLoopManager", "HeddleAgentLoopManager"):
        text = f"heddle does nothing; leave the key to the flag, or derive your class from {GATE}.AgentLoopManager"
        found.append(Loss((EVERYTHING,), f"{MANAGER}={get(config, MANAGER)} is not heddle's: {text}", grave=True))
    if not str(get(config, f"{ROLLOUT}.router_config_path")).endswith("verl_plugin/router.yaml"):
        text = "heddle does nothing, since its router is where it decides; leave the key to the flag, or drop the flag"
        found.append(Loss((EVERYTHING,), f"{ROLLOUT}.router_config_path is not heddle's: {text}", grave=True))
    sampler = "trainer.v1.sampler.custom_sampler"
    if (get(config, f"{sampler}.path"), get(config, f"{sampler}.name")) != (f"pkg://{GATE}", "Sampler"):
        text = (
            f"no heddle metrics, no trace, verl's 2 s poll, and nothing is learnt between steps; leave {sampler}.path and .name to the flag"
        )
        parts = ("metrics", "trace", "prediction", "checkpoint", "placement", "layout", "shaping")
        found.append(Loss(parts, f"{sampler}.path is not heddle's: {text}", grave=True))
    if not _is(get(config, CALLBACK), "CheckpointCallback", "HeddleCheckpoint"):
        text = f"what is learnt of lengths is not saved; derive yours from {GATE}.CheckpointCallback and let its on_save call super's"
        found.append(Loss(("checkpoint",), f"{CALLBACK} is not heddle's: {text} (heddle.predict.checkpoint=false silences this)"))
    library = "actor_rollout_ref.model.external_lib"
    if TRAINER_RANK not in str(get(config, library)):
        text = f"a replica that dies ends the run at the next weight update; give both, {library}=[yours,{TRAINER_RANK}]"
        found.append(Loss(("replica loss", "layout"), f"{library} does not name {TRAINER_RANK}: {text}"))
    return found


def _is(name: Any, seam: str, ours: str) -> bool:
    """Whether a class name is the gate's, or that of a class which derives from what the gate hands out there; imports the latter."""
    if name in (None, f"{GATE}.{seam}"):
        return name is not None
    module, _, attribute = str(name).rpartition(".")
    try:
        bases = getattr(import_module(module), attribute).__mro__
    except Exception:
        return False
    return any(base.__name__ == ours and base.__module__.startswith("verl_heddle.") for base in bases)


def _residents(config: DictConfig) -> list[Loss]:
    """What resident sets cannot work with, or are of little use with."""
    found = []
    if get(config, f"{ROLLOUT}.full_determinism"):
        text = "turns are placed by hash, as it asks"
        found.append(Loss(("residents",), f"{ROLLOUT}.full_determinism=true: {text}"))
    if engine(config, "enable_prefix_caching") is False:
        text = "a turn reads its whole context again whatever lies where, so that nothing is held through a tool call"
        found.append(Loss(("residents",), f"{ROLLOUT}.enable_prefix_caching=false: {text}", off=False))
    connector = engine_connector(config)
    if connector in TIERS:
        text = "evicted contexts come back from the host's memory, where verl's rule is the better one"
        found.append(Loss(("residents",), f"the host keeps evicted KV cache ({connector}): {text}"))
    if str(connector).startswith(KEEPS_OLD):
        text = "vLLM cannot empty it, so that turns after a weight update find contexts of the old weights"
        advice = f"take vLLM's own, {VLLM}.kv_offloading_size (GiB)"
        told = f"KV cache is kept in LMCache ({connector}): {text}, without heddle too; {advice}"
        found.append(Loss(("trajectories",), told, grave=True, off=False))
    return found


def engine_connector(config: DictConfig) -> str | None:
    """The KV connector that vLLM will have, by its class."""
    named = get(config, f"{VLLM}.kv_transfer_config.kv_connector")
    if get(config, "heddle.offload.enable") and not get(config, "heddle.observe"):
        return "OffloadingConnector"
    if get(config, f"{VLLM}.kv_offloading_size") is None:
        return named
    return "LMCacheMPConnector" if get(config, f"{VLLM}.kv_offloading_backend") == "lmcache" else "OffloadingConnector"


def _engine(config: DictConfig) -> list[Loss]:
    """What vLLM is told that heddle's scheduler cannot work with, or that differs from what heddle believes of the engine."""
    found = []
    ours = ("preemption", "priority under way", "stopping")
    if get(config, f"{VLLM}.scheduler_cls") != SCHEDULER:
        text = "no preemption on arrival, no new priorities for turns under way, and samples of no more use run to their turn's end"
        found.append(Loss(ours, f"{VLLM}.scheduler_cls is not heddle's: {text}; leave the key to the flag"))
    if get(config, key := carrier("heddle.preempt.enable")) is None:
        text = "heddle.preempt.* does not reach the engines, where the rule's defaults hold; add your keys to the node, do not replace it"
        found.append(Loss(("preemption",), f"{key} is gone: {text}", off=False))
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
        Loss(("preemption",), f"{key}: {what} was never checked with preemption on arrival, which is off")
        for key, (what, there) in unchecked.items()
        if there
    ]
    if int(engine(config, "data_parallel_size") or 1) > 1:
        text = "vLLM shares a replica's turns out among its engines, so that a turn may land on one that does not hold its context"
        found.append(Loss(("placement",), f"{ROLLOUT}.data_parallel_size > 1: {text}", off=False))
    slots, told = get(config, f"{VLLM}.max_num_seqs"), get(config, f"{ROLLOUT}.max_num_seqs")
    if slots is not None and slots != told:
        text = f"verl sizes its server for {told} where the engine has {slots}; set {ROLLOUT}.max_num_seqs={slots} instead"
        told_twice = f"{VLLM}.max_num_seqs={slots} contradicts {ROLLOUT}.max_num_seqs={told}: {text}"
        found.append(Loss(("residents", "admission"), told_twice, off=False))
    return found


def _statistics(config: DictConfig) -> list[Loss]:
    keys = {f"{ROLLOUT}.disable_log_stats": engine(config, "disable_log_stats")}
    keys[f"{ROLLOUT}.disaggregation.enabled"] = get(config, f"{ROLLOUT}.disaggregation.enabled")
    text = "queueing cannot be told from generation, preemptions are not counted"
    return [Loss(("queueing",), f"{key}=true: {text}") for key, value in keys.items() if value]
