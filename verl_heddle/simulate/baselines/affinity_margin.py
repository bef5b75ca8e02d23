"""Affinity with a margin (verl #7435): a conversation moves only if its replica is clearly busier than the least loaded one.

Law: a conversation stays while its replica's requests in flight exceed the minimum by at most `margin`. Otherwise it moves to the least
loaded replica and stays there. A new conversation goes to the least loaded replica. Source: verl pull request #7435 (open),
`affinity_break_margin`; its author reports gains in every paired run with a margin of 2. Cost: O(1) per turn.
"""

from __future__ import annotations

from verl_heddle.simulate.baselines.base import Peer, PeerReason
from verl_heddle.trajectory import Reason, TurnStart

MARGIN = 2
"""The value used in the pull request's benchmarks."""


class AffinityMargin(Peer):
    """verl #7435; `margin` is in requests in flight."""

    def __init__(self, seed: int = 0, margin: int = MARGIN) -> None:
        super().__init__(seed)
        self._margin = margin

    def place(self, turn: TurnStart) -> tuple[str, Reason | PeerReason]:
        """Stay within the margin, else move to the least loaded replica."""
        home = self.home_of(turn)
        if home is None:
            return self.least_loaded(), Reason.LEAST_INFLIGHT
        if self.loads[home] - self.loads.fewest > self._margin:
            return self.least_loaded(), PeerReason.REBALANCED
        return home, Reason.STICKY
