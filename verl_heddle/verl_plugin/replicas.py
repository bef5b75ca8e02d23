"""vLLM replicas that report each request's queueing time and preemptions, and whose death does not end the run.

`gate` registers them over verl's `vllm` replica.

Reporting: verl returns neither number (`num_preempted` is None on current vLLM), but both reach the server process: the engine core sends
timestamped QUEUED / SCHEDULED / PREEMPTED events with its outputs if statistics are on (`rollout.disable_log_stats=False`, set by the
flag). The server reads the events and puts the sums into `TokenOutput.extra_fields["heddle"]`. The client removes them, so agent loops see
what stock verl returns.

Settings: `rollout.custom.heddle.preempt` (set by the flag) goes into the server's environment, which the engine processes inherit. After
launch the server asks the scheduler whether preemption is on, and logs a difference. With `data_parallel_size` above 1 a server has several
engines: it calls all of them, and the replica's slots and KV cache are their sums. `heddle.offload` sets how much host memory vLLM gets
for evicted KV cache.

Death: a dead engine takes its server with it, so there is only one kind of failure. Clients then use other replicas (`client`), the router
drops the replica, and the trainer ranks discard its weights (`trainer_rank`).
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Awaitable, Mapping
from functools import cached_property
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayTaskError
from verl.workers.rollout.replica import CONTROL_METHOD_CONCURRENCY, RolloutReplicaRegistry
from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer, vLLMReplica

from verl_heddle.verl_plugin.calls import of_a_dead_replica
from verl_heddle.verl_plugin.log import log_once
from verl_heddle.verl_plugin.parts import TIERS
from verl_heddle.verl_plugin.request_life import FIELD, RequestLives
from verl_heddle.verl_plugin.settings import handed_on
from verl_heddle.verl_plugin.stopwatch import Stopwatch

GIB = 2**30
LEAST_GIB = 1.0
"""Smallest useful host tier, in GiB: a smaller one holds only a handful of contexts."""


def size_gib(offload: Mapping[str, Any], tp: int, free_bytes: int) -> float:
    """GiB of host memory for one replica of degree `tp`, all its ranks together. `offload`: `gib`, `host_share`, `gpus_per_host`."""
    if offload.get("gib") is not None:
        return float(offload["gib"])
    replicas = max(1, int(offload["gpus_per_host"]) // tp)
    return float(offload["host_share"]) * free_bytes / GIB / replicas


def offload_to_host(offload: Mapping[str, Any], tp: int, args: Namespace) -> str:
    """Set the tier's size in vLLM's arguments; returns a message that says so, or why offload is off."""
    import psutil

    free = psutil.virtual_memory().available
    size = size_gib(offload, tp, free)
    if not hasattr(args, "kv_offloading_size"):
        return "KV offload is OFF: this vLLM has no kv_offloading_size"
    if size < LEAST_GIB or size * GIB > 0.9 * free:
        share = f"its share would be {size:.1f} GiB of the host's {free / GIB:.1f} GiB of free memory"
        return f"KV offload is OFF: {share}; set heddle.offload.gib"
    args.kv_offloading_size = size
    return f"evicted KV cache is kept in {size:.1f} GiB of host memory"


LAST_WORDS_S = 1.0
"""Delay before the server exits, so that pending errors reach their callers."""


class _Times:
    """A server's busy and paused time, and each request's wait at the gate that weight updates close."""

    def __init__(self) -> None:
        self.busy, self.paused = Stopwatch(), Stopwatch()
        self._waited: dict[str, tuple[float, bool]] = {}
        self._inside = 0

    def comes(self, request_id: str, waited_s: float, admitted: bool) -> None:
        """Record a request that has passed the gate: its wait, and whether the engine admits it."""
        self._waited[request_id] = (waited_s, admitted)
        self._enter(admitted)

    def goes(self, request_id: str) -> float:
        """Record the end of a request; returns its wait in seconds."""
        waited_s, inside = self._waited.pop(request_id, (0.0, False))
        self._enter(-inside)
        return waited_s

    def _enter(self, more: int) -> None:
        self._inside += more
        self.busy.run(self._inside > 0, time.monotonic())


class HeddleHttpServer(vLLMHttpServer):
    """verl's server, which also reads the engine's request events."""

    _lives: RequestLives | None = None

    @cached_property
    def _times(self) -> _Times:
        return _Times()

    async def _park_until_admitted(self, request_id: str) -> Any:
        since = time.monotonic()
        refused = await super()._park_until_admitted(request_id)
        self._times.comes(request_id, time.monotonic() - since, refused is None)
        return refused

    async def abort_all_requests(self, *args: Any, **kwargs: Any) -> Any:
        self._times.paused.run(True, time.monotonic())
        return await super().abort_all_requests(*args, **kwargs)

    async def open_submission_gate(self) -> None:
        await super().open_submission_gate()
        self._times.paused.run(False, time.monotonic())

    async def heddle_seconds(self) -> dict[str, float]:
        """Seconds since the start: `busy`, with requests in the engine, and `paused`, by a weight update."""
        now = time.monotonic()
        return {"busy": self._times.busy.total_s(now), "paused": self._times.paused.total_s(now)}

    async def run_server(self, args: Any) -> None:
        self._hand_on(args)
        await super().run_server(args)
        if handed_on(self.config, "preempt").get("enable") and (why := await self._why_no_preemption()):
            log_once(f"preemption on arrival is OFF on replica {self.replica_rank}: {why}")
        try:
            self._lives = RequestLives()
            self._lives.listen(self.engine.output_processor)
        except Exception as error:
            self._lives = None
            log_once(f"cannot read vLLM's request events ({error}); queueing counts as generation")

    async def run_headless(self, args: Any) -> None:
        self._hand_on(args)
        await super().run_headless(args)

    def _hand_on(self, args: Any) -> None:
        if preempt := handed_on(self.config, "preempt"):
            os.environ["HEDDLE_PREEMPT"] = json.dumps(preempt)
        if (offload := handed_on(self.config, "offload")).get("enable"):
            message = offload_to_host(offload, int(self.config.tensor_model_parallel_size), args)
            log_once(f"replica {self.replica_rank}: {message}")

    async def generate(self, prompt_ids: list[int], sampling_params: dict[str, Any], request_id: str, **kwargs: Any) -> Any:
        started = time.monotonic()
        life = None
        try:
            output = await super().generate(prompt_ids, sampling_params, request_id, **kwargs)
        except Exception:
            self._engine_lives()
            raise
        finally:
            parked_s = self._times.goes(request_id)
            if self._lives is not None:
                life = self._lives.pop(request_id)
        times: dict[str, Any] = {"server_s": time.monotonic() - started, "parked_s": parked_s}
        if life is not None:
            times |= {"queue_s": life.queue_s, "preemptions": life.preemptions}
        output.extra_fields[FIELD] = times
        return output

    def _engine_lives(self) -> bool:
        """Whether the engine is alive; if not, schedules the server's exit."""
        if not getattr(self.engine, "errored", False):
            return True
        log_once("the vLLM engine is dead; its server exits too")
        asyncio.get_running_loop().call_later(LAST_WORDS_S, os._exit, 1)
        return False

    async def heddle_alive(self) -> bool:
        """Whether weights can be sent here. Nothing else notices an engine that dies between requests."""
        return self._engine_lives()

    async def heddle_shut_down(self) -> None:
        """Shut the engine's processes down cleanly, so that they leave no shared memory; then the server exits."""
        asyncio.get_running_loop().call_later(LAST_WORDS_S, os._exit, 0)
        self.engine.shutdown()

    async def _why_no_preemption(self) -> str | None:
        if not self._ours():
            return "the engine does not run heddle's scheduler (engine_kwargs.vllm.scheduler_cls)"
        try:
            return next(filter(None, await self._ask("heddle_why_off")), None)
        except Exception as error:
            return f"the engine's scheduler does not answer ({type(error).__name__}: {error})"

    def _ours(self) -> bool:
        """Whether the engine has heddle's scheduler: on a different one, each call is an error that vLLM logs with a traceback."""
        from verl_heddle.verl_plugin.vllm_scheduler import HeddleScheduler

        return issubclass(self.engine.vllm_config.scheduler_config.get_scheduler_cls(), HeddleScheduler)

    async def _ask(self, method: str, *args: Any) -> list[Any]:
        """Call a method on every engine of this server; vLLM's own call returns only the first engine's answer.

        Raises:
            LookupError: the scheduler is not heddle's.
        """
        if not self._ours():
            raise LookupError("not heddle's scheduler")
        core = self.engine.engine_core
        engines = list(getattr(core, "core_engines", ()))
        if len(engines) < 2:
            return [await core.call_utility_async(method, *args)]
        return await asyncio.gather(*(core._call_utility_async(method, *args, engine=engine) for engine in engines))

    async def heddle_facts(self) -> dict[str, int | None]:
        """The engine's facts from vLLM's config: `tp`, `slots`, `kv_tokens` (KV capacity, None if unknown), `caches` (prefix caching),
        `tier` (evicted KV cache is kept in host memory), and `calls` (concurrent calls of this actor)."""
        made = self.engine.vllm_config
        engines = made.parallel_config.data_parallel_size
        slots = engines * made.scheduler_config.max_num_seqs
        facts: dict[str, int | None] = {"tp": made.parallel_config.tensor_parallel_size, "slots": slots, "calls": calls_of(self.config)}
        try:
            cache = made.cache_config
            if cache.kv_cache_size_tokens:  # per engine; correct even if layers hold different numbers of tokens
                facts["kv_tokens"] = engines * cache.kv_cache_size_tokens
            else:
                facts["kv_tokens"] = cache.num_gpu_blocks * cache.block_size if cache.num_gpu_blocks else None
            facts["caches"] = bool(cache.enable_prefix_caching)
            facts["tier"] = getattr(made.kv_transfer_config, "kv_connector", None) in TIERS
        except Exception as error:
            log_once(f"the engine's KV capacity is unknown ({type(error).__name__}: {error}); it is assumed to be unlimited")
        return facts

    async def heddle_priorities(self, table: dict[str, int]) -> int:
        """Set new priorities of open requests, by client id; returns how many were still open. 0 without heddle's scheduler."""
        try:
            return sum(await self._ask("heddle_set_priorities", table))
        except Exception as error:
            log_once(f"requests in flight keep their priority ({type(error).__name__}: {error})")
            return 0

    async def heddle_limits(self, table: dict[str, int]) -> dict[str, int]:
        """Limit the tokens that open requests may generate, by client id; returns the tokens generated so far by those still open.

        Without heddle's scheduler no request is limited, and 0 is returned for each.
        """
        try:
            return {name: tokens for found in await self._ask("heddle_set_limits", table) for name, tokens in found.items()}
        except Exception as error:
            log_once(f"samples that are no longer needed run to the end of their turn ({type(error).__name__}: {error})")
            return dict.fromkeys(table, 0)

    async def heddle_counts(self) -> dict[str, int]:
        """Counts of heddle's scheduler since the engine's start; empty without it."""
        try:
            return dict(sum(map(Counter, await self._ask("heddle_counts")), Counter()))
        except LookupError:
            return {}
        except Exception as error:
            log_once(f"cannot read the engine's count of preemptions on arrival ({type(error).__name__}: {error})")
            return {}

    async def heddle_status(self) -> dict[str, int]:
        """Requests that are running or queued in the engine, as the server sees them."""
        return {"unfinished": self.engine.output_processor.get_num_unfinished_requests()}


def calls_of(rollout: Any) -> int:
    """Concurrent calls of a server actor (verl: `RolloutReplica.max_concurrency`); further calls wait in Ray's queue."""
    return max(1000, int(rollout.max_num_seqs or 0) + CONTROL_METHOD_CONCURRENCY)


class HeddleReplica(vLLMReplica):
    """verl's replica with heddle's server for the policy; reward and teacher models keep verl's server."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not (self.is_reward_model or self.is_teacher_model):
            self.server_class = ray.remote(HeddleHttpServer)

    async def wake_up(self) -> None:
        await self._unless_dead(super().wake_up())

    async def sleep(self) -> None:
        await self._unless_dead(super().sleep())

    async def abort_all_requests(self, reject_request: bool = False) -> Any:
        _tell_manager("paused", self._server_address, reject_request)
        return await self._unless_dead(super().abort_all_requests(reject_request=reject_request))

    async def resume_generation(self) -> None:
        try:
            await self._unless_dead(super().resume_generation())
        finally:
            _tell_manager("resumed", self._server_address)

    async def clear_kv_cache(self) -> None:
        await self._unless_dead(super().clear_kv_cache())

    async def _unless_dead(self, call: Awaitable[Any]) -> Any:
        try:
            return await call
        except (ActorDiedError, RayTaskError) as error:
            if not of_a_dead_replica(error):
                raise
            log_once(f"replica {self.replica_rank} is dead; the run goes on without it")
            return None


def _tell_manager(event: str, *what: Any) -> None:
    """Report a weight update to the manager, which runs in the same process. Before it exists, no request is in flight."""
    from verl_heddle.verl_plugin import manager

    try:
        if manager.MANAGER is not None:
            getattr(manager.MANAGER, event)(*what)
    except Exception as error:
        log_once(f"the manager missed a weight update ({type(error).__name__}: {error}); its turns wait in the engines")


def make(replica_rank: int, config: Any, model_config: Any, *args: Any, **kwargs: Any) -> HeddleReplica:
    """Factory that verl calls as the replica's class: a `HeddleReplica`, or under `heddle.layout` a `Home`, which represents one GPU."""
    from verl_heddle.verl_plugin import layouts

    others = kwargs.get("is_reward_model") or kwargs.get("is_teacher_model")
    cls = HeddleReplica if others or layouts.settings(config) is None else layouts.Home
    return cls(replica_rank, config, model_config, *args, **kwargs)


def register() -> None:
    """Make `rollout.name=vllm` use heddle's replica in this process."""
    RolloutReplicaRegistry.register("vllm", lambda: make)
