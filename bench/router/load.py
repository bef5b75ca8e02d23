"""Open-loop load on the router actor from processes of their own, each with a share of the trajectories, and what it took.

Turns are due at random times (Poisson) whether the earlier ones are answered or not. A turn is what the client makes of it, with the
client's own `Link`: where to go, told or asked; `wait` if it is held; and after a while `turn_finished` and `tool_started`, or
`trajectory_ended`. The seconds of acquire are those until the turn knows where to go; how late it began, because this process had no CPU,
is kept apart.
"""

from __future__ import annotations

import asyncio
import gc
import os
import time
from collections import Counter
from collections.abc import Sequence
from random import Random
from typing import Any, NamedTuple

import numpy as np

from bench.fidelity.disturbance import TICK_S
from bench.router.alone import IN_FLIGHT
from bench.router.crowd import Crowd, Life
from verl_heddle.trajectory import Outcome, ToolStart, TrajectoryEnd, TurnEnd, TurnStart
from verl_heddle.verl_plugin.calls import answer
from verl_heddle.verl_plugin.link import Link

SPREAD = 0.5

DEADLINE_S = 30.0
"""As `deadlines.router_s`; a turn that gets no answer ends the run."""


class Loaded(NamedTuple):
    """What one process saw; seconds, one entry per turn."""

    acquire_s: np.ndarray
    late_s: np.ndarray
    asked: np.ndarray
    """Whether the turn had to be asked for."""
    held: int
    calls: int
    """Of the router, but for the one that is always open."""
    seconds: float
    """First due to last answer."""
    cpu_s: float


class Stepped(NamedTuple):
    """What one process saw of a step; seconds, one entry per trajectory."""

    first_s: np.ndarray
    """Its first turn waited for its answer."""
    others_s: np.ndarray
    """All its other turns together."""
    busy_s: np.ndarray
    """In engines and tools."""
    seconds: float


class Counted:
    """The router's handle, its calls counted but for `news`."""

    def __init__(self, handle: Any) -> None:
        self.handle, self.calls = handle, 0

    def __getattr__(self, name: str) -> Any:
        self.calls += name != "news"
        return getattr(self.handle, name)


class Loader:
    """One process of load. `warms`: wait for the order to pre-warm, as the client does under planned placement; `predicts`: tell when tools
    begin."""

    def __init__(self, router: Any, replicas: Sequence[str], name: str, live: int, warms: bool, predicts: bool) -> None:
        self._router, self._warms, self._predicts, self._live = Counted(router), warms, predicts, live
        self._crowd, self._rng = Crowd(name, live), Random(name)
        self._tasks: set[asyncio.Task[None]] = set()
        self._troubles: Counter[str] = Counter()
        self._link = Link(self._router, dict.fromkeys(replicas), DEADLINE_S, self._troubles)
        self._held = 0
        self._seen: list[tuple[float, float, bool]] = []

    def process(self) -> int:
        """Its id."""
        return os.getpid()

    async def load(self, rate: float, seconds: float, pause_s: float) -> Loaded:
        """So many turns a second, for so long, after a pause in which nothing is due; returns when all have been answered."""
        gc.collect()
        self._seen, self._held, self._router.calls = [], 0, 0
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
        if self._troubles:
            raise RuntimeError(f"the router was lost: {dict(self._troubles)}")
        acquire, late, asked = np.array(self._seen).T
        times = (time.monotonic() - begun, time.process_time() - cpu)
        return Loaded(acquire, late, asked.astype(bool), self._held, self._router.calls, *times)

    async def step(self, turns: int, busy_s: float) -> Stepped:
        """One step: all trajectories begin at once, with so many turns each, whose engine and tool take `busy_s` seconds in the mean,
        `SPREAD` less or more."""
        gc.collect()
        begun = time.monotonic()
        lives = [self._crowd.start() for _ in range(self._live)]
        waits = await asyncio.gather(*(self._episode(life, turns, busy_s) for life in lives))
        if self._troubles:
            raise RuntimeError(f"the router was lost: {dict(self._troubles)}")
        return Stepped(*np.array(waits).T, time.monotonic() - begun)

    async def _episode(self, life: Life, turns: int, busy_s: float) -> tuple[float, float, float]:
        """Seconds of its first turn's wait, of all others', and of engines and tools."""
        first = others = busy = 0.0
        context, generated = life.context, 0
        for number in range(turns):
            turn = TurnStart(life.who, life.who.key, number, context, generated, None)
            before = time.monotonic()
            decision = self._link.begin(turn) or await self._link.ask(turn)
            if decision.held:
                decision, _ = await self._link.wait(turn, decision)
            waited = time.monotonic() - before
            first, others = (waited, others) if not number else (first, others + waited)
            engine_s, tool_s = (busy_s * (1 + SPREAD * (2 * self._rng.random() - 1)) / 2 for _ in range(2))
            await asyncio.sleep(engine_s)
            generated, context, busy = generated + 300, context + 500, busy + engine_s + tool_s
            self._link.post("turn_finished", TurnEnd(life.who, turn.conversation, decision.replica, number, 300, True, engine_s))
            if number < turns - 1:
                await asyncio.sleep(tool_s)
        self._link.ended(life.who.key)
        self._link.post("trajectory_ended", TrajectoryEnd(life.who, Outcome.FINISHED, generated, turns))
        return first, others, busy

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
        decision = self._link.begin(life.last)
        asked = decision is None
        if decision is None:
            decision = await self._link.ask(life.last)
        self._seen.append((time.monotonic() - sent, sent - due, asked))
        if decision.held:
            self._held += 1
            decision, _ = await self._link.wait(life.last, decision)
        await asyncio.sleep(turn_s)
        end, after = self._crowd.finish(life, decision.replica)
        if self._warms:
            self._begin(self._warm(self._link.ordered("turn_finished", end), life))
        else:
            self._link.post("turn_finished", end)
        if not isinstance(after, ToolStart):
            self._link.ended(life.who.key)
            self._link.post("trajectory_ended", after)
        elif self._predicts:
            self._link.post("tool_started", after)

    async def _warm(self, order: Any, life: Life) -> None:
        if await answer(order, 10 * DEADLINE_S) is not None:
            self._link.post("transferred", life.who.key)


def cpu_s(process: int) -> float:
    """CPU seconds of one process so far, all its threads."""
    with open(f"/proc/{process}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return TICK_S * (int(fields[11]) + int(fields[12]))
