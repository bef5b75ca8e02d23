"""The ways to sample and select that are compared, and what one simulated step of each says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import exp, inf, log
from statistics import fmean
from typing import Any

from bench.shaping.cases import Case, Pool
from verl_heddle.options import Shape
from verl_heddle.place.pace import habit_of
from verl_heddle.shape.budget import Objective
from verl_heddle.shape.plan import Share, StepPlan
from verl_heddle.shape.select import Rule
from verl_heddle.shape.settings import ShapeReason
from verl_heddle.shape.shaper import Shaper, fleet_of
from verl_heddle.simulate import Result, simulate
from verl_heddle.simulate.baselines import Stock
from verl_heddle.simulate.shaped import Shaped, started

FREE = {"length_bias": 1.0, "prompt_bias": 1.0, "mixed_loss": 1.0}
"""No guard rails: what the paper does."""


@dataclass(frozen=True)
class Arm:
    """`settings` None: stock. `spare` and `longest` are shares of n, so that one arm serves groups of every size."""

    settings: Shape | None = None
    spare: float | None = None
    longest: float | None = None
    learnt: bool = True
    """Whether the prompts were seen before."""


def fixed(spare: float, longest: float, uniform: bool, patience: float | None = inf, **more: Any) -> Arm:
    """A budget in shares of n, K:L in shares of n."""
    return Arm(Shape(spare=0, uniform=uniform, patience=patience, **FREE, **more), spare, longest)


ARMS: dict[str, Arm] = {
    "stock": Arm(),
    "uniform 1.25n, 8:0": fixed(0.25, 0, True),
    "uniform 1.25n, 7:1": fixed(0.25, 1 / 8, True),
    "uniform 1.25n, 6:2": fixed(0.25, 2 / 8, True),
    "uniform 1.25n, 4:4": fixed(0.25, 4 / 8, True),
    "uniform 1.5n, 8:0": fixed(0.5, 0, True),
    "uniform 1.5n, 7:1": fixed(0.5, 1 / 8, True),
    "uniform 2n, 8:0": fixed(1.0, 0, True),
    "uniform 2n, 7:1": fixed(1.0, 1 / 8, True),
    "adaptive 1.25n, 8:0, by spread": fixed(0.25, 0, False, objective=Objective.SPREAD),
    "adaptive 1.25n, 7:1, by spread (DARTS)": fixed(0.25, 1 / 8, False, objective=Objective.SPREAD),
    "adaptive 1.25n, 7:1, by tail": fixed(0.25, 1 / 8, False),
    "adaptive 1.25n, 7:1, by tail, free patience": fixed(0.25, 1 / 8, False, None),
    "adaptive 1.25n, 4:4, by tail, free patience": fixed(0.25, 4 / 8, False, None),
    "auto, no guard": Arm(Shape(**FREE), None, 1 / 8),
    "auto": Arm(Shape(), None, 1 / 8),
    "auto, prompts unseen and allowed": Arm(Shape(unseen=True), None, 1 / 8, learnt=False),
    "auto, prompts unseen": Arm(Shape(), None, 1 / 8, learnt=False),
    "auto, corrected": Arm(Shape(corrected=True), None, 1 / 8),
}


def play(case: Case, arm: Arm, pool: Pool, before: Pool, other: Pool) -> tuple[Result, dict[str, float]]:
    """One step. `before`: samples of these prompts (of a trace: of others) that the statistics know; `other`: prompts of another draw."""
    prompts = list(pool)
    settings = _settings(arm, case)
    shaper = Shaper(settings, case.size, case.cap_tokens)
    known = before if arm.learnt else {f"other/{prompt}": items for prompt, items in other.items()}
    for prompt, items in known.items():
        shaper.spreads.observe(prompt, [(item.output_tokens, bool(item.meta.get("truncated"))) for item in items])
    where = case.where
    fleet = where.fleet(where.tp)
    if arm.settings is None:
        plan = StepPlan(tuple(Share(case.size, Rule(case.size, case.size), ShapeReason.NO_GAIN) for _ in prompts))
    else:
        usual = habit_of([item for items in known.values() for item in items])
        plan = shaper.plan(0, prompts, fleet_of(where.latency, fleet, usual, case.most * len(prompts)))
    batch = started(plan, prompts, pool)
    policy = Shaped(Stock(0), shaper, plan, prompts, batch)
    result = simulate(batch, fleet, where.latency, policy, engine=where.engine("fcfs"))
    told = shaper.step_ended(0, policy.groups.take())
    kept = {key for keys in policy.kept.values() for key in keys}
    assert len(kept) == case.size * len(prompts)
    everybody = [item for items in pool.values() for item in items]
    kept_items = [item for item in batch if f"0:{item.prompt_id}_{item.trial}" in kept]
    told |= {
        "makespan_s": result.makespan_s,
        "tokens": float(result.tokens),
        "samples": len(batch) / len(prompts),
        "kept_length": _level(kept_items) / _level(everybody),
    }
    rewards = [item.reward for item in everybody if item.reward is not None]
    if rewards and len(rewards) == len(everybody):
        told["reward_all"] = fmean(rewards)
        told["reward_kept"] = fmean(item.reward or 0.0 for item in kept_items)
    return result, told


def _settings(arm: Arm, case: Case) -> Shape:
    settings = arm.settings or Shape()
    longest = settings.longest if arm.longest is None else min(case.size, max(round(arm.longest * case.size), int(arm.longest > 0)))
    spare = None
    if arm.spare is not None:
        spare = min(float(case.most - case.size), max(1.0, round(arm.spare * case.size)))
    return replace(settings, longest=longest, spare=spare, most=min(2.0, case.most / case.size))


def _level(items: Sequence[Any]) -> float:
    """Geometric mean of the lengths."""
    return exp(fmean(log(max(1, item.output_tokens)) for item in items))
