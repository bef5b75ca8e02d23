"""One worker's client, a router and engines in this process: fakes but for the client, the router and verl's own `generate`."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from omegaconf import OmegaConf
from verl.workers.rollout.replica import TokenOutput

from verl_heddle.options import Options
from verl_heddle.traces.recorder import Recorder
from verl_heddle.trajectory import Outcome, TrajectoryEnd, TrajectoryId
from verl_heddle.verl_plugin.client import HeddleClient
from verl_heddle.verl_plugin.live import CURRENT
from verl_heddle.verl_plugin.request_life import FIELD
from verl_heddle.verl_plugin.router import HeddleRouter, uniform_fleet


class FakeActor:
    """An object in this process behind the `.method.remote(...)` of a Ray actor. `delay_s`: how long the next call and its answer take on
    their way; calls arrive in order, answers need not."""

    def __init__(self, inner: Any, delay_s: Callable[[], float] = lambda: 0.0) -> None:
        self.inner, self.delay_s = inner, delay_s
        self.calls: Counter[str] = Counter()
        self._arrived_s = 0.0

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=lambda *args, **kwargs: asyncio.ensure_future(self._call(name, args, kwargs)))

    async def _call(self, name: str, args: tuple, kwargs: dict) -> Any:
        self.calls[name] += 1
        now = time.monotonic()
        self._arrived_s = max(self._arrived_s, now) + self.delay_s()
        if self._arrived_s > now:
            await asyncio.sleep(self._arrived_s - now)
        result = getattr(self.inner, name)(*args, **kwargs)
        result = await result if asyncio.iscoroutine(result) else result
        await asyncio.sleep(self.delay_s())
        return result


class FakeEngine:
    """A server that generates `max_tokens` tokens, one every millisecond; it knows requests by the id it was given, as vLLM does."""

    def __init__(self) -> None:
        self.open: dict[str, list[int]] = {}
        """Tokens so far and at most, by request id."""
        self.seen: list[str] = []
        self.priorities: dict[str, int] = {}
        self.unknown: list[str] = []
        self.most = self.updates = 0
        """Weight updates so far; each aborts what is open."""

    async def generate(
        self, request_id: str, prompt_ids: list[int], sampling_params: dict, priority: int = 0, **kwargs: Any
    ) -> TokenOutput:
        assert request_id not in self.open, f"two requests are named {request_id}"
        self.seen.append(request_id)
        state = self.open[request_id] = [0, sampling_params["max_tokens"]]
        self.most, updates = max(self.most, len(self.open)), self.updates
        try:
            while state[0] < state[1] and self.updates == updates:
                await asyncio.sleep(0.001)
                state[0] += 1
        finally:
            del self.open[request_id]
        told = {"global_steps": updates, FIELD: {"server_s": 0.001 * state[0]}, "num_cached_tokens": 0}
        stop_reason = "completed" if state[0] >= state[1] else "aborted"
        return TokenOutput(token_ids=[1] * state[0], stop_reason=stop_reason, log_probs=[0.0] * state[0], extra_fields=told)

    async def heddle_priorities(self, table: dict[str, int]) -> int:
        self.priorities |= {name: priority for name, priority in table.items() if name in self.open}
        self.unknown += [name for name in table if name not in self.open]
        return len(table)

    async def heddle_limits(self, table: dict[str, int]) -> dict[str, int]:
        found = {name: self.open[name] for name in table if name in self.open}
        for name, state in found.items():
            state[1] = min(state[1], table[name])
        return {name: state[0] for name, state in found.items()}


class Rig:
    """One worker's client, a router and engines."""

    def __init__(
        self,
        options: Options,
        engines: int = 1,
        slots: int = 1,
        deterministic: bool = False,
        client: type = HeddleClient,
        kv_tokens: int | None = None,
        delay_s: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self.engines = {f"s{number}": FakeEngine() for number in range(engines)}
        handles: dict[str, Any] = {name: FakeActor(engine) for name, engine in self.engines.items()}
        self.router = HeddleRouter(handles)
        self.router.configure(options, deterministic, uniform_fleet(handles, slots=slots, kv_tokens=kv_tokens))
        rollout = {"name": "vllm", "scheduling_policy": "priority", "prompt_length": 500, "response_length": 1500}
        config = OmegaConf.create({"actor_rollout_ref": {"rollout": rollout | {"full_determinism": deterministic}}})
        self.actor = FakeActor(self.router, delay_s)
        self.client = client(config=config, load_balancer_handle=self.actor, servers=handles, options=options)

    def start(self, uid: str, sample: int, **more: Any) -> Recorder:
        """A trajectory begins in this task."""
        recorder = Recorder(TrajectoryId("p", uid, sample, 1), time.monotonic(), time.time(), **more)
        CURRENT.set(recorder)
        return recorder

    async def turn(self, conversation: str, tokens: int = 3) -> TokenOutput:
        """One generation of this task's trajectory."""
        return await self.client.generate(conversation, prompt_ids=[7] * 10, sampling_params={"max_tokens": tokens})

    def end(self, recorder: Recorder, turns: int) -> None:
        """The trajectory is over."""
        self.client.trajectory_ended(TrajectoryEnd(recorder.id, Outcome.FINISHED, recorder.output_tokens, turns))

    def end_cancelled(self, uid: str, sample: int) -> None:
        """The trajectory was cancelled."""
        self.client.trajectory_ended(TrajectoryEnd(TrajectoryId("p", uid, sample, 1), Outcome.CANCELLED, 0, 0))

    async def settled(self) -> None:
        """Nothing is left of the turns anywhere."""
        await asyncio.sleep(0.1)
        mind = self.router._orchestrator
        assert not mind.turns and not mind._lives and not mind.turns.groups and not self.router._promised.stays
        assert set(mind.inflight.values()) == {0} and self.router.get_total_inflight() == 0
        assert not self.router._promised.held and not self.router._orders.names
        link = self.client._link
        assert not link._stays and not link._asking and not link._let_in.names
        assert not self.client._flying and not self.client._warming and self.client.counts == {}
        assert not mind.admission and not any(mind.admission.inside(name) for name in self.engines if mind.admission is not None)
        seen = [name for engine in self.engines.values() for name in engine.seen]
        assert len(set(seen)) == len(seen)
