"""PLAS: inside the replica, the trajectory with the least attained service runs first.

Law: priority = tokens that the trajectory has generated so far, in whole quanta (ties by arrival); placement is verl's own. It needs no
prediction, so every predictor must beat it. For a makespan the order is the wrong way round (short trajectories first), which is why it is
here. Source: Autellix (arXiv 2502.13965), program-level attained service: calls are ordered by the cumulative service of their program's
earlier calls, in discrete queues. Simplified: service is generated tokens (paper: execution time); queues have equal width (paper: widths
of its choice); verl's load balancer replaces the paper's, so that only the order differs. Needs `EngineOptions(order="priority")`.
"""

from __future__ import annotations

from dataclasses import replace

from verl_heddle.simulate.baselines.stock import Stock
from verl_heddle.trajectory import Decision, TurnStart

QUANTUM_TOKENS = 64
"""Width of a queue; equal to that of heddle's own priorities, so that the two differ in direction only."""


class Plas(Stock):
    """Least attained service first, with verl's placement."""

    def turn_started(self, turn: TurnStart, now: float) -> Decision:
        """verl's placement, least served first."""
        return replace(super().turn_started(turn, now), priority=turn.generated_tokens // QUANTUM_TOKENS)
