"""Which layout a run has next: as the user's schedule says, or as the planner finds it worth while (`layout.planner`).

The planner's times are those of the model and GPU that the user names (`heddle.layout.times`): the run itself can tell nothing of degrees
it has not tried. Its trajectories are those of the step that is over, its cost of a change what the run's own changes have taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

from verl_heddle.latency import LatencyModel
from verl_heddle.latency import times as sources
from verl_heddle.layout.feasible import degrees
from verl_heddle.layout.planner import LayoutReason, again, choose
from verl_heddle.layout.price import Site
from verl_heddle.options import Layout
from verl_heddle.place.pace import habit_of
from verl_heddle.trajectory import Trajectory
from verl_heddle.verl_plugin.log import log, log_once


def times(name: str) -> LatencyModel:
    """The times of `model/gpu`, as `verl-heddle plan` has them: a shipped table, or else the roofline.

    Raises:
        ValueError: model or GPU is not known; says which are.
    """
    model, _, gpu = name.rpartition("/")
    if not model:
        raise ValueError(f"{name!r} does not name a model and a GPU as qwen3-14b/h200 does")
    return sources.times(gpu, model).latency


def scheduled(schedule: Mapping[int, Sequence[int]], step: int) -> tuple[int, ...] | None:
    """The layout that the schedule wants for a step."""
    begun = [start for start in schedule if start <= step]
    return tuple(schedule[max(begun)]) if begun else None


def first(given: Mapping[str, Any], gpus: int, gpus_per_node: int, utilization: float) -> tuple[int, ...]:
    """What a run starts with. `given`: the settings of `heddle.layout` that replicas see.

    Unplanned yet: the smallest degree that holds the model, so that there are as many replicas as can be.
    """
    told = scheduled(given.get("schedule") or {}, 1) or tuple(given.get("fixed") or ())
    if told:
        return told
    able: tuple[int, ...] = (1,)
    if given.get("times"):
        able = tuple(
            tp for tp in degrees(gpus_per_node, latency=times(given["times"]), gpu_memory_utilization=utilization) if gpus % tp == 0
        )
    if not able:
        share = f"{utilization:g} of the memory (rollout.gpu_memory_utilization)"
        raise ValueError(f"no degree within a node of {gpus_per_node} GPUs holds {given['times']} in {share}")
    return (min(able),) * (gpus // min(able))


class Chooser:
    """One per run, in the task runner.

    Args:
        rollout: verl's rollout config.
        heads, kv_heads: of the model.
    """

    def __init__(self, options: Layout, rollout: Any, gpus: int, gpus_per_node: int, heads: int | None, kv_heads: int | None) -> None:
        self._options = options
        self._cap = int(rollout.response_length)
        self._schedule: dict[int, list[int]] = options.schedule or {}
        self._plans = not self._schedule and not options.fixed
        self.metrics: dict[str, float] = {}
        """Of the last choice."""
        if self._plans:
            utilization, slots = float(rollout.gpu_memory_utilization), int(rollout.max_num_seqs)
            longest = int(rollout.prompt_length) + self._cap
            self._site = Site(
                times(options.times), gpus, gpus_per_node, slots, utilization, heads=heads, kv_heads=kv_heads, longest_context=longest
            )

    def next(self, step: int, records: Sequence[Trajectory], current: Sequence[int], reshard_s: float | None) -> tuple[int, ...] | None:
        """The layout for this training step, None to stay. `records`: the step before; `reshard_s`: None, not measured."""
        if not self._plans:
            return scheduled(self._schedule, step)
        whole = [record for record in records if record.meta.get("outcome") == "finished"]
        expected, habit = again(whole, self._cap), habit_of(whole)
        if expected is None or habit is None:
            return None
        try:
            options = self._options
            choice = choose(expected, self._site, habit, current, reshard_s=reshard_s, horizon=options.horizon_steps, margin=options.margin)
        except Exception as error:
            log_once(f"the layout stays, planning failed ({type(error).__name__}: {error})")
            return None
        told = {"forecast_s": choice.forecast_s, "current_s": choice.current_s, "gain_s": choice.gain_s, "cost_s": choice.cost_s}
        self.metrics = {name: value for name, value in told.items() if isfinite(value)}
        self.metrics |= {f"reason/{reason}": float(reason is choice.reason) for reason in LayoutReason}
        if choice.changes:
            expected_s = f"{choice.forecast_s:.1f} s a step expected, {choice.current_s:.1f} s under {list(current)}"
            cost = f"the change takes about {choice.cost_s:.0f} s"
            log(f"layout {list(choice.layout)} from step {step}: {expected_s} ({choice.reason}; {cost})")
        return choice.layout
