"""Saves the learned lengths with verl's checkpoints, in `global_step_N/heddle/`: `predictor.bin` and, with shaping, `shape.json`.

verl's checkpoint callback (`trainer.checkpoint_callback_class`) saves them in the task runner after verl has written its own files. The
agent-loop manager reads them at start from the folder that verl resumes from. Neither can fail a run: a missing or unusable state means a
cold start, which is logged in one line.
"""

from __future__ import annotations

import json
import os
from typing import Any

import ray
from verl.trainer.ppo.checkpoint_callback import CheckpointCallback
from verl.utils.checkpoint.checkpoint_manager import find_latest_ckpt_path

from verl_heddle.traces.writer import flush_all
from verl_heddle.verl_plugin.log import log, log_once

FILE = os.path.join("heddle", "predictor.bin")
SHAPE_FILE = os.path.join("heddle", "shape.json")


class HeddleCheckpoint(CheckpointCallback):
    """verl's hook after each save."""

    def on_save(self, trainer: Any, global_step: int, checkpoint_dir: str, async_save: bool = False, **kwargs: Any) -> None:
        try:
            manager = trainer.agent_loop_manager
            if hasattr(manager, "router") and manager.options.predict.checkpoint:  # without a router it is verl's own manager
                state = _learnt(manager)
                if state is not None:
                    _write(os.path.join(checkpoint_dir, FILE), state)
                if manager.planner is not None:
                    _write(os.path.join(checkpoint_dir, SHAPE_FILE), json.dumps(manager.planner.shaper.state()).encode())
        except Exception as error:
            log_once(f"the learned lengths are not in the checkpoint of step {global_step} ({type(error).__name__}: {error})")
        flush_all()  # so that a run resumed from here has a complete trace


def _learnt(manager: Any) -> bytes | None:
    """The router's state; if the router does not answer, its state after the previous step."""
    try:
        return ray.get(manager.router.learnt.remote(), timeout=manager.options.deadlines.router_s)
    except Exception:
        if manager.learnt is None:
            raise
        return manager.learnt


def restore(manager: Any, config: Any) -> None:
    """Load the learned lengths from the checkpoint that verl resumes from, if any, into the router."""
    try:
        folder = resumed_from(config.trainer)
        if folder is None or not manager.options.predict.checkpoint or manager.options.observe:
            return
        if manager.planner is not None:  # shaping learns prompts even without prediction
            _restore_shaping(manager.planner, os.path.join(folder, SHAPE_FILE))
        path = os.path.join(folder, FILE)
        if not os.path.exists(path):
            log(f"{folder} holds no learned lengths: predictions start cold")
            return
        with open(path, "rb") as file:
            state = file.read()
        manager.learnt = state
        why_not = ray.get(manager.router.learn_again.remote(state), timeout=manager.options.deadlines.router_s)
        log(
            f"restored the lengths learned up to {os.path.basename(folder)}"
            if why_not is None
            else f"{path}: {why_not}: predictions start cold"
        )
    except Exception as error:
        log(f"the learned lengths could not be read ({type(error).__name__}: {error}): predictions start cold")


def _restore_shaping(planner: Any, path: str) -> None:
    try:
        with open(path, "rb") as file:
            planner.shaper.restore(json.load(file))
    except (OSError, ValueError) as error:
        log(f"{path}: {error}: shaping starts without its record of prompts")


def resumed_from(trainer: Any) -> str | None:
    """The checkpoint folder that verl resumes from under this `trainer` config; None for a fresh start."""
    if trainer.resume_mode == "disable":
        return None
    if trainer.resume_mode == "resume_path":
        return os.path.abspath(trainer.resume_from_path)
    return find_latest_ckpt_path(os.path.abspath(trainer.default_local_dir))


def _write(path: str, state: bytes) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    draft = f"{path}.{os.getpid()}"
    with open(draft, "wb") as file:
        file.write(state)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)
