"""Slime: every turn goes to the least loaded replica, whatever it cached.

Law: the replica with the fewest requests in flight, at random among equals, anew for each turn.
Source: baseline "Slime" of Heddle (arXiv 2603.28101, section 8): "least-load per step". Cost: O(1) per turn.
"""

from __future__ import annotations

from verl_heddle.simulate.baselines.base import Peer, PeerReason
from verl_heddle.trajectory import Reason, TurnStart


class Slime(Peer):
    """See the module."""

    def place(self, turn: TurnStart) -> tuple[str, Reason | PeerReason]:
        """The law above."""
        return self.least_loaded(), Reason.LEAST_INFLIGHT
