"""Calls to other processes that end: a deadline on every answer, and a cancellation that reaches the other side."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import ActorDiedError

ANSWER_S = 30.0
"""Seconds after which a worker hears that the router has no news for it, and asks again: so it finds out that a router hangs."""

RETRY_S = 0.1
"""A `ray.cancel` within about 1 ms of the call can be lost; asked again at this interval it never was."""


async def answer(ref: Any, deadline_s: float) -> Any:
    """Await an object ref. Not by `asyncio.wait_for`, which before Python 3.12 forgets a cancellation that comes with the answer.

    Raises:
        TimeoutError: no answer within `deadline_s` seconds.
    """
    async with asyncio.timeout(deadline_s):
        return await ref


class Promises:
    """Answers that another call on this event loop gives, by name. One that is given before it is waited for is kept for the waiting. Of
    two that wait for one name the first goes without."""

    def __init__(self) -> None:
        self._kept: dict[str, Any] = {}
        self._waiting: dict[str, asyncio.Future[Any]] = {}

    @property
    def waiting(self) -> list[str]:
        """Names that somebody waits for."""
        return list(self._waiting)

    @property
    def names(self) -> list[str]:
        """Names that somebody waits for, or that have an answer nobody has asked for."""
        return [*self._waiting, *self._kept]

    async def wait(self, name: str, within_s: float | None = None) -> Any:
        """The answer, or None once it is dropped.

        Raises:
            TimeoutError: neither came within `within_s` seconds.
        """
        if name in self._kept:
            return self._kept.pop(name)
        self._settle(name, None)
        loop = asyncio.get_running_loop()
        future = self._waiting[name] = loop.create_future()
        timer = None if within_s is None else loop.call_later(within_s, _too_late, future)
        try:
            return await future
        finally:
            if timer is not None:
                timer.cancel()
            if self._waiting.get(name) is future:  # it stopped waiting by itself
                del self._waiting[name]

    def give(self, name: str, value: Any = None) -> None:
        """Here is the answer."""
        if not self._settle(name, value):
            self._kept[name] = value

    def drop(self, name: str) -> None:
        """There will be no answer, or nobody wants it any more."""
        self._kept.pop(name, None)
        self._settle(name, None)

    def drop_all(self) -> None:
        """`drop` of all names."""
        for name in self.names:
            self.drop(name)

    def _settle(self, name: str, value: Any) -> bool:
        future = self._waiting.pop(name, None)
        if future is not None and not future.done():
            future.set_result(value)
        return future is not None


def _too_late(future: asyncio.Future[Any]) -> None:
    if not future.done():
        future.set_exception(TimeoutError())


async def cancel_until_settled(ref: Any, deadline_s: float) -> bool:
    """Cancel a running actor call until it has ended; False if it had not after `deadline_s` seconds."""
    future = asyncio.wrap_future(ref.future())
    until = time.monotonic() + deadline_s
    while not future.done() and time.monotonic() < until:
        ray.cancel(ref)
        await asyncio.wait({future}, timeout=RETRY_S)
    if not future.done():
        return False
    if not future.cancelled():
        future.exception()  # nobody else retrieves it
    return True


_cancelling: set[asyncio.Task] = set()


async def cancellations_settled(deadline_s: float) -> None:
    """Until every call of this process that is being cancelled has ended at the server, or has been given up; `deadline_s` at most."""
    if _cancelling:
        await asyncio.wait(set(_cancelling), timeout=deadline_s)


class ServerHandle:
    """Stands for a rollout server's actor handle in `LLMServerClient.generate`: adds arguments and cancels for real.

    Cancelling the asyncio task that awaits a Ray call leaves the call running; here it is cancelled at the server as well, which makes
    vLLM abort the request and free its KV blocks.
    """

    def __init__(self, handle: Any, extra: dict[str, Any], cancel_s: float, lost: Callable[[], None]) -> None:
        self._handle, self._extra, self._cancel_s, self._lost = handle, extra, cancel_s, lost
        self.generate = self  # `handle.generate.remote(...)`

    def remote(self, **kwargs: Any) -> Any:
        """Call the server's `generate`; returns an awaitable of its `TokenOutput`."""
        ref = self._handle.generate.remote(**kwargs | self._extra)

        async def result() -> Any:
            try:
                return await ref
            except asyncio.CancelledError:
                task = asyncio.create_task(self._cancel(ref))
                _cancelling.add(task)
                task.add_done_callback(_cancelling.discard)
                raise

        return result()

    async def _cancel(self, ref: Any) -> None:
        if not await cancel_until_settled(ref, self._cancel_s):
            self._lost()


def of_a_dead_replica(error: Exception) -> bool:
    """Whether the server is dead, or dies because its engine is (vLLM's `EngineDeadError`, which is not imported here: it is heavy)."""
    return isinstance(error, ActorDiedError) or type(getattr(error, "cause", None)).__name__ == "EngineDeadError"
