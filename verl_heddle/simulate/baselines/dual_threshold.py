"""SGLang's dual threshold on verl's router (verl #6533): sticky while the fleet is balanced.

Law: the fleet is imbalanced if max - min > `absolute` and max > `relative` * min, in requests in flight. The conversation then moves to the
least loaded replica; otherwise it stays on its replica. A new conversation goes to the least loaded replica.
Source: verl pull request #6533 (open), the rule of SGLang's cache-aware router. Cost: O(1) per turn.
"""

from __future__ import annotations

from verl_heddle.simulate.baselines.base import Peer, PeerReason
from verl_heddle.trajectory import Reason, TurnStart

ABSOLUTE = 64
"""SGLang's `balance_abs_threshold`; the pull request disables the check by default and leaves the value to the user."""

RELATIVE = 1.5
"""SGLang's `balance_rel_threshold`."""


class DualThreshold(Peer):
    """verl #6533; both thresholds are on requests in flight."""

    def __init__(self, seed: int = 0, absolute: int = ABSOLUTE, relative: float = RELATIVE) -> None:
        super().__init__(seed)
        self._absolute, self._relative = absolute, relative

    def place(self, turn: TurnStart) -> tuple[str, Reason | PeerReason]:
        """Stay while the fleet is balanced, else move to the least loaded replica."""
        home = self.home_of(turn)
        if home is None:
            return self.least_loaded(), Reason.LEAST_INFLIGHT
        most, fewest = self.loads.most, self.loads.fewest
        if most - fewest > self._absolute and most > self._relative * fewest:
            return self.least_loaded(), PeerReason.REBALANCED
        return home, Reason.STICKY
