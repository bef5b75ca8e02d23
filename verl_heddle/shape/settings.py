"""Checks of `options.Shape` beyond its types, and the reasons for how each prompt is sampled."""

from __future__ import annotations

from enum import StrEnum

from verl_heddle.options import Shape
from verl_heddle.shape.budget import Objective


class ShapeReason(StrEnum):
    """Why a prompt is sampled the way it is, counted in the metric `heddle/shape/prompts/<reason>`."""

    SHAPED = "shaped"
    """Spare samples, dual-end selection."""
    SATURATED = "saturated"
    """The maximum of spare samples, shortest-only selection: the whole distribution is long (DARTS's tail pruning)."""
    NO_SPARES = "no_spares"
    """Plain sampling: the budget gave its spare samples to other prompts."""
    UNSEEN = "unseen"
    """Plain sampling: this prompt was never visited, and equal spares for all such prompts do not pay."""
    NO_GAIN = "no_gain"
    """Plain sampling of the whole step: no budget is forecast to shorten it."""
    NO_FORECAST = "no_forecast"
    """Plain sampling of the whole step: no latency model or no length statistics yet, and no fixed budget is set."""
    CONTROL = "control"
    """Plain sampling on purpose, as a baseline (`control_every`)."""
    LENGTH_BIAS = "length_bias"
    """Plain sampling: one more sample would exceed the length-bias bound, or the run has crossed it."""
    MIXED_LOSS = "mixed_loss"
    """Plain sampling: selection turned groups of mixed outcome into groups of one outcome, which give no gradient."""


def check(shape: Shape, size: int) -> list[str]:
    """Problems with `heddle.shape` for groups of this size, one line each."""
    problems = []
    if size < 2:
        problems.append(f"shaping needs groups of at least 2 samples (actor_rollout_ref.rollout.n), got {size}")
    if shape.spare is not None and not 0 <= shape.spare <= (shape.most - 1) * size:
        problems.append(f"heddle.shape.spare must lie between 0 and {(shape.most - 1) * size:g}, got {shape.spare:g}")
    if shape.uniform and (shape.spare is None or shape.spare != int(shape.spare)):
        problems.append(f"heddle.shape.uniform needs a whole number in heddle.shape.spare, got {shape.spare}")
    if not 1 <= shape.most <= 4:
        problems.append(f"heddle.shape.most must lie between 1 and 4 times n, got {shape.most:g}")
    if not 0 <= shape.longest <= size:
        problems.append(f"heddle.shape.longest must lie between 0 and n={size}, got {shape.longest}")
    for name, value in (("patience", shape.patience or 0.0), ("price", shape.price)):
        if not value >= 0:
            problems.append(f"heddle.shape.{name} must not be negative, got {value:g}")
    if shape.objective not in [str(objective) for objective in Objective]:
        problems.append(f"heddle.shape.objective must be one of {', '.join(Objective)}, got {shape.objective}")
    for name in ("length_bias", "prompt_bias", "mixed_loss"):
        if not 0 < getattr(shape, name) <= 1:
            problems.append(f"heddle.shape.{name} must be above 0 and at most 1 (no bound), got {getattr(shape, name):g}")
    if shape.rest_steps < 1 or shape.control_every < 0 or shape.control_every == 1:
        given = f"{shape.rest_steps} and {shape.control_every}"
        problems.append(f"heddle.shape.rest_steps must be at least 1, and control_every 0 or at least 2, got {given}")
    return problems
