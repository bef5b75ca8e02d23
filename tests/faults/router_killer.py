"""The recipe's tool, and at two moments of the run the death of the router. verl loads it as its tool file, in the agent-loop worker.

Training step 2: the router's process is killed as if by the kernel, so Ray starts it again. Step 4: the actor is killed for good.
"""

import asyncio
import gc
import importlib.util
import os
import signal
from pathlib import Path

import ray
from verl.tools.function_tool import FUNCTION_TOOL_REGISTRY

from verl_heddle.verl_plugin.client import HeddleClient
from verl_heddle.verl_plugin.live import CURRENT

PROCESS_DIES, ACTOR_DIES = 2, 4
_done: set[int] = set()

_spec = importlib.util.spec_from_file_location("recipe_tools", Path(__file__).parents[2] / "recipes/math/tools.py")
_spec.loader.exec_module(importlib.util.module_from_spec(_spec))  # registers `simplify`
_tool = FUNCTION_TOOL_REGISTRY["simplify"]
_simplify = _tool.fn


def _strike(step: int) -> None:
    router = next(o for o in gc.get_objects() if isinstance(o, HeddleClient))._load_balancer
    if step == PROCESS_DIES:
        os.kill(ray.get(router.__ray_call__.remote(lambda self: os.getpid())), signal.SIGKILL)
    else:
        ray.kill(router)
    print(f"ROUTER KILLED in step {step}", flush=True)


async def simplify(expression: str) -> str:
    recorder = CURRENT.get()
    step = recorder.id.step
    if step in (PROCESS_DIES, ACTOR_DIES) and step not in _done and len(recorder.turns) >= 2:
        _done.add(step)
        await asyncio.to_thread(_strike, step)
    return await _simplify(expression)


_tool.fn = simplify
