"""Bounded calls to other processes: a deadline on every answer, and cancellation that reaches the callee."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import ActorDiedError

ANSWER_S = 30.0
"""Seconds after which the router answers an open news call even without news. The worker then calls again, which detects a hung router."""

RETRY_S = 0.1
"""Interval of cancellation retries. A `ray.cancel` within about 1 ms of the call can be lost; with retries none ever was."""


async def answer(ref: Any, deadline_s: float) -> Any:
    """Await an object ref. Not with `asyncio.wait_for`, which before Python 3.12 loses a cancellation that coincides with the answer.

    Raises:
        TimeoutError: no answer within `deadline_s` seconds.
    """
    async with asyncio.timeout(deadline_s):
        return await ref


class Promises:
    """Named answers passed between coroutines of one event loop. An answer given early is kept until it is awaited. If two coroutines
    wait for the same name, the first receives None."""

    def __init__(self) -> None:
        self._kept: dict[str, Any] = {}
        self._waiting: dict[str, asyncio.Future[Any]] = {}

    @property
    def waiting(self) -> list[str]:
        """Names with a waiter."""
        return list(self._waiting)

    @property
    def names(self) -> list[str]:
        """Names with a waiter or an unclaimed answer."""
        return [*self._waiting, *self._kept]

    async def wait(self, name: str, within_s: float | None = None) -> Any:
        """Wait for the answer; None if it is dropped.

        Raises:
            TimeoutError: neither happened within `within_s` seconds.
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
            if self._waiting.get(name) is future:  # timed out or cancelled, not answered
                del self._waiting[name]

    def give(self, name: str, value: Any = None) -> None:
        """Deliver the answer, or keep it until it is awaited."""
        if not self._settle(name, value):
            self._kept[name] = value

    def drop(self, name: str) -> None:
        """Discard a kept answer; a waiter receives None."""
        self._kept.pop(name, None)
        self._settle(name, None)

    def drop_all(self) -> None:
        """`drop` every name."""
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
    """Cancel a running actor call, repeatedly, until it has ended; False if it is still running after `deadline_s` seconds."""
    future = asyncio.wrap_future(ref.future())
    until = time.monotonic() + deadline_s
    while not future.done() and time.monotonic() < until:
        ray.cancel(ref)
        await asyncio.wait({future}, timeout=RETRY_S)
    if not future.done():
        return False
    if not future.cancelled():
        future.exception()  # marks the exception as retrieved
    return True


_cancelling: set[asyncio.Task] = set()


async def cancellations_settled(deadline_s: float) -> None:
    """Wait until each call being cancelled by this process has ended at the server or been given up; at most `deadline_s` seconds."""
    if _cancelling:
        await asyncio.wait(set(_cancelling), timeout=deadline_s)


class ServerHandle:
    """Stands for a rollout server's actor handle in `LLMServerClient.generate`: adds arguments and cancels at the server.

    Cancelling the asyncio task that awaits a Ray call leaves the call running. This handle also cancels it at the server, which
    makes vLLM abort the request and free its KV blocks.
    """

    def __init__(self, handle: Any, extra: dict[str, Any], cancel_s: float, lost: Callable[[], None]) -> None:
        self._handle, self._extra, self._cancel_s, self._lost = handle, extra, cancel_s, lost
        self.generate = self  # `handle.generate.remote(...)`

    def remote(self, **kwargs: Any) -> Any:
        """Call the server's `generate`; returns an awaitable `TokenOutput`."""
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
    """Whether the error means that the server, or its engine, is dead (`EngineDeadError`, matched by name: importing vLLM is heavy)."""
    return isinstance(error, ActorDiedError) or type(getattr(error, "cause", None)).__name__ == "EngineDeadError"
