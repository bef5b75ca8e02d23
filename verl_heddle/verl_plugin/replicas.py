"""vLLM replicas that tell how long each request queued and how often it was preempted, and whose death is not the run's. Registered over
verl's `vllm` replica by `gate`.

verl returns neither (`num_preempted` is None on current vLLM), yet both arrive in the server process: the engine core sends
timestamped QUEUED / SCHEDULED / PREEMPTED events with its outputs when statistics are on (`rollout.disable_log_stats=False`, set
by the flag). The server reads them as they pass and puts the sums into `TokenOutput.extra_fields["heddle"]`; the client takes
them out again, so that agent loops see what stock verl gives them.

What the scheduler is to do (`rollout.custom.heddle.preempt`, set by the flag) goes into the environment of the server, which the engine's
processes inherit; once they are up, the scheduler is asked what it does, and a difference is logged. With `data_parallel_size` above 1 a
server has several engines: all of them are told and asked, and the replica has their slots and KV cache together.

A dead engine takes its server with it, so that there is one kind of death. On it, clients go elsewhere (`client`), the router drops the
replica, and the trainer's ranks keep their weights to themselves (`trainer_rank`).

How much of the host's memory vLLM gets for what a replica's KV cache evicts (`heddle.offload`).
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
"""A smaller tier holds a handful of contexts."""


def size_gib(told: Mapping[str, Any], tp: int, free_bytes: int) -> float:
    """GiB for one replica of degree `tp`, all its ranks together. `told`: `gib`, `host_share`, `gpus_per_host`."""
    if told.get("gib") is not None:
        return float(told["gib"])
    replicas = max(1, int(told["gpus_per_host"]) // tp)
    return float(told["host_share"]) * free_bytes / GIB / replicas


def offload_to_host(told: Mapping[str, Any], tp: int, args: Namespace) -> str:
    """Put the size into vLLM's arguments; returns a line that says what was done, or why not."""
    import psutil

    free = psutil.virtual_memory().available
    size = size_gib(told, tp, free)
    if not hasattr(args, "kv_offloading_size"):
        return "KV offload is OFF: this vLLM has no kv_offloading_size"
    if size < LEAST_GIB or size * GIB > 0.9 * free:
        there = f"{size:.1f} GiB would be its part, of {free / GIB:.1f} GiB that the host has free"
        return f"KV offload is OFF: {there}; set heddle.offload.gib"
    args.kv_offloading_size = size
    return f"evicted KV cache is kept in {size:.1f} GiB of the host's memory"


LAST_WORDS_S = 1.0
"""For the errors under way to reach their callers."""


class _Times:
    """What a server's time goes into, and each request's before the gate that weight updates close."""

    def __init__(self) -> None:
        self.busy, self.paused = Stopwatch(), Stopwatch()
        self._waited: dict[str, tuple[float, bool]] = {}
        self._inside = 0

    def comes(self, request_id: str, waited_s: float, admitted: bool) -> None:
        """A request has waited so long, and goes into the engine or is refused."""
        self._waited[request_id] = (waited_s, admitted)
        self._enter(admitted)

    def goes(self, request_id: str) -> float:
        """It is over; returns how long it had waited."""
        waited_s, inside = self._waited.pop(request_id, (0.0, False))
        self._enter(-inside)
        return waited_s

    def _enter(self, more: int) -> None:
        self._inside += more
        self.busy.run(self._inside > 0, time.monotonic())


class HeddleHttpServer(vLLMHttpServer):
    """verl's server, with one ear on the engine's request events."""

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
        """Seconds since the start in which there were requests in the engine, `busy`, and in which a weight update had it `paused`."""
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
            log_once(f"vLLM's request events are out of reach ({error}); queueing counts as generation")

    async def run_headless(self, args: Any) -> None:
        self._hand_on(args)
        await super().run_headless(args)

    def _hand_on(self, args: Any) -> None:
        if preempt := handed_on(self.config, "preempt"):
            os.environ["HEDDLE_PREEMPT"] = json.dumps(preempt)
        if (told := handed_on(self.config, "offload")).get("enable"):
            said = offload_to_host(told, int(self.config.tensor_model_parallel_size), args)
            log_once(f"replica {self.replica_rank}: {said}")

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
        told: dict[str, Any] = {"server_s": time.monotonic() - started, "parked_s": parked_s}
        if life is not None:
            told |= {"queue_s": life.queue_s, "preemptions": life.preemptions}
        output.extra_fields[FIELD] = told
        return output

    def _engine_lives(self) -> bool:
        """Whether the engine does; if not, the server is about to go too."""
        if not getattr(self.engine, "errored", False):
            return True
        log_once("the vLLM engine is dead, and its server goes with it")
        asyncio.get_running_loop().call_later(LAST_WORDS_S, os._exit, 1)
        return False

    async def heddle_alive(self) -> bool:
        """Whether weights can be sent here. An engine that dies between requests is missed by nobody else."""
        return self._engine_lives()

    async def heddle_shut_down(self) -> None:
        """End the engine's processes in order, so that they leave no shared memory; the server goes too."""
        asyncio.get_running_loop().call_later(LAST_WORDS_S, os._exit, 0)
        self.engine.shutdown()

    async def _why_no_preemption(self) -> str | None:
        if not self._ours():
            return "the engine runs another scheduler than heddle's (engine_kwargs.vllm.scheduler_cls)"
        try:
            return next(filter(None, await self._ask("heddle_why_off")), None)
        except Exception as error:
            return f"the engine's scheduler does not answer ({type(error).__name__}: {error})"

    def _ours(self) -> bool:
        """Whether the engine has our scheduler: another one's calls are errors that vLLM logs with a traceback."""
        from verl_heddle.verl_plugin.vllm_scheduler import HeddleScheduler

        return issubclass(self.engine.vllm_config.scheduler_config.get_scheduler_cls(), HeddleScheduler)

    async def _ask(self, method: str, *args: Any) -> list[Any]:
        """Call a method of every engine of this server; vLLM's own call gives the first one's answer only.

        Raises:
            LookupError: the scheduler is not ours.
        """
        if not self._ours():
            raise LookupError("not heddle's scheduler")
        core = self.engine.engine_core
        engines = list(getattr(core, "core_engines", ()))
        if len(engines) < 2:
            return [await core.call_utility_async(method, *args)]
        return await asyncio.gather(*(core._call_utility_async(method, *args, engine=engine) for engine in engines))

    async def heddle_facts(self) -> dict[str, int | None]:
        """What the engine is, as vLLM made it: `tp`, `slots`, `kv_tokens`, which its KV cache holds (None if it does not say), `caches`
        (whether contexts are found again), `tier` (whether the host keeps what is evicted), and `calls`, which this actor takes at a
        time."""
        made = self.engine.vllm_config
        engines = made.parallel_config.data_parallel_size
        slots = engines * made.scheduler_config.max_num_seqs
        facts: dict[str, int | None] = {"tp": made.parallel_config.tensor_parallel_size, "slots": slots, "calls": calls_of(self.config)}
        try:
            cache = made.cache_config
            if cache.kv_cache_size_tokens:  # of one engine; right also where layers hold different numbers of tokens
                facts["kv_tokens"] = engines * cache.kv_cache_size_tokens
            else:
                facts["kv_tokens"] = cache.num_gpu_blocks * cache.block_size if cache.num_gpu_blocks else None
            facts["caches"] = bool(cache.enable_prefix_caching)
            facts["tier"] = getattr(made.kv_transfer_config, "kv_connector", None) in TIERS
        except Exception as error:
            log_once(f"the engine does not tell its KV capacity ({type(error).__name__}: {error}); it is taken for unlimited")
        return facts

    async def heddle_priorities(self, table: dict[str, int]) -> int:
        """Give open requests new priorities by the id the client gave; returns how many there still were. 0 without our scheduler."""
        try:
            return sum(await self._ask("heddle_set_priorities", table))
        except Exception as error:
            log_once(f"requests under way keep their priority ({type(error).__name__}: {error})")
            return 0

    async def heddle_limits(self, table: dict[str, int]) -> dict[str, int]:
        """Let open requests, by the id the client gave, generate no more tokens than this; returns how many those it found have generated.

        Without our scheduler nobody is limited, and 0 is returned for all.
        """
        try:
            return {name: tokens for found in await self._ask("heddle_set_limits", table) for name, tokens in found.items()}
        except Exception as error:
            log_once(f"samples of no more use run on to the end of their turn ({type(error).__name__}: {error})")
            return dict.fromkeys(table, 0)

    async def heddle_counts(self) -> dict[str, int]:
        """Counts of our scheduler since the engine's start; empty without it."""
        try:
            return dict(sum(map(Counter, await self._ask("heddle_counts")), Counter()))
        except LookupError:
            return {}
        except Exception as error:
            log_once(f"the engine does not count preemptions on arrival ({type(error).__name__}: {error})")
            return {}

    async def heddle_status(self) -> dict[str, int]:
        """Requests the engine still works on or has queued, as the server sees it."""
        return {"unfinished": self.engine.output_processor.get_num_unfinished_requests()}


def calls_of(rollout: Any) -> int:
    """Calls that a server actor takes at a time (verl: `RolloutReplica.max_concurrency`); the others wait in Ray's queue."""
    return max(1000, int(rollout.max_num_seqs or 0) + CONTROL_METHOD_CONCURRENCY)


class HeddleReplica(vLLMReplica):
    """verl's replica, launching our server for the policy; reward and teacher models keep verl's own."""

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
    """Weight updates are made from the process in which the manager lives; before there is one, nobody is at work."""
    from verl_heddle.verl_plugin import manager

    try:
        if manager.MANAGER is not None:
            getattr(manager.MANAGER, event)(*what)
    except Exception as error:
        log_once(f"a weight update is not followed ({type(error).__name__}: {error}); its turns wait in the engines")


def make(replica_rank: int, config: Any, model_config: Any, *args: Any, **kwargs: Any) -> HeddleReplica:
    """What verl calls as the replica's class: one of ours, under a layout (`heddle.layout`) one that stands for a GPU."""
    from verl_heddle.verl_plugin import layouts

    others = kwargs.get("is_reward_model") or kwargs.get("is_teacher_model")
    cls = HeddleReplica if others or layouts.settings(config) is None else layouts.Home
    return cls(replica_rank, config, model_config, *args, **kwargs)


def register() -> None:
    """Make `rollout.name=vllm` mean ours in this process."""
    RolloutReplicaRegistry.register("vllm", lambda: make)
