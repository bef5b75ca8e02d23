"""Chooses the layout of the next step: from the user's schedule, or by the planner when a change pays off (`layout.planner`).

The planner takes step times from the model and GPU that the user names (`heddle.layout.times`), because the run has no measurements of
degrees it has not tried. It plans for the trajectories of the finished step, with the measured cost of the run's own layout changes.
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
    """Step times of `model/gpu`, the same that `verl-heddle plan` uses: a shipped table, or else the roofline.

    Raises:
        ValueError: unknown model or GPU; lists the known ones.
    """
    model, _, gpu = name.rpartition("/")
    if not model:
        raise ValueError(f"{name!r} does not have the form model/gpu, for example qwen3-14b/h200")
    return sources.times(gpu, model).latency


def scheduled(schedule: Mapping[int, Sequence[int]], step: int) -> tuple[int, ...] | None:
    """The layout that the schedule sets for a step; None before its first entry."""
    begun = [start for start in schedule if start <= step]
    return tuple(schedule[max(begun)]) if begun else None


def first(given: Mapping[str, Any], gpus: int, gpus_per_node: int, utilization: float) -> tuple[int, ...]:
    """The layout a run starts with. `given`: the settings of `heddle.layout` that replicas see.

    Without a schedule or a fixed layout, it is the smallest degree that holds the model, which gives the most replicas.
    """
    configured = scheduled(given.get("schedule") or {}, 1) or tuple(given.get("fixed") or ())
    if configured:
        return configured
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
    """Chooses each step's layout; one per run, in the task runner.

    Args:
        rollout: verl's rollout config.
        heads, kv_heads: the model's attention heads and KV heads.
    """

    def __init__(self, options: Layout, rollout: Any, gpus: int, gpus_per_node: int, heads: int | None, kv_heads: int | None) -> None:
        self._options = options
        self._cap = int(rollout.response_length)
        self._schedule: dict[int, list[int]] = options.schedule or {}
        self._plans = not self._schedule and not options.fixed
        self.metrics: dict[str, float] = {}
        """Metrics of the last choice."""
        if self._plans:
            utilization, slots = float(rollout.gpu_memory_utilization), int(rollout.max_num_seqs)
            longest = int(rollout.prompt_length) + self._cap
            self._site = Site(
                times(options.times), gpus, gpus_per_node, slots, utilization, heads=heads, kv_heads=kv_heads, longest_context=longest
            )

    def next(self, step: int, records: Sequence[Trajectory], current: Sequence[int], reshard_s: float | None) -> tuple[int, ...] | None:
        """The layout for this training step; None keeps the current one.

        Args:
            records: trajectories of the previous step.
            reshard_s: seconds that a layout change takes; None if not measured yet.
        """
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
            log_once(f"layout planning failed, the layout stays ({type(error).__name__}: {error})")
            return None
        seconds = {"forecast_s": choice.forecast_s, "current_s": choice.current_s, "gain_s": choice.gain_s, "cost_s": choice.cost_s}
        self.metrics = {name: value for name, value in seconds.items() if isfinite(value)}
        self.metrics |= {f"reason/{reason}": float(reason is choice.reason) for reason in LayoutReason}
        if choice.changes:
            expected_s = f"{choice.forecast_s:.1f} s per step expected, {choice.current_s:.1f} s with {list(current)}"
            cost = f"the change takes about {choice.cost_s:.0f} s"
            log(f"layout {list(choice.layout)} from step {step}: {expected_s} ({choice.reason}; {cost})")
        return choice.layout
