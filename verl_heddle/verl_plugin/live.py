"""Which trajectory is this code running for? A context variable, set by the worker around each agent loop.

asyncio tasks inherit it, so every agent loop, verl's or a third party's, is covered without being subclassed.
"""

from __future__ import annotations

import functools
import time
from contextvars import ContextVar
from typing import Any

from verl_heddle.traces.recorder import Recorder

CURRENT: ContextVar[Recorder | None] = ContextVar("heddle_trajectory", default=None)


def watch_tool(tool: Any) -> Any:
    """Make a verl tool (`FunctionTool` or `BaseTool`) tell the current trajectory how long each call took; returns the tool."""
    method = "call" if hasattr(tool, "call") else "execute"
    original = getattr(tool, method, None)
    if original is None or getattr(original, "heddle", False):
        return tool

    @functools.wraps(original)
    async def timed(*args: Any, **kwargs: Any) -> Any:
        recorder, start = CURRENT.get(), time.monotonic()
        if recorder is not None:
            recorder.tool_began(tool.name)
        try:
            return await original(*args, **kwargs)
        finally:
            if recorder is not None:
                recorder.tool_ran(tool.name, start, time.monotonic())

    timed.heddle = True  # type: ignore[attr-defined]
    setattr(tool, method, timed)
    return tool
