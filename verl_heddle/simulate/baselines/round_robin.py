"""Round-robin: turn k goes to replica k mod n, in fleet order.

Source: the `round_robin` policy of the SGLang and vLLM routers, the simplest baseline. Cost: O(1) per turn.
"""

from __future__ import annotations

from collections.abc import Iterable

from verl_heddle.fleet import Replica
from verl_heddle.simulate.baselines.base import Peer, PeerReason
from verl_heddle.trajectory import Reason, TurnStart


class RoundRobin(Peer):
    """Round-robin over the fleet, regardless of load and cache."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self._names: list[str] = []
        self._next = 0

    def replicas_added(self, replicas: Iterable[Replica]) -> None:
        """Replicas joined, empty."""
        replicas = list(replicas)
        super().replicas_added(replicas)
        self._names += [replica.name for replica in replicas if replica.name not in self._names]

    def replicas_removed(self, names: Iterable[str]) -> None:
        """Replicas left."""
        super().replicas_removed(names)
        self._names = [name for name in self._names if name in self.loads]

    def place(self, turn: TurnStart) -> tuple[str, Reason | PeerReason]:
        """The next replica in fleet order."""
        self._next += 1
        return self._names[(self._next - 1) % len(self._names)], PeerReason.ROUND_ROBIN
