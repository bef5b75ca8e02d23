"""Checks that every node of a Ray cluster has this package, before verl starts anything there.

verl's configuration names heddle's classes, and its processes may run on any node: a node without the package ends the run minutes later
with a deep traceback. So if the run will join a cluster, the driver joins it first, runs a small task on each node that imports the package
under the run's own runtime environment, and disconnects. A cluster of only this node is not checked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

import verl_heddle
from verl_heddle.verl_plugin.log import log

ANSWER_S = 60.0
"""Time limit for all nodes to answer: a node's first task starts a process, and may install the run's runtime environment."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A node's answer. `version` is None if the package is missing; `plugin`: whether verl's entry points on the node name it; `error`: why
    the node could not be checked."""

    version: str | None = None
    plugin: bool = False
    error: str = ""


def ready(config: DictConfig) -> bool:
    """Whether the nodes allow the run to start; logs any problems. A check that fails does not refuse the run."""
    try:
        answers = _ask_cluster(config)
    except Exception as error:
        log(f"warning: could not check that every node has verl-heddle ({type(error).__name__}: {error})")
        return True
    fatal, lines = judge(answers)
    for line in lines:
        log(line)
    return not fatal


def judge(answers: Mapping[str, Answer]) -> tuple[bool, list[str]]:
    """Whether to refuse the run, and one line per problem. `answers`: by node address."""
    ours = verl_heddle.__version__
    asked = {node: answer for node, answer in answers.items() if not answer.error}
    missing = [node for node, answer in asked.items() if answer.version is None]
    not_loaded = [node for node, answer in asked.items() if answer.version is not None and not answer.plugin]
    other = [f"{node} ({answer.version})" for node, answer in asked.items() if answer.version not in (None, ours)]
    silent = [f"{node} ({answer.error})" for node, answer in answers.items() if answer.error]
    lines = []
    if missing:
        lines.append(f"error: verl-heddle is not installed on {_list(missing)}: install {ours} on every node, or drop the flag")
    if not_loaded:
        lines.append(
            f"error: verl-heddle can be imported but is not installed on {_list(not_loaded)}, so verl does not load it: "
            "install it on every node"
        )
    if other:
        lines.append(f"warning: this node has verl-heddle {ours}, but other nodes differ: {_list(other)}: install one version everywhere")
    if silent:
        lines.append(f"warning: could not check that verl-heddle is installed on {_list(silent)}")
    return bool(missing or not_loaded), lines


def _list(names: Sequence[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _ask_cluster(config: DictConfig) -> dict[str, Answer]:
    import ray

    if ray.is_initialized():
        return ask(_others(ray), ANSWER_S)
    given = OmegaConf.select(config, "ray_kwargs.ray_init") or {}
    address = _address(given.get("address"))
    if address is None:
        return {}
    ray.init(address=address, runtime_env=_runtime_env(config, given), log_to_driver=False, configure_logging=False)
    try:
        return ask(_others(ray), ANSWER_S)
    finally:
        ray.shutdown()


def _address(given: str | None) -> str | None:
    """Address of the cluster that Ray would join; None if Ray would start a new one."""
    if given and "://" in given:
        return given
    from ray._private.services import canonicalize_bootstrap_address

    return canonicalize_bootstrap_address(given)


def _runtime_env(config: DictConfig, given: Any) -> dict[str, Any]:
    """The runtime environment that verl gives every process (`run_ppo`)."""
    from verl.trainer.constants_ppo import get_ppo_ray_runtime_env

    merged = OmegaConf.merge(get_ppo_ray_runtime_env(config), given.get("runtime_env") or {})
    return OmegaConf.to_container(merged, resolve=True)  # type: ignore[return-value]


def _others(ray: Any) -> list[dict[str, Any]]:
    """The nodes on which verl may start a process; empty if this node is the only one."""
    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) > 0]
    here = ray.get_runtime_context().get_node_id()
    return nodes if any(node["NodeID"] != here for node in nodes) else []


def ask(nodes: Sequence[Mapping[str, Any]], timeout_s: float) -> dict[str, Answer]:
    """Check nodes, as `ray.nodes()` lists them, within `timeout_s` in total. Ray must be running."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def look() -> tuple[str | None, bool]:
        """Nested, so that Ray pickles it by value: a module-level function could not be loaded on a node without the package."""
        from importlib import metadata

        try:
            import verl_heddle as package
        except ImportError:
            return None, False
        return package.__version__, any(point.name == "heddle" for point in metadata.entry_points(group="verl.plugins"))

    task = ray.remote(look)
    refs = {}
    addresses = [str(node["NodeManagerAddress"]) for node in nodes]
    for node, address in zip(nodes, addresses, strict=True):
        name = address if addresses.count(address) == 1 else f"{address} {node['NodeID'][:8]}"
        strategy = NodeAffinitySchedulingStrategy(node_id=node["NodeID"], soft=False)
        refs[task.options(num_cpus=0, max_retries=0, scheduling_strategy=strategy).remote()] = name
    if not refs:
        return {}
    done, late = ray.wait(list(refs), num_returns=len(refs), timeout=timeout_s)
    answers = {refs[ref]: Answer(error=f"no answer within {timeout_s:g} s") for ref in late}
    for ref in done:
        try:
            answers[refs[ref]] = Answer(*ray.get(ref))
        except Exception as error:
            answers[refs[ref]] = Answer(error=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
    for ref in late:
        ray.cancel(ref, force=True)
    return answers
