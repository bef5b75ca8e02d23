"""The recipe's tool, and at some moments of the run the death of a replica. verl loads it as its tool file, in the agent-loop worker.

HEDDLE_KILLS says when: `step:call:replica:what`, separated by blanks. At the tool call of that number in that training step the replica of
that number dies: `server`, its process is killed as if by the kernel, or `engine`, only the vLLM engine behind it is.
"""

import asyncio
import gc
import importlib.util
import os
import signal
from collections import Counter
from pathlib import Path

import psutil
import ray
from verl.tools.function_tool import FUNCTION_TOOL_REGISTRY

from verl_heddle.verl_plugin.client import HeddleClient
from verl_heddle.verl_plugin.live import CURRENT

KILLS = [one.split(":") for one in os.environ.get("HEDDLE_KILLS", "2:20:0:server 4:20:1:engine").split()]
_calls: Counter[int] = Counter()

_spec = importlib.util.spec_from_file_location("recipe_tools", Path(__file__).parents[2] / "recipes/math/tools.py")
_spec.loader.exec_module(importlib.util.module_from_spec(_spec))  # registers `simplify`
_tool = FUNCTION_TOOL_REGISTRY["simplify"]
_simplify = _tool.fn


def _strike(step: int, replica: int, what: str) -> None:
    client = next(o for o in gc.get_objects() if isinstance(o, HeddleClient))
    server = list(client._servers.values())[replica]
    pid = ray.get(server.__ray_call__.remote(lambda self: os.getpid()), timeout=60)
    if what == "engine":
        pid = next(child.pid for child in psutil.Process(pid).children(recursive=True) if "EngineCore" in "".join(child.cmdline()))
    os.kill(pid, signal.SIGKILL)
    print(f"REPLICA KILLED in step {step}", flush=True)


async def simplify(expression: str) -> str:
    step = CURRENT.get().id.step
    _calls[step] += 1
    for when, call, replica, what in KILLS:
        if (int(when), int(call)) == (step, _calls[step]):
            await asyncio.to_thread(_strike, step, int(replica), what)
    return await _simplify(expression)


_tool.fn = simplify
