"""Runs replicas of different tensor-parallel degrees on verl's hybrid GPUs, and changes the layout between steps.

verl creates one replica per GPU (`rollout.tensor_model_parallel_size=1`) and keeps that list for the whole run. Under a layout these are
`Home`s. Engines are launched separately, one per span of GPUs. The home at an engine's first GPU represents it (its `servers` are the
engine's); the other homes have no servers and do nothing. So verl's trainer, weight update and sleep work unchanged. `trainer_rank.sit`
assigns each trainer rank to its engine, and the router gets the list of servers.

A layout changes between steps, after verl has put all replicas to sleep and before it sends weights: the last home to fall asleep makes
the change. Engines outside the layout stay asleep, at most `heddle.layout.engines` on a GPU; above that limit the least recently used
engine is shut down, and launched again when needed. If an engine cannot be launched, the layout does not change. If an engine dies, the run
returns to its first layout before the next rollout and keeps it (`repair`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import accumulate
from typing import Any

import ray
from ray.exceptions import RayActorError
from verl.workers.rollout.replica import RolloutMode

from verl_heddle.verl_plugin import trainer_rank
from verl_heddle.verl_plugin.layout_choice import first
from verl_heddle.verl_plugin.log import log, log_once
from verl_heddle.verl_plugin.replicas import HeddleReplica
from verl_heddle.verl_plugin.settings import handed_on

LAUNCH_S = 1800.0
"""Time limit to launch an engine: loading large weights from a slow disk takes many minutes."""

MOST_REPAIRS = 3
"""Repairs per run: engines that die repeatedly have a persistent cause, and launching takes minutes."""

SEAT_S, PING_S, END_S = 120.0, 60.0, 60.0
"""Time limits: to assign a trainer rank to its engine (the rank may be busy saving), for an engine to answer, and for it to end."""

Span = tuple[int, int]
"""First GPU, degree."""

LAYOUTS: Layouts | None = None
"""The layouts of this process (the task runner); None if every replica is verl's."""


def spans(layout: Sequence[int]) -> list[Span]:
    """The span of GPUs of each replica in a layout, in GPU order."""
    return list(zip(accumulate(layout, initial=0), layout, strict=False))


def settings(rollout: Any) -> dict[str, Any] | None:
    """`heddle.layout` as the flag passes it inside the rollout config; None if layouts are off."""
    found = handed_on(rollout, "layout")
    if not found.get("enable"):
        return None
    return {**found, "schedule": {int(step): list(layout) for step, layout in (found.get("schedule") or {}).items()}}


async def end(server: Any) -> None:
    """Shut a server down, and wait until Ray notices: only then are its memory and name free."""
    with suppress(Exception):
        await asyncio.wait_for(server.heddle_shut_down.remote(), END_S)
    ray.kill(server)
    with suppress(Exception):
        await asyncio.wait_for(server.__ray_ready__.remote(), END_S)


class Home(HeddleReplica):
    """verl's replica for one GPU. Its `servers` are those of the engine that starts at this GPU, or empty."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        global LAYOUTS
        super().__init__(*args, **kwargs)
        if LAYOUTS is None:
            LAYOUTS = Layouts()
        LAYOUTS.homes.append(self)

    async def init_hybrid(self, worker_group: Any) -> None:
        assert LAYOUTS is not None
        self.rollout_mode = RolloutMode.HYBRID
        await LAYOUTS.open(self, worker_group)

    async def sleep(self) -> None:
        assert LAYOUTS is not None
        if self.servers:
            await super().sleep()
        await LAYOUTS.fell_asleep()

    async def resume_generation(self) -> None:
        if self.servers:
            await super().resume_generation()

    async def release_kv_cache(self) -> None:
        if self.servers:
            await super().release_kv_cache()


class Layouts:
    """The engines of a run and their layout; see the module docstring."""

    def __init__(self) -> None:
        self.homes: list[Home] = []
        self.layout: tuple[int, ...] = ()
        self.wanted: tuple[int, ...] | None = None
        """The next layout, if it differs."""
        self.static = False
        """True after an engine failed: the layout no longer changes."""
        self.changed: Callable[[dict[str, Any]], None] | None = None
        """Called with the servers of a new layout, by name."""
        self.counts: dict[str, float] = {"switches": 0, "launches": 0, "shut_down": 0, "failures": 0, "launch_s": 0.0, "switch_s": 0.0}
        """Since the start of the run."""
        self._workers: list[Any] = []
        self._group: Any = None
        self._engines: dict[Span, HeddleReplica] = {}
        """Least recently used first."""
        self._most = 1
        self._asleep = 0
        self._launch_s: float | None = None
        self._first: tuple[int, ...] = ()
        self._repairs = 0

    async def open(self, home: Home, group: Any) -> None:
        """Launch the engine that starts at this home; verl calls this for all its replicas concurrently."""
        if not self.layout:
            given = settings(home.config) or {}
            self._most = int(given.get("engines") or 1)
            self._group, self._workers = group, list(group.workers)
            layout = first(given, len(self._workers), home.gpus_per_node, float(home.config.gpu_memory_utilization))
            if sum(layout) != len(self._workers) or len(self.homes) != len(self._workers):
                raise ValueError(f"layout {list(layout)} does not fit {len(self._workers)} GPUs and {len(self.homes)} verl replicas")
            self.layout = self._first = layout
        own = next((span for span in spans(self.layout) if span[0] == home.replica_rank), None)
        if own is not None:
            began = time.monotonic()
            await self._launch(own)
            self._launch_s = max(self._launch_s or 0.0, time.monotonic() - began)
            await self._slot([own])
            self._point([own])

    @property
    def gpus(self) -> int:
        """Number of rollout GPUs."""
        return len(self._workers)

    @property
    def reshard_s(self) -> float | None:
        """Seconds per layout change: the mean so far, or the launch time of an engine before the first change; None if unknown."""
        return self.counts["switch_s"] / self.counts["switches"] if self.counts["switches"] else self._launch_s

    def servers(self) -> dict[str, Any]:
        """Servers of the layout, by name."""
        return {self._engines[span]._server_address: self._engines[span]._server_handle for span in spans(self.layout)}

    async def fell_asleep(self) -> None:
        """Count a home that fell asleep; the last one makes the pending change."""
        self._asleep += 1
        if self._asleep == len(self.homes):
            self._asleep = 0
            if self.wanted is not None and self.wanted != self.layout and not self.static:
                await self._change(self.wanted)
            self.wanted = None

    async def _change(self, layout: tuple[int, ...]) -> None:
        began = time.monotonic()
        before = dict(self._engines)
        fresh = [span for span in spans(layout) if span not in self._engines]
        await self._make_room(spans(layout))
        try:
            await self._start(fresh)
        except Exception as error:
            self.counts["failures"] += 1
            self.static = True
            await self._shut_down([span for span in fresh if span in self._engines])
            log(f"cannot launch layout {list(layout)} ({type(error).__name__}: {error}); the layout stays {list(self.layout)}")
            if gone := [span for span in spans(self.layout) if span not in self._engines]:
                try:
                    await self._start(gone)
                    await self._take_up(self.layout)
                except Exception as again:  # verl is putting its replicas to sleep, and must be able to continue
                    log(f"cannot relaunch that layout either ({type(again).__name__}: {again}); the next rollout begins with repairs")
                    await self._end_others(before)
            return
        await self._take_up(layout)
        self.counts["switches"] += 1
        self.counts["switch_s"] += time.monotonic() - began
        log(f"layout {list(layout)} ({len(fresh)} engines launched, {time.monotonic() - began:.1f} s)")

    async def _end_others(self, before: dict[Span, HeddleReplica]) -> None:
        """Return to these engines, even dead ones; end those launched since, because their names and memory will be needed."""
        others = [engine for span, engine in self._engines.items() if engine is not before.get(span)]
        self._engines = before
        await asyncio.gather(*(end(server) for engine in others for server in engine.servers), return_exceptions=True)
        with suppress(Exception):  # some ranks may have been assigned to the ended engines
            await self._slot(spans(self.layout))

    async def _start(self, fresh: Sequence[Span]) -> None:
        """Launch engines while all others sleep, then put the new ones to sleep too."""
        began = time.monotonic()
        results = await asyncio.gather(*(self._launch(span) for span in fresh), return_exceptions=True)
        self.counts["launch_s"] += time.monotonic() - began
        if (failed := next((result for result in results if isinstance(result, BaseException)), None)) is not None:
            raise failed
        await asyncio.gather(*(self._engines[span].sleep() for span in fresh))

    async def _take_up(self, layout: tuple[int, ...]) -> None:
        wanted = spans(layout)
        await self._slot(wanted)
        self.layout = layout
        self._point(wanted)
        for span in wanted:
            self._engines[span] = self._engines.pop(span)
        if self.changed is not None:
            self.changed(self.servers())

    async def _launch(self, span: Span) -> None:
        start, tp = span
        home = self.homes[start]
        engine = HeddleReplica(
            replica_rank=start + len(self._workers) * (tp - 1),  # names its actor and sockets; at tp=1 the names are verl's own
            config=replace(home.config, tensor_model_parallel_size=tp),
            model_config=home.model_config,
            gpus_per_node=home.gpus_per_node,
        )
        engine.rollout_mode = RolloutMode.HYBRID
        engine.workers = self._workers[start : start + tp]
        self._engines[span] = engine
        self.counts["launches"] += 1
        await asyncio.wait_for(engine.launch_servers(), LAUNCH_S)

    async def _slot(self, wanted: Iterable[Span]) -> None:
        calls = [
            self._workers[start + rank].__ray_call__.remote(trainer_rank.sit, self._engines[start, tp].replica_rank, rank)
            for start, tp in wanted
            for rank in range(tp)
        ]
        await asyncio.wait_for(asyncio.gather(*calls), SEAT_S)

    def _point(self, wanted: Iterable[Span]) -> None:
        """Make the homes represent these engines. Homes without servers get the address too, because verl lists every replica's."""
        for start, tp in wanted:
            engine = self._engines[start, tp]
            for home in self.homes[start : start + tp]:
                home._server_address, home._server_handle, home.servers = engine._server_address, engine._server_handle, []
            self.homes[start].servers, self.homes[start].workers = engine.servers, engine.workers

    async def _make_room(self, wanted: Sequence[Span]) -> None:
        """Shut down the least recently used engines until no GPU holds more than its limit."""
        doomed: dict[Span, None] = {}
        for gpu in range(len(self._workers)):
            held = [span for span in {**self._engines, **dict.fromkeys(wanted)} if span[0] <= gpu < span[0] + span[1]]
            idle = [span for span in held if span not in wanted and span in self._engines and span not in spans(self.layout)]
            now = [span for span in held if span in spans(self.layout) and span not in wanted]
            excess = len(held) - self._most
            doomed |= dict.fromkeys((idle + now)[: max(0, excess)])
        await self._shut_down(doomed)

    async def _shut_down(self, those: Iterable[Span]) -> None:
        engines = [self._engines.pop(span) for span in those]
        self.counts["shut_down"] += len(engines)
        await asyncio.gather(*(end(server) for engine in engines for server in engine.servers))

    # --- repair after an engine of the layout has died before the step ------------------------------------------------------

    def repair(self, global_steps: int) -> None:
        """If an engine of the layout is dead, return to the run's first layout for good: launch missing engines, send this step's weights.

        If the repair fails, or the run has used up its repairs, the run goes on with the live replicas.
        """
        dead = self._dead()
        if not dead:
            return
        self.counts["failures"] += 1
        self.static = True
        if self._repairs == MOST_REPAIRS:
            return log_once(f"engines have died in {MOST_REPAIRS + 1} steps; the run goes on with the live ones")
        self._repairs += 1
        log(f"an engine of the layout {list(self.layout)} has died; the layout is {list(self._first)} from now on")
        before = dict(self._engines)
        try:
            asyncio.run(self._start_over(dead))
        except Exception as error:
            asyncio.run(self._end_others(before))
            log(f"the repair failed ({type(error).__name__}: {error}); the run goes on with the live engines")
        # In either case the live engines were put to sleep, and lost their weights.
        ray.get(self._group.update_weights(global_steps=global_steps, mode="naive"), timeout=LAUNCH_S)

    def _dead(self) -> list[Span]:
        """The layout's dead engines; a busy engine counts as alive."""
        asked = {self._engines[span]._server_handle.heddle_alive.remote(): span for span in spans(self.layout)}
        ready, _ = ray.wait(list(asked), num_returns=len(asked), timeout=PING_S)
        dead = []
        for reply in ready:
            try:
                alive = ray.get(reply, timeout=PING_S)
            except RayActorError:
                alive = False
            if not alive:
                dead.append(asked[reply])
        return dead

    async def _start_over(self, dead: Sequence[Span]) -> None:
        await asyncio.gather(*(self._engines[span].sleep() for span in spans(self.layout) if span not in dead))
        for span in dead:
            await asyncio.gather(*(end(server) for server in self._engines.pop(span).servers))
        await self._start([span for span in spans(self._first) if span not in self._engines])
        await self._take_up(self._first)
