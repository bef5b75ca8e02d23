"""Affinity with a margin (verl #7435): a conversation leaves its replica only if that one is clearly busier than the least busy.

Law: stay while the home replica's requests in flight exceed the fewest by at most `margin`; else move to the least loaded, which
becomes the home; a new conversation goes to the least loaded. Source: verl pull request #7435 (open), `affinity_break_margin`;
its author reports gains on every paired run with 2. Cost: O(1) per turn.
"""

from __future__ import annotations

from verl_heddle.simulate.baselines.base import Peer, PeerReason
from verl_heddle.trajectory import Reason, TurnStart

MARGIN = 2
"""The value of the pull request's own benchmarks."""


class AffinityMargin(Peer):
    """See the module."""

    def __init__(self, seed: int = 0, margin: int = MARGIN) -> None:
        super().__init__(seed)
        self._margin = margin

    def place(self, turn: TurnStart) -> tuple[str, Reason | PeerReason]:
        """The law above."""
        home = self.home_of(turn)
        if home is None:
            return self.least_loaded(), Reason.LEAST_INFLIGHT
        if self.loads[home] - self.loads.fewest > self._margin:
            return self.least_loaded(), PeerReason.REBALANCED
        return home, Reason.STICKY
