"""The router's own cost: its methods called in this process, no Ray between; CPU per turn, and memory over very many turns."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bench.router.crowd import CAP_TOKENS, Crowd
from verl_heddle.options import Options, Place
from verl_heddle.report.setting import setting
from verl_heddle.trajectory import ToolStart
from verl_heddle.verl_plugin.router import HeddleRouter, alike

SLOTS = 128
"""Of a replica: more than the turns that 10,000 trajectories have in flight on 64 replicas, so that none is held."""

IN_FLIGHT = 0.5
"""Share of the trajectories that have a turn in an engine; the others are in tools."""

OPTIONS: dict[str, Callable[[], Options]] = {
    "stock": lambda: Options(observe=True),
    "default": Options,
    "place": lambda: Options(place=Place(enable=True)),
}
"""What is measured. `stock`: the same router under verl's rule."""


def rss_mib() -> float:
    """Resident memory of this process."""
    return resident_mib("self")


def resident_mib(process: int | str) -> float:
    """Resident memory of a process on this machine."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


def shape(servers: Mapping[str, Any], slots: int = SLOTS) -> dict[str, Any]:
    """Arguments of `configure` besides the options: 8B on one H200 each, KV cache as verl's default leaves it."""
    fleet = alike(servers, slots=slots, kv_tokens=step_times().kv_tokens(1))
    return {"deterministic": False, "fleet": fleet, "cap_tokens": CAP_TOKENS}


def step_times() -> Any:
    """A latency model to plan with."""
    return setting("Qwen3-8B", "h200", 8).latency


class Handle:
    """Stands for a server's actor handle (a fake: it takes new priorities and does nothing)."""

    def __init__(self) -> None:
        self.heddle_priorities = self

    def remote(self, table: dict[str, int]) -> None: ...


def router(name: str, replicas: int) -> HeddleRouter:
    """The product's router with fake servers."""
    made = HeddleRouter({f"replica_{number}": Handle() for number in range(replicas)}, {})
    made.configure(OPTIONS[name](), **shape(made.handles()))
    made.step_times_known(step_times())
    return made


class Alone:
    """Plays a crowd on a router."""

    def __init__(self, name: str, replicas: int, live: int) -> None:
        self.router, self._warms, self._predicts = router(name, replicas), name == "place", OPTIONS[name]().predicts
        self.crowd = Crowd("alone", live)
        self.acquire_s: list[float] = []
        self._open: list[tuple[Any, str]] = []
        self._homes: dict[str, str] = {}
        """Of trajectories that stay; nobody is put out here."""
        self._most = int(IN_FLIGHT * live)
        self._fitted = 0

    async def turns(self, number: int) -> float:
        """So many turns from start to end; returns CPU seconds. Between training steps the predictor is fitted, as in a run."""
        begun = time.process_time()
        for _ in range(number):
            life = self.crowd.start()
            before = time.perf_counter()
            home = self._homes.get(life.who.key)
            if home is None:
                decision = self.router.turn_started(life.last)
                self.acquire_s.append(time.perf_counter() - before)
                home = decision.replica
                if decision.stays:
                    self._homes[life.who.key] = home
            else:
                self.router.told([("turn_begun", (life.last, home))])
            self._open.append((life, home))
            if len(self._open) > self._most:
                await self._finish(*self._open.pop(0))
            if self.crowd.step > self._fitted:
                await self.fit()
        return time.process_time() - begun

    async def fit(self) -> None:
        """A training step is over; trajectories that straddle it go on."""
        self._fitted = self.crowd.step
        await self.router.step_ended(self._fitted - 3)
        if self.router._fit is not None:
            await self.router._fit

    async def _finish(self, life: Any, replica: str) -> None:
        end, after = self.crowd.finish(life, replica)
        waiting = None
        if self._warms:
            waiting = asyncio.create_task(self.router.turn_finished(end))
            await asyncio.sleep(0)
        else:
            self.router.told([("turn_finished", end)])
        if isinstance(after, ToolStart):
            if self._predicts:
                self.router.tool_started(after)
        else:
            self._homes.pop(life.who.key, None)
            self.router.trajectory_ended(after)
        if waiting is not None and waiting.done() and waiting.result() is not None:
            self.router.transferred(life.who.key)
