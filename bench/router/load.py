"""Open-loop load on the router actor from processes of their own, each with a share of the trajectories, and what it took.

Turns are due at random times (Poisson) whether the earlier ones are answered or not. A turn is what the client makes of it, with the
client's own `Questions` and `Outbox`: where to go; `wait_for_turn` if it is held; and after a while `turn_finished` and `tool_started`, or
`trajectory_ended`. The seconds of acquire are from the call to the answer; how late the call was sent, because this process had no CPU, is
kept apart.
"""

from __future__ import annotations

import asyncio
import gc
import os
import time
from random import Random
from typing import Any, NamedTuple

import numpy as np

from bench.fidelity.disturbance import TICK_S
from bench.router.alone import IN_FLIGHT
from bench.router.crowd import Crowd, Life
from verl_heddle.trajectory import ToolStart
from verl_heddle.verl_plugin.calls import answer
from verl_heddle.verl_plugin.outbox import Outbox, Questions

DEADLINE_S = 30.0
"""As `deadlines.router_s`; a turn that gets no answer ends the run."""


class Loaded(NamedTuple):
    """What one process saw; seconds, one entry per turn."""

    acquire_s: np.ndarray
    late_s: np.ndarray
    held: int
    calls: int
    """With questions; a call may ask for several turns."""
    seconds: float
    """First due to last answer."""
    cpu_s: float


class Loader:
    """One process of load. `warms`: wait for the order to pre-warm, as the client does under planned placement."""

    def __init__(self, router: Any, name: str, live: int, warms: bool) -> None:
        self._router, self._warms, self._live = router, warms, live
        self._crowd, self._rng = Crowd(name, live), Random(name)
        self._tasks: set[asyncio.Task[None]] = set()
        self._outbox = Outbox(lambda events: router.told.remote(events))
        self._questions = Questions(self._put)
        self._calls = 0
        self._held = 0
        self._seen: list[tuple[float, float]] = []

    def process(self) -> int:
        """Its id."""
        return os.getpid()

    async def load(self, rate: float, seconds: float, pause_s: float) -> Loaded:
        """So many turns a second, for so long, after a pause in which nothing is due; returns when all have been answered."""
        gc.collect()
        self._seen, self._held, self._calls = [], 0, 0
        turn_s = IN_FLIGHT * self._live / rate
        await asyncio.sleep(pause_s)
        begun, cpu = time.monotonic(), time.process_time()
        due = begun + self._rng.expovariate(rate)
        number = 0
        while due < begun + seconds:
            wait = due - time.monotonic()
            if wait > 0:
                await asyncio.sleep(wait)
                continue
            if self._crowd.ready:
                number += 1
                self._begin(self._turn(self._crowd.start(), due, turn_s))
            due += self._rng.expovariate(rate)
            if not number % 32:
                await asyncio.sleep(0)
        while len(self._seen) < number:
            await asyncio.sleep(0.01)
        acquire, late = np.array(self._seen).T
        return Loaded(acquire, late, self._held, self._calls, time.monotonic() - begun, time.process_time() - cpu)

    async def drain(self) -> None:
        """Until no turn is open."""
        while self._tasks:
            await asyncio.wait(set(self._tasks), timeout=1.0)

    def _begin(self, turn: Any) -> None:
        task = asyncio.get_running_loop().create_task(turn)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _turn(self, life: Life, due: float, turn_s: float) -> None:
        assert life.last is not None
        sent = time.monotonic()
        decision = await self._questions.ask(life.last)
        self._seen.append((time.monotonic() - sent, sent - due))
        if decision.held:
            self._held += 1
            while (await answer(self._router.wait_for_turn.remote(life.last.request), 2 * DEADLINE_S))[0] is None:
                pass
        await asyncio.sleep(turn_s)
        end, after = self._crowd.finish(life, decision.replica)
        if self._warms:
            self._outbox.send()
            self._begin(self._warm(self._router.turn_finished.remote(end), life))
        else:
            self._outbox.put("turn_finished", end)
        if isinstance(after, ToolStart):
            self._outbox.put("tool_started", after)
        else:
            self._outbox.put("trajectory_ended", after)
            self._outbox.send()

    async def _put(self, turns: list[Any]) -> Any:
        self._calls += 1
        return await answer(self._router.turns_started.remote(turns, self._outbox.take()), DEADLINE_S)

    async def _warm(self, order: Any, life: Life) -> None:
        if await answer(order, 10 * DEADLINE_S) is not None:
            self._outbox.put("transferred", life.who.key)


def cpu_s(process: int) -> float:
    """CPU seconds of one process so far, all its threads."""
    with open(f"/proc/{process}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return TICK_S * (int(fields[11]) + int(fields[12]))
