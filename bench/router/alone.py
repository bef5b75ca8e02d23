"""The router's own cost: its methods called in this process, no Ray between; CPU per turn, and memory over very many turns."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bench.router.crowd import CAP_TOKENS, Crowd, Life
from verl_heddle.options import Options, Place
from verl_heddle.report.setting import setting
from verl_heddle.trajectory import Outcome, ToolStart, TrajectoryEnd
from verl_heddle.verl_plugin.news import LetIn, Mailboxes, PutOut
from verl_heddle.verl_plugin.router import HeddleRouter, uniform_fleet

SLOTS = 128
"""Of a replica: more than the turns that 10,000 trajectories have in flight on 64 replicas, so that none is held."""

IN_FLIGHT = 0.5
"""Share of the trajectories that have a turn in an engine; the others are in tools."""

STRADDLE = 40
"""Training steps that a trajectory of the crowd may straddle: more than the last of 100,000 does."""

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


def shape(servers: Mapping[str, Any], kv_tokens: int | None = None) -> dict[str, Any]:
    """Arguments of `configure` besides the options: 8B on one H200 each, KV cache as verl's default leaves it or of so many tokens."""
    fleet = uniform_fleet(servers, slots=SLOTS, kv_tokens=kv_tokens or step_times().kv_tokens(1))
    return {"deterministic": False, "fleet": fleet, "cap_tokens": CAP_TOKENS}


def step_times() -> Any:
    """A latency model to plan with."""
    return setting("Qwen3-8B", "h200", 8).latency


class Handle:
    """Stands for a server's actor handle (a fake: it takes new priorities and does nothing)."""

    def __init__(self) -> None:
        self.heddle_priorities = self

    def remote(self, table: dict[str, int]) -> None: ...


class Told(Mailboxes):
    """News of the router's only worker, which hears them at once."""

    def __init__(self) -> None:
        super().__init__()
        self.items: list[LetIn | PutOut] = []

    def put(self, worker: str, item: LetIn | PutOut) -> None:
        self.items.append(item)


def router(name: str, replicas: int, kv_tokens: int | None = None) -> HeddleRouter:
    """The product's router with fake servers."""
    made = HeddleRouter({f"replica_{number}": Handle() for number in range(replicas)}, {})
    made.configure(OPTIONS[name](), **shape(made.handles(), kv_tokens))
    made.step_times_known(step_times())
    made._promised.mail = Told()
    return made


class Alone:
    """Plays a crowd on a router, in which a fixed number of turns is in engines: whichever began first ends first."""

    def __init__(self, name: str, replicas: int, live: int, kv_tokens: int | None = None) -> None:
        self.router, self._warms, self._predicts = router(name, replicas, kv_tokens), name == "place", OPTIONS[name]().predicts
        self.crowd = Crowd("alone", live)
        self.acquire_s: list[float] = []
        """Of turns that were asked for."""
        self._open: deque[tuple[Life, str]] = deque()
        self._held: dict[str, Life] = {}
        """By request."""
        self._homes: dict[str, str] = {}
        """Of trajectories that stay."""
        self._most = int(IN_FLIGHT * live)
        self._fitted = 0

    async def turns(self, number: int) -> float:
        """So many turns from start to end; returns CPU seconds. Between training steps the predictor is fitted, as in a run."""
        begun = time.process_time()
        for _ in range(number):
            while not self.crowd.ready:  # everybody is in an engine, or waits
                await self._finish()
            self._start(self.crowd.start())
            if len(self._open) > self._most:
                await self._finish()
            if self.crowd.step > self._fitted:
                await self.fit()
        return time.process_time() - begun

    async def drain(self) -> dict[str, int]:
        """Let everybody end; returns what is left in the router."""
        while self._open or self._held or self._homes:
            while self._open:
                await self._finish()
            for life in [self.crowd.start() for _ in range(self.crowd.ready)]:
                if life.turn:
                    self._homes.pop(life.who.key, None)
                    self.router.trajectory_ended(TrajectoryEnd(life.who, Outcome.CANCELLED, life.generated, life.turn))
            self._hear()
        mind, promised = self.router._orchestrator, self.router._promised
        left = {"turns": len(mind.turns), "lives": len(mind._lives), "in flight": self.router.get_total_inflight()}
        left |= {"held": len(promised.held), "stays": len(promised.stays), "put out": len(mind.put_out())}
        if mind.residents is not None:
            left |= {"live": len(mind.residents._live), "resident": mind.residents.now["resident"]}
        return left

    def _start(self, life: Life) -> None:
        assert life.last is not None
        home = self._homes.get(life.who.key)
        if home is not None:
            self.router.handle_events([("turn_begun", (life.last, home))])
            self._open.append((life, home))
        else:
            before = time.perf_counter()
            decision = self.router.turn_started(life.last)
            self.acquire_s.append(time.perf_counter() - before)
            if decision.held:
                self._held[life.last.request] = life
            else:
                self._open.append((life, decision.replica))
            if decision.stays:
                self._homes[life.who.key] = decision.replica
        self._hear()

    def _hear(self) -> None:
        mail = self.router._promised.mail
        assert isinstance(mail, Told)
        items, mail.items = mail.items, []
        for item in items:
            if isinstance(item, PutOut):
                self._homes.pop(item.trajectory or "", None)
                continue
            life = self._held.pop(item.request)
            assert item.replica is not None
            self._open.append((life, item.replica))
            if item.stays:
                self._homes[life.who.key] = item.replica

    async def fit(self) -> None:
        """A training step is over; trajectories that straddle it go on."""
        self._fitted = self.crowd.step
        await self.router.step_ended(self._fitted - STRADDLE)
        if self.router._fit is not None:
            await self.router._fit
        self._hear()

    async def _finish(self) -> None:
        life, replica = self._open.popleft()
        end, after = self.crowd.finish(life, replica)
        waiting = None
        if self._warms:
            waiting = asyncio.create_task(self.router.turn_finished(end))
            await asyncio.sleep(0)
        else:
            self.router.handle_events([("turn_finished", end)])
        if isinstance(after, ToolStart):
            if self._predicts:
                self.router.tool_started(after)
        else:
            self._homes.pop(life.who.key, None)
            self.router.trajectory_ended(after)
        if waiting is not None and waiting.done() and waiting.result() is not None:
            self.router.transferred(life.who.key)
        self._hear()
