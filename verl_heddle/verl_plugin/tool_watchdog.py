"""Keeps tools from hanging, crashing or flooding a trajectory: every tool call ends by its deadline with text the model can read.

Law: a call returns within `heddle.tools.call_s` (per attempt, and never beyond the remainder of `trajectory_s`), whatever the tool does.
A failure comes back as a tool message in verl's own words ("Error executing tool ..."), so the trajectory, its group and the step
continue. Cancellation of the trajectory is the only exception raised here that verl does not turn into such a message.

- A coroutine is cancelled at its deadline; one that ignores the cancellation is abandoned and counted.
- A plain function runs in its own thread. Threads cannot be killed, so at its deadline it is abandoned and counted. While
  `max_abandoned` abandoned calls of a tool are still running, further calls of that tool fail immediately.
- A BaseException counts as a crash (`sys.exit()` in a tool would end the worker's event loop).
- Text is made valid Unicode (tokenizers refuse lone surrogates) and cut to `max_chars` before it is copied.
- Tools named in `idempotent` are retried after a failure, up to `retries` times.

Limit: a coroutine that blocks (`time.sleep` in an `async def`) stops the event loop that enforces the deadline. Make it a plain function.

Source: verl issues 5361, 1948 and 340. Cost: a task or thread per call, some 50 microseconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import math
import threading
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from verl.tools.function_tool import FunctionTool, normalize_function_tool_return
from verl.tools.schemas import ToolResponse

from verl_heddle.options import Tools
from verl_heddle.verl_plugin.live import CURRENT
from verl_heddle.verl_plugin.log import log_once

PREFIX = "tools/"
CANCEL_S = 1.0
"""How long a cancelled coroutine may take to clean up."""
BACKOFF_S = 0.2
"""Delay before a retry: a restarting service needs a moment."""


class ToolError(Exception):
    """A tool call failed; verl shows the text to the model."""


@dataclass(slots=True)
class _Raised:
    error: BaseException


@dataclass
class Watchdog:
    """Guards the tools of one worker. `counts` receives the `tools/<what>` counters; all start at 0 so that W&B shows them."""

    options: Tools
    counts: Counter[str]
    _abandoned: Counter[str] = field(default_factory=Counter)
    _threads: asyncio.Semaphore | None = None

    def __post_init__(self) -> None:
        for name in ("calls", "failures", "crashes", "timeouts", "out_of_time", "abandoned", "retries", "cut", "repaired"):
            self.counts[PREFIX + name] += 0

    def guard(self, tool: Any) -> Any:
        """Wrap the methods that run a verl tool's code (`FunctionTool.call`; `BaseTool.create`, `execute`, `release`); returns the tool."""
        if not self.options.enable or getattr(tool, "heddle_guarded", False):
            return tool
        if isinstance(tool, FunctionTool):
            original = tool.call

            async def call(parameters: Any) -> Any:
                if tool.is_async:
                    return await self._call(tool.name, lambda: self._in_task(lambda: original(parameters)))
                return await self._call(tool.name, lambda: self._in_thread(tool.name, lambda: tool.fn(**parameters)))

            tool.call = call
        else:
            create, execute, release = tool.create, tool.execute, tool.release

            @functools.wraps(execute)
            async def guarded_execute(*args: Any, **kwargs: Any) -> Any:
                return await self._call(tool.name, lambda: self._in_task(lambda: execute(*args, **kwargs)))

            @functools.wraps(create)
            async def guarded_create(*args: Any, **kwargs: Any) -> Any:
                return await self._step(tool.name, lambda: create(*args, **kwargs))

            @functools.wraps(release)
            async def guarded_release(*args: Any, **kwargs: Any) -> None:
                try:  # verl awaits it outside its own error handling
                    await self._step(tool.name, lambda: release(*args, **kwargs))
                except ToolError as failure:
                    log_once(f"tool {tool.name} could not be released ({failure})")

            tool.create, tool.execute, tool.release = guarded_create, guarded_execute, guarded_release
        tool.heddle_guarded = True
        return tool

    async def _call(self, name: str, attempt: Callable[[], Awaitable[Any]]) -> tuple[ToolResponse, float | None, dict]:
        """Call, with retries, and normalize the result. Raises ToolError, or CancelledError if the trajectory is cancelled."""
        self.counts[PREFIX + "calls"] += 1
        for left in range(self.options.retries if name in self.options.idempotent else 0, -1, -1):
            try:
                return self._tidy(await self._limited(name, attempt))
            except ToolError:
                self.counts[PREFIX + "failures"] += not left
                if not left:
                    raise
            self.counts[PREFIX + "retries"] += 1
            await asyncio.sleep(BACKOFF_S)
        raise AssertionError("unreachable")

    async def _step(self, name: str, make: Callable[[], Awaitable[Any]]) -> Any:
        """One call of a tool's `create` or `release`. Raises ToolError."""
        return await self._limited(name, lambda: self._in_task(make))

    async def _limited(self, name: str, attempt: Callable[[], Awaitable[Any]]) -> Any:
        """The result of one attempt. Raises ToolError if the attempt raised, timed out, or is not allowed."""
        if self._abandoned[name] >= self.options.max_abandoned:
            raise self._failed("failures", f"{self._abandoned[name]} earlier calls are still hanging", count=False)
        recorder = CURRENT.get()
        left_s = self.options.trajectory_s - recorder.tool_s if recorder is not None else math.inf
        if left_s <= 0:
            raise self._failed("out_of_time", f"this episode's {self.options.trajectory_s:g} s of tool time are used up")
        task = asyncio.ensure_future(attempt())
        limit_s = min(self.options.call_s, left_s)
        try:
            await asyncio.wait({task}, timeout=limit_s)
        except asyncio.CancelledError:
            task.cancel()
            raise
        if not task.done():
            log_once(f"tool {name} did not answer within {limit_s:g} s; the trajectory continues with an error message")
            await self._give_up(name, task)
            raise self._failed("timeouts", f"no answer within {limit_s:g} s")
        if task.cancelled():
            raise self._failed("crashes", "it cancelled itself")
        result = task.result()
        if isinstance(result, _Raised):
            raise self._failed("crashes", f"{type(result.error).__name__}: {result.error}")
        return result

    def _failed(self, what: str, text: str, count: bool = True) -> ToolError:
        self.counts[PREFIX + what] += count
        return ToolError(_valid(text)[:1000])

    async def _give_up(self, name: str, task: asyncio.Future) -> None:
        """Cancel the task; while it ignores the cancellation it counts as abandoned."""
        task.cancel()
        await asyncio.wait({task}, timeout=CANCEL_S)
        if not task.done():
            self._abandon(name)
            task.add_done_callback(lambda _: self._came_back(name))

    def _abandon(self, name: str) -> None:
        self.counts[PREFIX + "abandoned"] += 1
        self._abandoned[name] += 1

    def _came_back(self, name: str) -> None:
        self._abandoned[name] -= 1

    async def _in_task(self, make: Callable[[], Awaitable[Any]]) -> Any:
        """Await a coroutine; its exceptions are returned as values, because asyncio lets SystemExit escape a task into the event loop."""
        try:
            return await make()
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            return _Raised(error)

    async def _in_thread(self, name: str, function: Callable[[], Any]) -> Any:
        """Run a plain function in its own thread, at most `threads` at a time; on cancellation the thread is abandoned."""
        if self._threads is None:
            self._threads = asyncio.Semaphore(self.options.threads)
        loop, context = asyncio.get_running_loop(), contextvars.copy_context()
        done: asyncio.Future[Any] = loop.create_future()

        def finish(result: Any) -> None:
            if not done.done():
                done.set_result(result)
            elif done.cancelled():
                self._came_back(name)

        def work() -> None:
            try:
                result = context.run(function)
            except BaseException as error:
                result = _Raised(error)
            with contextlib.suppress(RuntimeError):  # the worker has ended
                loop.call_soon_threadsafe(finish, result)

        async with self._threads:
            threading.Thread(target=work, name=f"tool {name}", daemon=True).start()
            try:
                return await done
            except asyncio.CancelledError:
                self._abandon(name)
                raise

    def _tidy(self, raw: Any) -> tuple[ToolResponse, float | None, dict]:
        """Convert a tool's return value to verl's triple, with valid text cut to `max_chars`. Raises ToolError."""
        try:
            if isinstance(raw, (bytes, bytearray)):
                given = bytes(raw[: 4 * self.options.max_chars])
                raw = given.decode(errors="replace")
                self.counts[PREFIX + "repaired"] += raw.encode() != given
            whole = isinstance(raw, tuple) and len(raw) == 3 and isinstance(raw[0], ToolResponse)
            response, reward, metrics = raw if whole else normalize_function_tool_return(raw)  # type: ignore[misc]
        except Exception as error:
            raise self._failed("crashes", f"{type(error).__name__}: {error}") from error
        text = response.text
        if text is not None:
            short = _cut(text, self.options.max_chars)
            valid = _valid(short)
            self.counts[PREFIX + "cut"] += short is not text
            self.counts[PREFIX + "repaired"] += valid != short
            response = response.model_copy(update={"text": valid})
        return response, reward, metrics


def _cut(text: str, most: int) -> str:
    """Keep both ends of a text that is too long; verl cuts again, at the end it is configured to."""
    return text if len(text) <= most else f"{text[: most // 2]}\n... {len(text) - most} characters left out ...\n{text[-(most // 2) :]}"


def _valid(text: str) -> str:
    """The text with every lone surrogate replaced by "?"."""
    return text.encode(errors="replace").decode()
