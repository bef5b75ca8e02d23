"""What the planner answers, and what it may be told ahead."""

from __future__ import annotations

from typing import NamedTuple

from verl_heddle.predict.quantities import Estimate
from verl_heddle.trajectory import TrajectoryId


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
