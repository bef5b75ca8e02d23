"""Batches a worker's calls to the router: events, which need no answer, and requests.

Law: events are sent once each, in order, within `LATEST_S`, and before any later request. Only one call with requests is in flight at a
time; requests that arrive meanwhile are sent together in the next, so a busy router gets larger batches rather than more calls. Why: a Ray
actor call costs both ends ten times what the router takes to decide (bench/router), and even a turn that needs no request has two events,
its begin and its end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

LATEST_S = 0.02
"""Longest delay of an event, in seconds. The router learns of a free slot this much later; with several turns in flight per slot no engine
runs dry. A call costs the router as much as ten turns, so each worker makes at most 50 calls a second for events."""

KEPT = 20_000
"""Most events kept while the router is lost: more than a worker produces in a step. Beyond it the oldest are dropped."""

Event = tuple[str, Any]
"""Name of the router's method, and its argument."""


class Outbox:
    """Pending events; one outbox per worker, on its event loop. `send` sends those that no request has taken along within `LATEST_S`."""

    def __init__(self, send: Callable[[list[Event]], None]) -> None:
        self._send = send
        self._events: list[Event] = []
        self._timer: asyncio.TimerHandle | None = None

    def put(self, name: str, payload: Any) -> None:
        """Queue an event for the router."""
        self._events.append((name, payload))
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(LATEST_S, self.send)

    def take(self) -> list[Event]:
        """Remove and return the pending events, to be sent with a request."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        events, self._events = self._events, []
        return events

    def send(self) -> None:
        """Send the pending events now."""
        events = self.take()
        if events:
            self._send(events)


class Questions:
    """Batched requests; one per worker, on its event loop. `send` sends a batch, returns the answers in order, and applies a deadline."""

    def __init__(self, send: Callable[[list[Any]], Awaitable[Sequence[Any]]]) -> None:
        self._send = send
        self._pending: list[tuple[Any, asyncio.Future[Any]]] = []
        self._in_flight: asyncio.Task[None] | None = None

    async def ask(self, request: Any) -> Any:
        """Return the answer. A request whose caller is cancelled before the batch is sent is not sent.

        Raises:
            Exception: what `send` raised, for every request of the batch.
        """
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._pending.append((request, future))
        if self._in_flight is None or self._in_flight.done():
            self._in_flight = asyncio.create_task(self._send_batches())
        return await future

    async def _send_batches(self) -> None:
        while batch := [(request, future) for request, future in self._pending if not future.done()]:
            self._pending = []
            try:
                answers = await self._send([request for request, _ in batch])
            except Exception as error:
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
            else:
                for (_, future), result in zip(batch, answers, strict=True):
                    if not future.done():
                        future.set_result(result)
