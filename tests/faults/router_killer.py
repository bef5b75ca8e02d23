"""The recipe's tool, and at two moments of the run the death of the router. verl loads it as its tool file, in the agent-loop worker.

Training step 2: the router's process is killed as if by the kernel, so Ray starts it again. Step 3 lasts until it answers: steps are
shorter here than what it imports. Step 4: the actor is killed for good.
"""

import asyncio
import os
import signal
import sys
import time
from pathlib import Path

import ray

from verl_heddle.verl_plugin.live import CURRENT

sys.path.append(str(Path(__file__).parent))

from recipe_tool import TOOL, client, pid_of

PROCESS_DIES, COMES_BACK, ACTOR_DIES = 2, 3, 4
BACK_S = 240
"""Within a tool call's deadline (heddle.tools.call_s)."""
_done: set[int] = set()

_simplify = TOOL.fn


def _strike(step: int) -> None:
    router = client()._load_balancer
    if step == COMES_BACK:
        return _wait_for(router)
    if step == PROCESS_DIES:
        os.kill(pid_of(router), signal.SIGKILL)
    else:
        ray.kill(router)
    print(f"ROUTER KILLED in step {step}", flush=True)


def _wait_for(router) -> None:
    last = time.monotonic() + BACK_S
    while time.monotonic() < last:
        try:
            ray.get(router.handles.remote(), timeout=BACK_S)
            return
        except ray.exceptions.RayActorError:  # Ray is still starting it
            time.sleep(0.5)


async def simplify(expression: str) -> str:
    recorder = CURRENT.get()
    step = recorder.id.step
    if step in (PROCESS_DIES, COMES_BACK, ACTOR_DIES) and step not in _done and len(recorder.turns) >= 4:
        _done.add(step)
        await asyncio.to_thread(_strike, step)
    return await _simplify(expression)


TOOL.fn = simplify
