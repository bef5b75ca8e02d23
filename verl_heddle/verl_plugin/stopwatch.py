"""How long something has been so, all together."""

from __future__ import annotations


class Stopwatch:
    """Seconds while it runs; the caller tells the time."""

    def __init__(self) -> None:
        self._spent_s = 0.0
        self._since_s: float | None = None

    def run(self, on: bool, now: float) -> None:
        """Let it run from now on, or stop it; without effect if that is how it is."""
        if on and self._since_s is None:
            self._since_s = now
        elif not on and self._since_s is not None:
            self._spent_s, self._since_s = self._spent_s + now - self._since_s, None

    def total_s(self, now: float) -> float:
        """Until now."""
        return self._spent_s + (now - self._since_s if self._since_s is not None else 0.0)
