"""The recipe's tool, and deaths while a weight update has the engines paused. verl loads it as its tool file, in the agent-loop worker.

At the first tool call of training step 2 a thread begins to wait until a replica is paused, and then kills the router's process as if by
the kernel, so that Ray starts it again; in step 4 the same for the process of a replica.
"""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import ray

from verl_heddle.verl_plugin.live import CURRENT

sys.path.append(str(Path(__file__).parent))

from recipe_tool import TOOL, client, pid_of

KILLS = {2: "router", 4: "replica"}
WAIT_S = 120
_done: set[int] = set()

_simplify = TOOL.fn


def _strike(step: int) -> None:
    ours = client()
    server = next(iter(ours._servers.values()))
    pid = pid_of(ours._load_balancer if KILLS[step] == "router" else server)
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


TOOL.fn = simplify
