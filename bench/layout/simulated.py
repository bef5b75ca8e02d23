"""The resource manager alone in the event simulator: turns, tools, KV cache, slots, moves between turns.

Stock verl at every degree against the planner's layout with planned placement, first come first served in the engines, no priorities. The
predictor is one of controlled quality (`simulate.foresight`), told to the planner before the step and asked again at every turn.
"""

from __future__ import annotations

from random import Random
from typing import Any

import numpy as np

from bench.layout.world import MODELS, USUAL
from verl_heddle.layout.planner import choose
from verl_heddle.layout.price import Site, coming
from verl_heddle.place.pace import habit_of
from verl_heddle.place.replan import Replanner
from verl_heddle.report.draws import generated
from verl_heddle.report.setting import Setting, setting
from verl_heddle.report.words import mixture
from verl_heddle.simulate import lower_bound, make_fleet, simulate
from verl_heddle.simulate.baselines import Stock
from verl_heddle.simulate.foresight import Foresight
from verl_heddle.simulate.planned import Planned
from verl_heddle.simulate.workload import most_kv
from verl_heddle.trajectory import Trajectory, TrajectoryId, TurnStart

GPU, GPUS, NODE, SAMPLES, UTILIZATION, SLOTS = "h200", 32, 8, 8, 0.8, 512
QUALITIES = (1.0, 0.71)
CELLS = [(model, workload, 25) for workload in ("coding", "search", "math") for model in MODELS]
CELLS += [(model, "coding", 100) for model in MODELS]


def cell(model: str, workload: str, per_gpu: int, seed: int = 0) -> dict[str, Any]:
    """One step; ratios over stock at its best degree."""
    usual = USUAL[model]
    where = setting(model, GPU, GPUS, usual, SLOTS, UTILIZATION)
    source = generated(workload, per_gpu * GPUS // SAMPLES, SAMPLES, [seed])
    step, before = list(source.draws[0].steps[0]), list(source.draws[0].before[0])
    stock = {tp: simulate(step, where.fleet(tp), where.latency, Stock(seed), engine=where.engine("fcfs")) for tp in where.able(step)}
    seconds = {tp: result.makespan_s for tp, result in stock.items()}
    best = min(seconds, key=lambda tp: seconds[tp])
    bound = lower_bound(
        step, GPUS, where.latency, where.bound_tps, slots=SLOTS, kv_tokens=where.kv_tokens, engine=where.engine("fcfs")
    ).makespan_s
    row: dict[str, Any] = {"model": model, "workload": workload, "per_gpu": per_gpu, "usual_tp": usual, "best_tp": best}
    row |= {"usual_over_best": seconds[usual] / seconds[best], "best_bound": bound / seconds[best]}
    for quality in QUALITIES:
        took, layout, reason = _planned(where, step, before, quality, seed)
        row[f"q{quality:g}"] = {"planner": seconds[best] / took, "bound": bound / took, "layout": mixture(layout), "reason": reason}
    return row


def _planned(
    where: Setting, step: list[Trajectory], before: list[Trajectory], quality: float, seed: int
) -> tuple[float, tuple[int, ...], str]:
    seer = Foresight(step, quality, seed)
    known = []
    for item in step:
        identity = TrajectoryId(item.prompt_id, f"0:{item.prompt_id}", item.trial, 0)
        seer.turn_started(TurnStart(identity, identity.key, 0, item.prompt_tokens or 0, 0))
        known.append(seer.predict(identity.key))
    habit = habit_of(before)
    assert habit is not None
    cap = None if quality == 1 else max(item.output_tokens for item in before)
    site = Site(where.latency, GPUS, NODE, SLOTS, UTILIZATION, longest_context=most_kv(step))
    told = coming([one.median_tokens for one in known], [one.scale for one in known], np.inf if cap is None else cap)
    chosen = choose(told, site, habit, (where.tp,) * (GPUS // where.tp), reshard_s=0.0, margin=0.0)
    policy = Planned(Replanner(where.latency, Random(seed), cap_tokens=cap), Foresight(step, quality, seed))
    fleet = make_fleet(GPUS, chosen.layout, where.latency, SLOTS, where.kv_tokens)
    policy.replicas_added(fleet)
    policy.announce(step)
    took = simulate(step, fleet, where.latency, policy, engine=where.engine("fcfs")).makespan_s
    return took, chosen.layout, str(chosen.reason)


def cells(quick: bool) -> list[dict[str, Any]]:
    """All of them, or two."""
    return [cell(*one) for one in (CELLS[:2] if quick else CELLS)]
