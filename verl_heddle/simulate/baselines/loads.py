"""Requests in flight by replica, with the fewest and the most at hand.

Law: replicas stand in one bucket per load; loads change by one, so the lowest and the highest non-empty bucket move by at most one.
Invariant: every replica is in the bucket of its load, at the place `_at` says. Cost: O(1) per change and per question, where verl's own
table costs O(replicas): the simulator asks a million times.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random


class Loads:
    """Counts per replica name, never below 0."""

    def __init__(self) -> None:
        self._load: dict[str, int] = {}
        self._buckets: list[list[str]] = [[]]
        self._at: dict[str, int] = {}
        self._fewest = self._most = 0

    @property
    def fewest(self) -> int:
        """The smallest load; 0 without replicas."""
        while self._fewest < self._most and not self._buckets[self._fewest]:
            self._fewest += 1
        return self._fewest

    @property
    def most(self) -> int:
        """The largest load; 0 without replicas."""
        while self._most and not self._buckets[self._most]:
            self._most -= 1
        return self._most

    def least(self, rng: Random) -> str:
        """A replica with the smallest load, at random among equals.

        Raises:
            IndexError: there is no replica.
        """
        return rng.choice(self._buckets[self.fewest])

    def add(self, name: str) -> None:
        """A replica joins with load 0; one that is known is reset."""
        self.remove(name)
        self._put(name, 0)

    def remove(self, name: str) -> None:
        """A replica leaves; unknown names are ignored."""
        if name in self._load:
            self._take(name)

    def change(self, name: str, by: int) -> None:
        """Add `by` to the replica's load, not below 0; unknown names are ignored."""
        if name in self._load:
            self._put(name, max(0, self._take(name) + by))

    def __getitem__(self, name: str) -> int:
        return self._load[name]

    def __contains__(self, name: object) -> bool:
        return name in self._load

    def __iter__(self) -> Iterator[str]:
        return iter(self._load)

    def __len__(self) -> int:
        return len(self._load)

    def _put(self, name: str, load: int) -> None:
        while len(self._buckets) <= load:
            self._buckets.append([])
        self._load[name] = load
        self._at[name] = len(self._buckets[load])
        self._buckets[load].append(name)
        self._fewest, self._most = min(self._fewest, load), max(self._most, load)

    def _take(self, name: str) -> int:
        load, place = self._load.pop(name), self._at.pop(name)
        bucket = self._buckets[load]
        last = bucket.pop()
        if last != name:
            bucket[place] = last
            self._at[last] = place
        return load
