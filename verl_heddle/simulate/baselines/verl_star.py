"""Verl*: cache affinity, unless the fleet is imbalanced.

Law: if the largest and the smallest number of requests in flight differ by more than `gap` (32), the turn goes to the least loaded replica.
Otherwise it stays on its conversation's replica. A new conversation goes to the least loaded replica.
Source: baseline "Verl*" of Heddle (arXiv 2603.28101, section 8): the SGLang router's rule, "least-load if max - min load > 32, else
cache-aware". Cost: O(1) per turn.
"""

from __future__ import annotations

from verl_heddle.simulate.baselines.base import Peer, PeerReason
from verl_heddle.trajectory import Reason, TurnStart

GAP = 32
"""The paper's example value, and the SGLang router's first default."""


class VerlStar(Peer):
    """The "Verl*" baseline of the Heddle paper; `gap` is in requests in flight."""

    def __init__(self, seed: int = 0, gap: int = GAP) -> None:
        super().__init__(seed)
        self._gap = gap

    def place(self, turn: TurnStart) -> tuple[str, Reason | PeerReason]:
        """Stay unless the gap is exceeded, else move to the least loaded replica."""
        home = self.home_of(turn)
        if home is None:
            return self.least_loaded(), Reason.LEAST_INFLIGHT
        if self.loads.most - self.loads.fewest > self._gap:
            return self.least_loaded(), PeerReason.REBALANCED
        return home, Reason.STICKY
