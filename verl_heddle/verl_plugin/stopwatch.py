"""Total time that a condition has held."""

from __future__ import annotations


class Stopwatch:
    """Seconds while running; the caller passes the time."""

    def __init__(self) -> None:
        self._spent_s = 0.0
        self._since_s: float | None = None

    def run(self, on: bool, now: float) -> None:
        """Start or stop; no effect if it is in that state already."""
        if on and self._since_s is None:
            self._since_s = now
        elif not on and self._since_s is not None:
            self._spent_s, self._since_s = self._spent_s + now - self._since_s, None

    def total_s(self, now: float) -> float:
        """Seconds up to now."""
        return self._spent_s + (now - self._since_s if self._since_s is not None else 0.0)
