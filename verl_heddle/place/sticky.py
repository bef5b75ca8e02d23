"""Reproduces verl's rule: a conversation stays on its replica; a new one goes to the replica with the fewest requests in flight.

Law: look the conversation up in an LRU table of `CACHE_SIZE` entries; if its replica is still in the fleet, stay. Otherwise
choose at random among the replicas with the fewest requests in flight (or, with `deterministic`, the one the conversation id
hashes to) and remember it. Source: `GlobalRequestLoadBalancer` of verl 0.9.1 (`verl/workers/rollout/router.py`), reproduced
choice for choice; the contract test feeds both the same events and the same random numbers. Cost: O(replicas) for a new
conversation, O(1) for a known one.

Invariant: `inflight[r]` = acquisitions of r less releases of r since r joined, never below 0.
"""

from __future__ import annotations

from collections import OrderedDict
from random import Random

from verl_heddle.trajectory import Reason

CACHE_SIZE = 10_000
"""verl's `DEFAULT_ROUTING_CACHE_SIZE`: beyond it the least recently used conversation is evicted and reassigned."""


class StickyLeastInflight:
    """Places conversations on replicas by verl's rule. Not thread-safe; the caller serialises."""

    def __init__(self, rng: Random, deterministic: bool = False, cache_size: int = CACHE_SIZE) -> None:
        self.inflight: dict[str, int] = {}
        self._rng = rng
        self._deterministic = deterministic
        self._cache_size = cache_size
        self._home: OrderedDict[str, str] = OrderedDict()

    def add(self, replica: str) -> None:
        """A replica joins, with nothing in flight (one that is known is reset, as in verl)."""
        self.inflight[replica] = 0

    def remove(self, replica: str) -> None:
        """A replica leaves; its conversations are reassigned at their next turn."""
        self.inflight.pop(replica, None)

    def acquire(self, conversation: str, home: str | None = None) -> tuple[str, Reason]:
        """Choose the replica of the conversation's next turn and count it in flight there.

        Args:
            home: the conversation's replica, if the caller knows it; None: unknown, as with verl's own callers.

        Raises:
            RuntimeError: there is no replica (verl's message, which its async clients wait on).
        """
        if home is not None and home in self.inflight:
            self.note(conversation, home)
            return home, Reason.STICKY
        home = self._home.get(conversation)
        if home is not None:
            if home in self.inflight:
                self._home.move_to_end(conversation)
                self.inflight[home] += 1
                return home, Reason.STICKY
            del self._home[conversation]
        if not self.inflight:
            raise RuntimeError("No available servers in load balancer")
        if self._deterministic:
            replica, reason = list(self.inflight)[hash(conversation) % len(self.inflight)], Reason.HASHED
        else:
            fewest = min(self.inflight.values())
            replica = self._rng.choice([name for name, count in self.inflight.items() if count == fewest])
            reason = Reason.LEAST_INFLIGHT
        self.note(conversation, replica)
        return replica, reason

    def note(self, conversation: str, replica: str) -> None:
        """Record a turn placed on `replica`, which must be in the fleet: count it in flight and assign the conversation there."""
        self._home[conversation] = replica
        self._home.move_to_end(conversation)
        if len(self._home) > self._cache_size:
            self._home.popitem(last=False)
        self.inflight[replica] += 1

    def release(self, replica: str) -> None:
        """A request on `replica` ended; unknown replicas and surplus releases are ignored, as in verl."""
        if self.inflight.get(replica, 0) > 0:
            self.inflight[replica] -= 1

    def forget(self) -> int:
        """Unassign every conversation (verl: `clear_sticky_cache`); returns how many were assigned."""
        count = len(self._home)
        self._home.clear()
        return count
