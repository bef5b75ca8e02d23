"""The current trajectory as a context variable, set by the worker around each agent loop, and the timing of its tool calls.

asyncio tasks inherit the variable, so every agent loop, verl's or a third party's, is covered without being subclassed.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from verl.tools.function_tool import FunctionTool

from verl_heddle.traces.recorder import Recorder
from verl_heddle.verl_plugin.log import log_once

CURRENT: ContextVar[Recorder | None] = ContextVar("heddle_trajectory", default=None)
"""The recorder of the trajectory that this code runs for; None outside agent loops."""


def watch_tool(tool: Any) -> Any:
    """Make a verl tool record the duration of each call with the current trajectory; returns the tool.

    Wraps the method that verl's agent loop awaits: `FunctionTool.call`, or `execute` of any other tool. The wrapper only measures: an
    error in it is logged once and loses that call's time from the record, but never fails the call.
    """
    method = "call" if isinstance(tool, FunctionTool) else "execute"
    original = getattr(tool, method, None)
    if original is None or getattr(original, "heddle", False):
        return tool

    @functools.wraps(original)
    async def timed(*args: Any, **kwargs: Any) -> Any:
        recorder, start = CURRENT.get(), time.monotonic()
        if recorder is None:
            return await original(*args, **kwargs)
        with _harmless():
            recorder.tool_began(tool.name)
        try:
            return await original(*args, **kwargs)
        finally:
            with _harmless():
                recorder.tool_ran(tool.name, start, time.monotonic())

    timed.heddle = True  # type: ignore[attr-defined]
    try:
        setattr(tool, method, timed)
    except Exception as error:  # a frozen class, or one with slots
        log_once(f"calls of tool class {type(tool).__name__} are not timed ({type(error).__name__}: {error})")
    return tool


@contextlib.contextmanager
def _harmless() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        log_once(f"a tool call could not be recorded ({type(error).__name__}: {error})")
