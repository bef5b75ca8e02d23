"""Which replicas' engines a weight update has stopped, whether they are in the fleet or away with the trainer.

Engines go on one by one, and the first would be given everybody who waits: so they wait for the others, for a little. Time comes in by
arguments only. Cost: nothing while no engine is paused, otherwise O(replicas).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from math import inf

LONGEST_PAUSE_S = 3600.0
"""A pause that lasts longer is not believed."""

SETTLE_S = 5.0
"""How long replicas that go on after a weight update wait for the others."""


class Pauses:
    """Pauses by replica name."""

    def __init__(self) -> None:
        self._since_s: dict[str, float] = {}
        self._settled_s = inf
        """When those that go on do not wait any longer; inf: they need not."""

    def __contains__(self, name: str) -> bool:
        return name in self._since_s

    def __iter__(self) -> Iterator[str]:
        return iter(self._since_s)

    def begin(self, name: str, now: float) -> None:
        """This engine takes no requests."""
        self._since_s[name] = now

    def end(self, name: str, now: float) -> bool:
        """It goes on; False if it did already."""
        if self._since_s.pop(name, None) is None:
            return False
        self._settled_s = min(self._settled_s, now + SETTLE_S)
        return True

    def tick(self, now: float) -> bool:
        """Time has passed: those that are paused are not waited for any longer, and a pause of which nobody has heard the end is over;
        returns whether one is."""
        over = [name for name, since_s in self._since_s.items() if since_s + LONGEST_PAUSE_S <= now]
        for name in over:
            self.end(name, now)
        if self._settled_s <= now:
            self._settled_s = inf
        return bool(over)

    def all(self, fleet: Collection[str]) -> bool:
        """Whether no engine of the fleet is at work."""
        return bool(self._since_s) and all(name in self._since_s for name in fleet)

    def settling(self, fleet: Collection[str]) -> bool:
        """Whether those of the fleet that go on wait for others of it."""
        return self._settled_s < inf and any(name in self._since_s for name in fleet)

    def due_s(self, fleet: Collection[str]) -> float:
        """When `tick` has something to do for this fleet; inf: never."""
        ends = [since_s + LONGEST_PAUSE_S for name, since_s in self._since_s.items() if name in fleet]
        return min([self._settled_s, *ends]) if ends else inf
