"""The math recipe's tool, behaving badly in every way at once. verl loads it as its tool file, in the agent-loop worker.

Every seventh call goes wrong, each time in the next of `KINDS`. In step 1 the tool is a plain function, from step 2 on a coroutine.
"""

import asyncio
import itertools
import sys
import threading
import time
from pathlib import Path

from verl_heddle.verl_plugin.live import CURRENT

sys.path.append(str(Path(__file__).parent))

from recipe_tool import RECIPE, TOOL

KINDS = ("hangs", "crashes", "floods", "is no text", "leaves", "is deaf")
EVERY = 7

_calls, _kinds = itertools.count(1), itertools.cycle(KINDS)
_lock = threading.Lock()


def _kind() -> str | None:
    with _lock:
        return next(_kinds) if next(_calls) % EVERY == 0 else None


def _misbehave(kind: str) -> object:
    print("BAD TOOL", kind, flush=True)
    if kind == "crashes":
        raise ValueError("crashed on purpose")
    if kind == "floods":
        return "9" * 100_000_000
    if kind == "is no text":
        return b"7\xff\xfe" if time.time_ns() % 2 else "7\udcff"
    raise SystemExit("left on purpose")


def plain(expression: str) -> object:
    if CURRENT.get().id.step > 1:
        TOOL.is_async, TOOL.fn = True, coroutine
    kind = _kind()
    if kind in ("hangs", "is deaf"):
        print("BAD TOOL", kind, flush=True)
        threading.Event().wait()
    return _misbehave(kind) if kind else RECIPE.first_step(expression)


async def coroutine(expression: str) -> object:
    kind = _kind()
    if kind == "hangs":
        print("BAD TOOL", kind, flush=True)
        await asyncio.Event().wait()
    while kind == "is deaf":
        try:
            print("BAD TOOL", kind, flush=True)
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            continue
    return _misbehave(kind) if kind else RECIPE.first_step(expression)


TOOL.is_async, TOOL.fn = False, plain
