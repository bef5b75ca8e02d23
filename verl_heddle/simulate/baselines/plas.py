"""PLAS: inside the replica, the trajectory that has been served least runs first.

Law: priority = the trajectory's attained service, in tokens generated so far, in whole quanta (ties by arrival); placement is
verl's own. It needs no prediction, so every predictor must beat it; for a makespan it is the wrong way round (short ones first),
which is the point. Source: Autellix (arXiv 2502.13965), program-level attained service: calls ordered by the cumulated service of
their program's earlier calls, in discrete queues. Simplified: service counts generated tokens (the paper: execution time), queues
of equal width (the paper: widths of its choice), and the paper's load balancer is replaced by verl's, so that the order alone is
compared. Needs `EngineOptions(order="priority")`.
"""

from __future__ import annotations

from dataclasses import replace

from verl_heddle.simulate.baselines.stock import Stock
from verl_heddle.trajectory import Decision, TurnStart

QUANTUM_TOKENS = 64
"""Width of a queue; that of heddle's own priorities, so that the two differ in direction only."""


class Plas(Stock):
    """See the module."""

    def turn_started(self, turn: TurnStart, now: float) -> Decision:
        """verl's placement, least served first."""
        return replace(super().turn_started(turn, now), priority=turn.generated_tokens // QUANTUM_TOKENS)
