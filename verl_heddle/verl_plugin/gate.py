"""Resolves the four names that verl's config keys point at: to our classes if the plugin works here, otherwise to verl's own.

verl looks up `AgentLoopManager`, `CheckpointCallback`, `Router` and `Sampler` in the task runner, before any replica exists. The first
look-up checks the seams, imports every module of ours and registers the replica. If any of that fails, all four names resolve to stock
verl for the rest of the process and one log line says why. A broken plugin costs its gains, not the run.
"""

from __future__ import annotations

import importlib
from typing import Any

from verl_heddle.verl_plugin.log import log

SEAMS = {
    "AgentLoopManager": (
        "verl_heddle.verl_plugin.manager:HeddleAgentLoopManager",
        "verl.trainer.ppo.v1.agent_loop_tq:AgentLoopManagerTQ",
    ),
    "CheckpointCallback": (
        "verl_heddle.verl_plugin.checkpoint:HeddleCheckpoint",
        "verl.trainer.ppo.checkpoint_callback:CheckpointCallback",
    ),
    "Router": ("verl_heddle.verl_plugin.router:RouterActor", "verl_heddle.verl_plugin.stock:StockRouter"),
    "Sampler": ("verl_heddle.verl_plugin.sampler:heddle_sampler", "verl_heddle.verl_plugin.stock:stock_sampler"),
}
"""Name -> (ours, stock), each as module:attribute."""

_active: bool | None = None


def active() -> bool:
    """Whether this process runs heddle; decided once, on the first call."""
    global _active
    if _active is None:
        try:
            _activate()
            _active = True
        except Exception as error:
            _active = False
            log(f"OFF, training goes on as stock verl: {type(error).__name__}: {error}")
    return _active


def _activate() -> None:
    importlib.import_module("verl_heddle.verl_plugin.advantage")  # verl's registry needs its name even when heddle is off
    from verl_heddle.verl_plugin import compat

    compat.require()
    for ours, _ in SEAMS.values():
        _load(ours)
    from verl_heddle.verl_plugin import replicas

    replicas.register()


def _load(path: str) -> Any:
    module, name = path.split(":")
    return getattr(importlib.import_module(module), name)


def __getattr__(name: str) -> Any:
    if name not in SEAMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    ours, stock = SEAMS[name]
    return _load(ours if active() else stock)
