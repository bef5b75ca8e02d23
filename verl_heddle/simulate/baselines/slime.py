"""Slime: every turn goes to the least loaded replica, regardless of the prefix cache.

Law: each turn goes to the replica with the fewest requests in flight; ties are broken at random.
Source: baseline "Slime" of Heddle (arXiv 2603.28101, section 8): "least-load per step". Cost: O(1) per turn.
"""

from __future__ import annotations

from verl_heddle.simulate.baselines.base import Peer, PeerReason
from verl_heddle.trajectory import Reason, TurnStart


class Slime(Peer):
    """The "Slime" baseline of the Heddle paper."""

    def place(self, turn: TurnStart) -> tuple[str, Reason | PeerReason]:
        """The least loaded replica."""
        return self.least_loaded(), Reason.LEAST_INFLIGHT
