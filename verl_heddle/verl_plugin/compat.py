"""Lists every seam where heddle touches verl, vLLM and Ray: what it relies on, what is lost without it, and a check of what is installed.

`gate` requires the seams marked `needed` before it provides heddle's classes, `verl-heddle doctor` prints them all, and the contract tests
run them against each supported release. A check imports what it checks, so running all of them costs verl's and vLLM's import time.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module, metadata
from typing import Any

SUPPORTED = {"verl": ("0.9.1",), "vllm": ("0.24.0", "0.27.1", "0.31.0")}
"""Releases that the contract tests run against. Other releases may work: the seam checks decide."""


@dataclass(frozen=True, slots=True)
class Seam:
    """`check` raises if the seam is not as expected. `needed`: heddle switches itself off without it."""

    name: str
    consequence: str
    check: Callable[[], None]
    needed: bool = True


@dataclass(frozen=True, slots=True)
class Result:
    """`error` is None if the seam is as expected."""

    seam: Seam
    error: str | None


def _attribute(path: str) -> Any:
    module, _, names = path.partition(":")
    thing = import_module(module)
    for name in names.split("."):
        thing = getattr(thing, name)
    return thing


def takes(path: str, *parameters: str) -> None:
    """Check that the callable at "module:attribute" accepts these parameters (`**kwargs` accepts any).

    Raises:
        ImportError, AttributeError, TypeError: the callable is missing or lacks a parameter.
    """
    found = inspect.signature(_attribute(path)).parameters
    if any(p.kind is p.VAR_KEYWORD for p in found.values()):
        return
    missing = [name for name in parameters if name not in found]
    if missing:
        raise TypeError(f"{path} has no parameter {', '.join(missing)}")


def has(path: str, *attributes: str) -> None:
    """Check that the object at "module:attribute" has these attributes.

    Raises:
        ImportError, AttributeError: the object or an attribute is missing.
    """
    thing = _attribute(path)
    missing = [name for name in attributes if not hasattr(thing, name)]
    if missing:
        raise AttributeError(f"{path} has no {', '.join(missing)}")


def _fields(path: str, *names: str) -> None:
    from dataclasses import fields

    known = {item.name for item in fields(_attribute(path))}
    missing = [name for name in names if name not in known]
    if missing:
        raise AttributeError(f"{path} has no field {', '.join(missing)}")


LOOP = "verl.trainer.ppo.v1.agent_loop_tq"
CLIENT = "verl.workers.rollout.llm_server:LLMServerClient"
SERVER = "verl.workers.rollout.vllm_rollout.vllm_async_server"
BUFFER = "verl.trainer.ppo.v1.replay_buffer"


def _worker() -> None:
    raw = f"{LOOP}:AgentLoopWorkerTQ.__ray_actor_class__"
    takes(f"{raw}._run_agent_loop", "sampling_params", "trajectory")
    takes(f"{raw}._agent_loop_postprocess", "output", "validate")
    takes(f"{raw}._run_prompt", "prompt", "sampling_params", "trajectory")
    takes(f"{raw}._compute_score", "outputs", "kwargs")
    takes("verl.experimental.agent_loop:AgentLoopWorker.__init__", "config", "llm_client")


def _manager() -> None:
    has(f"{LOOP}:AgentLoopManagerTQ", "create", "generate_sequences", "_init_agent_loop_workers")
    takes(f"{LOOP}:AgentLoopManagerTQ.generate_sequences", "prompts")
    _fields("verl.workers.config.rollout:AgentLoopConfig", "agent_loop_manager_class", "num_workers")


def _client() -> None:
    takes(f"{CLIENT}.generate", "request_id", "prompt_ids", "sampling_params")
    takes(f"{CLIENT}._acquire_server", "request_id")
    takes(f"{CLIENT}._release_server", "server_id", "request_id")


def _router() -> None:
    from verl_heddle.verl_plugin.router import HeddleRouter

    protocol = _attribute("verl.workers.rollout.router:RequestLoadBalancer")
    methods = [name for name in vars(protocol) if not name.startswith("_")]
    missing = [name for name in methods if not hasattr(HeddleRouter, name)]
    if missing:
        raise TypeError(f"verl's load-balancer protocol requires {', '.join(missing)}")
    takes("verl.workers.rollout.router:get_router_handle", "servers", "router_config_path")
    _fields("verl.workers.config.rollout:RolloutConfig", "router_config_path", "scheduling_policy", "disable_log_stats")


def _sampler() -> None:
    ours = ("trainer_mode", "trainer_config", "sampler_kwargs", "poll_interval", "refill_fn", "filter_groups_metric")
    takes(f"{BUFFER}:ReplayBuffer.__init__", *ours, "train_batch_size", "gen_batch_size", "max_inflight_gen_batches")
    takes(f"{BUFFER}:ReplayBuffer.__init__", "sync_refill_failed_groups", "max_off_policy_threshold", "max_off_policy_strategy")
    takes(f"{BUFFER}:ReplayBuffer.sample", "global_steps", "partition_id", "batch_size")
    takes("verl.utils.import_utils:load_extern_type", "file_path", "type_name")


def _replica() -> None:
    takes("verl.workers.rollout.replica:RolloutReplicaRegistry.register", "name", "loader")
    takes(f"{SERVER}:vLLMHttpServer.generate", "prompt_ids", "sampling_params", "request_id", "priority")
    takes(f"{SERVER}:vLLMHttpServer.run_server", "args")
    _fields_or_annotations("verl.workers.rollout.replica:TokenOutput", "token_ids", "stop_reason", "extra_fields")


def _fields_or_annotations(path: str, *names: str) -> None:
    known = inspect.get_annotations(_attribute(path))
    missing = [name for name in names if name not in known]
    if missing:
        raise AttributeError(f"{path} has no field {', '.join(missing)}")


def _engine_events() -> None:
    from verl_heddle.verl_plugin import request_life as life

    kinds = _attribute("vllm.v1.engine:EngineCoreEventType")
    if (kinds.QUEUED, kinds.SCHEDULED, kinds.PREEMPTED) != (life.QUEUED, life.SCHEDULED, life.PREEMPTED):
        raise TypeError("vLLM's request events have different numbers")
    _fields_or_annotations("vllm.v1.engine:EngineCoreOutput", "request_id", "events")
    takes("vllm.v1.engine.output_processor:OutputProcessor.process_outputs", "engine_core_outputs")


def _priority() -> None:
    takes("vllm.v1.engine.async_llm:AsyncLLM.generate", "priority", "request_id")


def _checkpoint() -> None:
    takes("verl.trainer.ppo.checkpoint_callback:CheckpointCallback.on_save", "trainer", "global_step", "checkpoint_dir")
    takes("verl.utils.checkpoint.checkpoint_manager:find_latest_ckpt_path", "path")


def _scheduler() -> None:
    from verl_heddle.verl_plugin import vllm_seams

    found = vllm_seams.mismatch()
    if found is not None:
        raise TypeError(found)
    has("vllm.v1.engine.core_client:AsyncMPClient", "call_utility_async")


def _tools() -> None:
    takes("verl.tools.function_tool:FunctionTool.call", "parameters")
    takes("verl.tools.base_tool:BaseTool.execute", "instance_id", "parameters")


def _trainer_rank() -> None:
    takes("verl.workers.rollout.vllm_rollout:ServerAdapter.update_weights", "weights", "global_steps")
    has("verl.workers.rollout.vllm_rollout:ServerAdapter", "resume", "release", "_get_server_name_prefix")
    registry = _attribute("verl.workers.rollout.base:_ROLLOUT_REGISTRY")
    if ("vllm", "async") not in registry:
        raise KeyError("('vllm', 'async') in verl's registry of rollout adapters")


def _layout() -> None:
    takes("verl.workers.rollout.replica:RolloutReplica.init_hybrid", "worker_group")
    replica = f"{SERVER}:vLLMReplica"
    takes(f"{replica}.__init__", "replica_rank", "config", "model_config", "gpus_per_node")
    has(replica, "launch_servers", "sleep", "resume_generation", "release_kv_cache")
    has("verl.checkpoint_engine.base:CheckpointEngineManager", "sleep_replicas", "update_weights")
    source = inspect.getsource(_attribute("verl.workers.rollout.vllm_rollout:ServerAdapter.__init__"))
    missing = [word for word in ("-replica-{self.replica_rank}-rank-", "self.rollout_rank", "self._has_server") if word not in source]
    if missing:
        raise AttributeError(f"verl's rollout adapter has no {', '.join(missing)}")


def _weight_updates() -> None:
    from verl_heddle.verl_plugin.client import HeddleAsyncClient, HeddleClient

    methods = [cls.__name__ for cls in HeddleAsyncClient.__mro__ if "generate" in vars(cls)]
    if methods != ["HeddleAsyncClient", "FullyAsyncLLMServerClient", HeddleClient.__name__, "LLMServerClient"]:
        raise TypeError(f"the classes that define generate are {', '.join(methods)}")
    takes(f"{SERVER}:vLLMHttpServer._park_until_admitted", "request_id")
    has(f"{SERVER}:vLLMHttpServer", "abort_all_requests", "open_submission_gate")
    takes(f"{SERVER}:vLLMReplica.abort_all_requests", "reject_request")
    has(f"{SERVER}:vLLMReplica", "resume_generation", "server_address")
    has("verl.checkpoint_engine.base:CheckpointEngineManager", "abort_replicas", "resume_generation_replicas")


def _trainer() -> None:
    _attribute("verl.trainer.ppo.v1:get_trainer_cls")("sync")


SEAMS = (
    Seam("trainer: v1 sync", "no trainer to plug into: heddle off", _trainer),
    Seam("agent-loop manager by config key", "no trajectory identity: heddle off", _manager),
    Seam("agent-loop worker methods", "no trajectory identity: heddle off", _worker),
    Seam("LLM client: acquire, release, generate", "no routing, no priority: heddle off", _client),
    Seam("router by YAML, ten-method protocol", "no placement: heddle off", _router),
    Seam("replay buffer by config key", "no metrics, no trace, 2 s poll: heddle off", _sampler),
    Seam("replica registry and vLLM server", "no queueing times or preemption counts: heddle off", _replica),
    Seam("vLLM request priority", "no priority: heddle off", _priority),
    Seam("vLLM request events", "queueing counts as generation, and preemptions are not counted", _engine_events, needed=False),
    Seam("checkpoint callback by config key", "a resumed run starts with cold predictions", _checkpoint, needed=False),
    Seam("vLLM scheduler class", "no preemption on arrival, and vLLM's own priority order", _scheduler, needed=False),
    Seam("trainer's rollout adapter by registry", "a replica that dies ends the run", _trainer_rank, needed=False),
    Seam("weight updates inside a turn", "asynchronous trainers are not supported: use trainer_mode=sync", _weight_updates, needed=False),
    Seam("one replica per GPU", "heddle.layout does not work", _layout, needed=False),
    Seam("tools of verl's tool agent", "tool time is reported as time between turns", _tools, needed=False),
)


def examine() -> list[Result]:
    """Check every seam against the installed packages."""
    results = []
    for seam in SEAMS:
        try:
            seam.check()
            results.append(Result(seam, None))
        except Exception as error:
            results.append(Result(seam, f"{type(error).__name__}: {error}"))
    return results


def require() -> None:
    """Check the needed seams.

    Raises:
        RuntimeError: a seam is missing; names it, the reason, and the supported versions.
    """
    for seam in SEAMS:
        if not seam.needed:
            continue
        try:
            seam.check()
        except Exception as error:
            supported = ", ".join(f"{name} {' or '.join(releases)}" for name, releases in SUPPORTED.items())
            found = ", ".join(f"{name} {metadata.version(name)}" for name in SUPPORTED)
            raise RuntimeError(f"seam '{seam.name}' is missing ({error}); supported: {supported}; found: {found}") from error
