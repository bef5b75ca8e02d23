"""How a worker speaks to the router in few calls: events that wait for no answer go together, and so do questions.

Law: events leave in the order in which they were put, each once, at the latest `LATEST_S` after they were put, and before any question that
is asked later. One call with questions is under way at a time; those that come meanwhile go together with the next: a router that has no
time is asked in larger lots, not in more calls. Why: a call to a Ray actor costs both ends ten times what the router takes to decide
(bench/router), and a turn has a begin and an end to tell, if it need not be asked for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

LATEST_S = 0.02
"""A place that has become free is known so much later; with several turns in flight per slot no engine runs dry by it. A call costs the
router as much as ten turns, and so every worker makes 50 a second at most for what it tells."""

KEPT = 20_000
"""Events kept for a router that does not answer: more than a worker has in a step. The oldest go."""

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


class Questions:
    """One per worker, on its event loop. `send` puts several at once and returns their answers in order; it has a deadline of its own."""

    def __init__(self, send: Callable[[list[Any]], Awaitable[Sequence[Any]]]) -> None:
        self._send = send
        self._asked: list[tuple[Any, asyncio.Future[Any]]] = []
        self._under_way: asyncio.Task[None] | None = None

    async def ask(self, what: Any) -> Any:
        """The answer. Who is cancelled before his question has left is not asked for.

        Raises:
            Exception: what `send` raised, for every question of the lot.
        """
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._asked.append((what, future))
        if self._under_way is None or self._under_way.done():
            self._under_way = asyncio.create_task(self._go())
        return await future

    async def _go(self) -> None:
        while lot := [(what, future) for what, future in self._asked if not future.done()]:
            self._asked = []
            try:
                answers = await self._send([what for what, _ in lot])
            except Exception as error:
                for _, future in lot:
                    if not future.done():
                        future.set_exception(error)
            else:
                for (_, future), one in zip(lot, answers, strict=True):
                    if not future.done():
                        future.set_result(one)
