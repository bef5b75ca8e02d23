"""The recipe's tool, and at some moments of the run the death of a replica. verl loads it as its tool file, in the agent-loop worker.

HEDDLE_KILLS says when: `step:call:replica:what`, separated by blanks. At the tool call of that number in that training step the replica of
that number dies: `server`, its process is killed as if by the kernel, or `engine`, only the vLLM engine behind it is.
"""

import asyncio
import os
import signal
import sys
from collections import Counter
from pathlib import Path

import psutil

from verl_heddle.verl_plugin.live import CURRENT

sys.path.append(str(Path(__file__).parent))

from recipe_tool import TOOL, client, pid_of

KILLS = [one.split(":") for one in os.environ.get("HEDDLE_KILLS", "2:20:0:server 4:20:1:engine").split()]
_calls: Counter[int] = Counter()

_simplify = TOOL.fn


def _strike(step: int, replica: int, what: str) -> None:
    pid = pid_of(list(client()._servers.values())[replica])
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


TOOL.fn = simplify
