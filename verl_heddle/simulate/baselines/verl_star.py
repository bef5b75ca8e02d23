"""Verl*: cache affinity, unless the load is far apart.

Law: if the largest and the smallest number of requests in flight differ by more than `gap` (32), the turn goes to the least loaded replica;
else it stays with its conversation's replica; a new conversation goes to the least loaded.
Source: baseline "Verl*" of Heddle (arXiv 2603.28101, section 8): the SGLang router's rule, "least-load if max - min load > 32, else
cache-aware". Cost: O(1) per turn.
"""

from __future__ import annotations

from verl_heddle.simulate.baselines.base import Peer, PeerReason
from verl_heddle.trajectory import Reason, TurnStart

GAP = 32
"""The paper's example value, and the SGLang router's first default."""


class VerlStar(Peer):
    """See the module."""

    def __init__(self, seed: int = 0, gap: int = GAP) -> None:
        super().__init__(seed)
        self._gap = gap

    def place(self, turn: TurnStart) -> tuple[str, Reason | PeerReason]:
        """The law above."""
        home = self.home_of(turn)
        if home is None:
            return self.least_loaded(), Reason.LEAST_INFLIGHT
        if self.loads.most - self.loads.fewest > self._gap:
            return self.least_loaded(), PeerReason.REBALANCED
        return home, Reason.STICKY
