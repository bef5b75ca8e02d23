"""The recipe's tool, and deaths while a weight update has the engines paused. verl loads it as its tool file, in the agent-loop worker.

At the first tool call of training step 2 a thread begins to wait until a replica is paused, and then kills the router's process as if by
the kernel, so that Ray starts it again; in step 4 the same for the process of a replica.
"""

import gc
import importlib.util
import os
import signal
import threading
import time
from pathlib import Path

import ray
from verl.tools.function_tool import FUNCTION_TOOL_REGISTRY

from verl_heddle.verl_plugin.client import HeddleClient
from verl_heddle.verl_plugin.live import CURRENT

KILLS = {2: "router", 4: "replica"}
WAIT_S = 120
_done: set[int] = set()

_spec = importlib.util.spec_from_file_location("recipe_tools", Path(__file__).parents[2] / "recipes/math/tools.py")
_spec.loader.exec_module(importlib.util.module_from_spec(_spec))  # registers `simplify`
_tool = FUNCTION_TOOL_REGISTRY["simplify"]
_simplify = _tool.fn


def _strike(step: int) -> None:
    client = next(o for o in gc.get_objects() if isinstance(o, HeddleClient))
    server = next(iter(client._servers.values()))
    victim = client._load_balancer if KILLS[step] == "router" else server
    pid = ray.get(victim.__ray_call__.remote(lambda self: os.getpid()), timeout=60)
    last = time.monotonic() + WAIT_S
    while time.monotonic() < last:
        if ray.get(server.__ray_call__.remote(lambda self: self._submission_paused), timeout=60):
            os.kill(pid, signal.SIGKILL)
            print(f"{KILLS[step].upper()} KILLED while paused", flush=True)
            return
        time.sleep(0.05)
    print(f"NO PAUSE in {WAIT_S} s", flush=True)


async def simplify(expression: str) -> str:
    step = CURRENT.get().id.step
    if step in KILLS and step not in _done:
        _done.add(step)
        threading.Thread(target=_strike, args=(step,), daemon=True).start()
    return await _simplify(expression)


_tool.fn = simplify
