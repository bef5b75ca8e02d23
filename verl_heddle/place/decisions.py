"""What the planner answers, and what it may be told ahead."""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

from verl_heddle.predict.quantities import Estimate
from verl_heddle.trajectory import TrajectoryId


class PlaceReason(StrEnum):
    """Why a turn went where it went, beyond verl's own reasons."""

    PLANNED = "planned"
    """First turn, or its replica left: where the step is expected to end soonest."""

    MOVED = "moved"
    """Later turn, on a replica that is expected to end sooner than its own, by more than the move costs."""

    NOT_PAYING = "not_paying"
    """First turn by verl's rule, because planning has not paid over the last steps."""


class Move(NamedTuple):
    """The trajectory's next turn goes to `replica`: pre-warm it now. Seconds: what it is expected to gain, and to cost there."""

    trajectory: str
    replica: str
    gain_s: float
    cost_s: float


class Expected(NamedTuple):
    """A trajectory that a step is about to start."""

    trajectory: TrajectoryId
    prompt_tokens: int
    estimate: Estimate | None
