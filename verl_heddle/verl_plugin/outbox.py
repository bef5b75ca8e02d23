"""What a worker tells the router and waits for no answer to: it goes along with the next question, or together after a moment.

Law: events leave in the order in which they were put, each once, at the latest `LATEST_S` after they were put, and before any question that
is asked later. Why: a call to a Ray actor costs both ends several times what the router takes to decide (bench/router), and a turn has
three events for one question.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

LATEST_S = 0.01
"""A place that has become free is known so much later; with several turns in flight per slot no engine runs dry by it."""

Event = tuple[str, Any]
"""Name of the router's method, and what it is told."""


class Outbox:
    """One per worker, on its event loop. `send` takes the events that were not taken along in time."""

    def __init__(self, send: Callable[[list[Event]], None]) -> None:
        self._send = send
        self._events: list[Event] = []
        self._timer: asyncio.TimerHandle | None = None

    def put(self, name: str, what: Any) -> None:
        """To be told."""
        self._events.append((name, what))
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(LATEST_S, self.send)

    def take(self) -> list[Event]:
        """What goes along with a question; nothing is left."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        events, self._events = self._events, []
        return events

    def send(self) -> None:
        """Now."""
        events = self.take()
        if events:
            self._send(events)
