"""The recipe's tool, and at two moments of the run the death of a replica. verl loads it as its tool file, in the agent-loop worker.

Training step 2: a server's process is killed as if by the kernel. Step 4: only the vLLM engine behind another server is.
"""

import asyncio
import gc
import importlib.util
import os
import signal
from pathlib import Path

import psutil
import ray
from verl.tools.function_tool import FUNCTION_TOOL_REGISTRY

from verl_heddle.verl_plugin.client import HeddleClient
from verl_heddle.verl_plugin.live import CURRENT

SERVER_DIES, ENGINE_DIES = 2, 4
_done: set[int] = set()

_spec = importlib.util.spec_from_file_location("recipe_tools", Path(__file__).parents[2] / "recipes/math/tools.py")
_spec.loader.exec_module(importlib.util.module_from_spec(_spec))  # registers `simplify`
_tool = FUNCTION_TOOL_REGISTRY["simplify"]
_simplify = _tool.fn


def _strike(step: int) -> None:
    client = next(o for o in gc.get_objects() if isinstance(o, HeddleClient))
    server = list(client._servers.values())[0 if step == SERVER_DIES else 1]
    pid = ray.get(server.__ray_call__.remote(lambda self: os.getpid()), timeout=60)
    if step == ENGINE_DIES:
        pid = next(child.pid for child in psutil.Process(pid).children(recursive=True) if "EngineCore" in "".join(child.cmdline()))
    os.kill(pid, signal.SIGKILL)
    print(f"REPLICA KILLED in step {step}", flush=True)


async def simplify(expression: str) -> str:
    recorder = CURRENT.get()
    step = recorder.id.step
    if step in (SERVER_DIES, ENGINE_DIES) and step not in _done and len(recorder.turns) >= 2:
        _done.add(step)
        await asyncio.to_thread(_strike, step)
    return await _simplify(expression)


_tool.fn = simplify
