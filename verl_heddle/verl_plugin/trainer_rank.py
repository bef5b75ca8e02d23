"""Lets a trainer rank survive the death of the rollout replica that it feeds, and feed a different engine after a layout change.

verl imports this module in every process that builds the model's config (`actor_rollout_ref.model.external_lib`, set by the flag), before
the trainer looks up its rollout adapter. verl's adapter would wait forever for a dead server's acknowledgement. This adapter consumes the
weights, because all ranks must gather them together, and discards them.

verl's rank always feeds replica `rank // tp`. Under a layout (`layouts`) each rank is assigned, between steps, to an engine and to one of
its ranks. Every rank sends whole tensors, of which the engine's worker takes its shard, so nothing else changes.
"""

from __future__ import annotations

import asyncio
import inspect
from typing import Any, NamedTuple

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError
from verl.workers.rollout import base

from verl_heddle.verl_plugin.log import log_once

NAME = f"{__name__}.ServerAdapter"

PING_S = 60.0
"""Time limit for a server's answer: between steps a live one takes milliseconds, unless it runs under a debugger."""


class EngineSlot(NamedTuple):
    """The engine worker that a trainer rank feeds. `engine`: the engine's `replica_rank`; `rank`: its worker on this GPU."""

    engine: int
    rank: int


SLOT: EngineSlot | None = None
"""The engine worker that this process feeds; None: the one that verl's arithmetic gives."""


def sit(worker: Any, engine: int, rank: int) -> None:
    """Assign this trainer rank to an engine worker; `layouts` calls it in the rank's process. Takes effect at the next weight update."""
    global SLOT
    SLOT = EngineSlot(engine, rank)


def __getattr__(name: str) -> Any:
    if name != "ServerAdapter":  # built on demand: vLLM is a heavy import
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = adapter = _adapter()
    return adapter


def _adapter() -> type:
    from verl.workers.rollout.vllm_rollout import ServerAdapter

    class HeddleServerAdapter(ServerAdapter):  # type: ignore[misc, valid-type]
        """verl's adapter, for a server that may be dead or may change."""

        _gone = _seen = False
        _slot: EngineSlot | None = None

        async def resume(self, tags: list[str]) -> None:
            if await self._lost():
                return
            try:
                await super().resume(tags)
            except (RayError, RuntimeError) as error:
                if SLOT is None:
                    raise
                log_once(f"engine {self.replica_rank} does not wake up ({type(error).__name__}: {error}); it is shut down")
                ray.kill(self.server_handle)
                self._gone = True

        async def release(self) -> None:
            if not await self._lost():
                await super().release()

        async def update_weights(self, weights: Any, global_steps: int | None = None, **kwargs: Any) -> None:
            if not await self._lost():
                await super().update_weights(weights, global_steps=global_steps, **kwargs)
            elif inspect.isasyncgen(weights):
                async for _ in weights:
                    pass
            else:
                for _ in weights:
                    pass

        async def _lost(self) -> bool:
            """Whether the replica's server is dead, which is final. Every rank of the replica checks, because every rank sends to it."""
            self._sit_down()
            if self._gone or self._pd_role is not None:
                return self._gone
            alive = await asyncio.to_thread(_alive, f"{self._get_server_name_prefix()}server_{self.replica_rank}_0")
            self._gone, self._seen = self._seen and not alive, self._seen or alive
            if self._gone:
                log_once(f"replica {self.replica_rank} is dead: it gets no more weights")
            return self._gone

        def _sit_down(self) -> None:
            """Switch to the assigned engine, using verl's names for its sockets."""
            if SLOT is None or self._slot is SLOT:  # `is`: an equal but new slot means that its engine was relaunched
                return
            self._slot, (self.replica_rank, self.rollout_rank) = SLOT, SLOT
            job = self.zmq_handle.rsplit("-replica-", 1)[0]
            self.zmq_handle = f"{job}-replica-{self.replica_rank}-rank-{self.rollout_rank}.sock"
            self.node_rank, self._has_server, self.server_handle = 0, self.rollout_rank == 0, None
            self._gone, self._seen = False, True  # the engine was launched, so if its server is missing, it has died

    return HeddleServerAdapter


def _alive(name: str) -> bool:
    """Whether the actor of this name answers and its engine is alive. The name alone proves nothing: Ray also finds dead actors by name."""
    try:
        server = ray.get_actor(name)
        ask = server.heddle_alive if hasattr(server, "heddle_alive") else server.__ray_ready__
        return ray.get(ask.remote(), timeout=PING_S) is not False
    except (ValueError, RayActorError):
        return False
    except GetTimeoutError:
        log_once(f"{name} has not answered for {PING_S:g} s; it is assumed to be busy")
        return True


def register() -> None:
    """Make `rollout.name=vllm` use heddle's adapter in this process."""
    base._ROLLOUT_REGISTRY[("vllm", "async")] = NAME


register()
