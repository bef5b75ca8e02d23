"""vLLM's scheduler with preemption on arrival: `scheduler_cls=verl_heddle.verl_plugin.vllm_scheduler.HeddleScheduler`.

In stock vLLM the waiting queue is ordered by priority, but a waiting request never takes a running one's slot. Before each step this
subclass asks `schedule.preempt` for pairs of victim and winner, preempts the victims with vLLM's own method, and lets vLLM schedule. vLLM
imports and builds it in the engine-core process, so its settings are JSON in the environment variable HEDDLE_PREEMPT (names and defaults:
`schedule.preempt.Rule`, and `enable`), which `replicas` sets before it launches the engine. They are not in vLLM's `additional_config`,
which is part of vLLM's compile hash: every changed setting would recompile the model.

Two precautions are needed (tests/contract/test_vllm_scheduler.py shows the failures without them):
1. A victim stays out of the queue for the step that preempted it. If it is preempted and resumed in one step (when the winner cannot start
   after all), the V1 model runner gets no tokens for it, and 0.24.0 with asynchronous scheduling counts a token in flight twice.
2. Victims are added to the step's `preempted_req_ids`. 0.24.0 collects only those of its own loop, and Model Runner V2 frees slots only for
   finished and preempted ids.

The rule is off, vLLM schedules as usual, and one log line says why, with: a policy other than priority, a vLLM whose names differ
(`vllm_seams`), unreadable settings, and features it was never tested with: KV connectors, speculative decoding, pipeline parallelism. A
request whose grammar is still compiling, or whose step defers prefills, wins no slot until that is over.

Utility calls of the engine client set priorities and limits of live requests, and read counts:
`await engine.engine_core.call_utility_async("heddle_set_priorities", {caller_id: priority})`, `("heddle_set_limits", {caller_id: tokens})`,
`("heddle_counts")`, and `("heddle_why_off")`. None of them raises in the engine. Limits work without the rule. Callers give priorities as
whole numbers; `Request.priority` of a live request holds the aged one.
"""

from __future__ import annotations

import json
import os
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from heapq import merge
from operator import attrgetter
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.request_queue import SchedulingPolicy, create_request_queue

from verl_heddle.schedule.preempt import REFUSAL_STEPS, Objection, Plan, Room, Rule, Running, Waiting, aged, preemptions
from verl_heddle.verl_plugin import vllm_seams
from verl_heddle.verl_plugin.log import log_once

SETTINGS = "HEDDLE_PREEMPT"
"""Environment variable of the engine process, with the settings as JSON."""

NOT_ENABLED = "not enabled"
"""Reason for a rule that was not requested; it is not logged."""

MISMATCH = vllm_seams.mismatch()
"""How this vLLM differs from the supported releases; None if it does not."""


@dataclass(slots=True)
class _Life:
    """heddle's record of a request, attached to the request so that it is freed with it."""

    priority: int
    """The caller's, without ageing."""
    arrived: int
    """Last step before it arrived."""
    started: int = 0
    """Step of its last (re)start."""
    preemptions: int = 0
    """By the rule."""
    computed: int = 0
    """Tokens with KV when it was last preempted."""
    won: bool = False
    """A request was preempted for it, and it has not started since."""


def settings() -> Rule | None:
    """The rule from the environment; None with `enable: false`.

    Raises:
        ValueError: invalid settings.
    """
    given = json.loads(os.environ.get(SETTINGS) or "{}")
    enable = given.pop("enable", True)
    if not isinstance(enable, bool):
        raise ValueError(f"enable must be true or false, got {enable!r}")
    rule = Rule.of(given)
    return rule if enable else None


class HeddleScheduler(AsyncScheduler):
    """See the module docstring. `rule` is None if scheduling is left to vLLM, and `off` then says why."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rule: Rule | None = None
        self.step = 0
        self.tally: Counter[str] = Counter()
        self._layered = MISMATCH is not None or bool(self.scheduler_config.async_scheduling)
        self._epoch = time.time()
        self._changes = 0
        """Counts events after which a refused exchange may be accepted: starts, preemptions, new priorities."""
        self._refused_at: tuple[Any, ...] | None = None
        """`_situation` at the last plan."""
        self._refused_why: Objection | None = None
        self._ask_again = 0
        self.off = self._why_off()
        if self.off is None:
            try:
                self.rule = settings()
                self.off = NOT_ENABLED if self.rule is None else None
            except Exception as error:
                self.off = f"invalid settings: {error}"
        if self.rule is not None:
            log_once("preempt on arrival is on: " + ", ".join(f"{name} {value:g}" for name, value in asdict(self.rule).items()))
        elif self.off != NOT_ENABLED:
            log_once(f"preempt on arrival is off, vLLM schedules as usual: {self.off}")
        _offer_utility_calls()

    def _why_off(self) -> str | None:
        if MISMATCH is not None:
            return f"this vLLM differs from the supported releases ({MISMATCH})"
        if (lack := vllm_seams.missing(self)) is not None:
            return f"this vLLM differs from the supported releases ({lack})"
        if self.policy != SchedulingPolicy.PRIORITY:
            return f"scheduling_policy is {self.policy.value}, not priority"
        unchecked = {
            "a KV connector": self.connector is not None,
            "speculative decoding": self.num_spec_tokens > 0,
            "pipeline parallelism": self.parallel_config.pipeline_parallel_size > 1,
        }
        return next((f"not tested with {name}" for name, used in unchecked.items() if used), None)

    # AsyncScheduler's additions are wrong if vLLM schedules synchronously (as on CPU): bypass them, as vLLM's own choice of class does.

    def _update_after_schedule(self, scheduler_output: Any) -> None:
        (super() if self._layered else super(AsyncScheduler, self))._update_after_schedule(scheduler_output)

    def _update_request_with_output(self, *args: Any, **kwargs: Any) -> Any:
        return (super() if self._layered else super(AsyncScheduler, self))._update_request_with_output(*args, **kwargs)

    def add_request(self, request: Any) -> None:
        """Called when a request arrives or an open one gets more input; an arriving one gets its aged priority."""
        if self.rule is not None and request.request_id not in self.requests:
            self._give_priority(request, request.priority)
        super().add_request(request)

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """One step: preempt the victims, then run vLLM's own scheduling."""
        if self.rule is None:
            return super().schedule(*args, **kwargs)
        self.step += 1
        held = [] if any(args) or any(kwargs.values()) else self._make_way()
        output = super().schedule(*args, **kwargs)
        for victim in held:
            self.waiting.add_request(victim)
        if held and output.preempted_req_ids is not None:
            output.preempted_req_ids |= {victim.request_id for victim in held}
        self._note_starts(output)
        return output

    def _make_way(self) -> list[Any]:
        """Preempt the victims of this step; returns them, in no queue."""
        if not self.running or not any(self._queues()) or self.pause_state != PauseState.UNPAUSED:
            return []
        situation = self._situation()
        if self._refused_why is not None and self._refused_at == situation and self.step < self._ask_again:
            self.tally[f"refused_{self._refused_why}"] += 1
            return []
        try:
            plan = self._plan()
        except Exception as error:  # nothing has been changed yet
            self.rule, self.off = None, f"the rule failed: {type(error).__name__}: {error}"
            log_once(f"preempt on arrival is off from now on, vLLM schedules as usual: {self.off}")
            return []
        self._refused_at, self._refused_why, self._ask_again = situation, plan.refused, self.step + REFUSAL_STEPS
        if plan.refused is not None:
            self.tally[f"refused_{plan.refused}"] += 1
        return self._preempt_victims([(self.requests[loser.key], self.requests[winner.key]) for loser, winner in plan.pairs])

    def _preempt_victims(self, pairs: list[tuple[Any, Any]]) -> list[Any]:
        """Free the victims' slots; returns the victims, in no queue."""
        waiting, now = self.waiting, time.monotonic()
        self.waiting = create_request_queue(self.policy)  # collects the victims: removing one from the full heap costs a pass over it
        try:
            for victim, winner in pairs:
                self.running.remove(victim)
                self._preempt_request(victim, now)
                victim.heddle.preemptions += 1
                winner.heddle.won = True
        finally:
            self.waiting = waiting
        self.tally["preempted_by_rule"] += len(pairs)
        return [victim for victim, _ in pairs]

    def _situation(self) -> tuple[Any, ...]:
        """Changes whenever a request starts, ends, is preempted, gets a new priority, or becomes the first of a queue."""
        return self._changes, len(self.running), *(queue.peek_request().request_id if queue else None for queue in self._queues())

    def _queues(self) -> list[Any]:
        """The waiting queues. Up to 0.30 vLLM has a second queue for skipped requests, from 0.31 on for requests that hold KV."""
        return [queue for name in ("waiting", "skipped_waiting", "kv_holding_waiting") if (queue := getattr(self, name, None)) is not None]

    def _plan(self) -> Plan:
        manager = self.kv_cache_manager
        # Every running request may want one more block in this step, and vLLM serves them first.
        blocks = manager.block_pool.get_num_free_blocks() - len(self.running) - getattr(manager, "watermark_blocks", 0)
        slots = self.max_num_running_reqs - len(self.running) - self.num_waiting_for_streaming_input
        room = Room(slots, blocks, self.block_size, bool(self.cache_config.enable_prefix_caching))
        return preemptions(self._worst_first(), self._ready(), room, self.rule)

    def _worst_first(self) -> Iterator[Running]:
        """Running requests in reverse `schedule.preempt.order` (`Request.priority` is the aged one); lazy until the first is requested."""
        for request in sorted(self.running, key=attrgetter("priority", "arrival_time"), reverse=True):
            life = request.heddle
            age, ran, blocks = self._arrival(request), self.step - life.started, partial(self._own_blocks, request.request_id)
            yield Running(request.request_id, life.priority, age, ran, life.preemptions, request.num_computed_tokens, blocks)

    def _own_blocks(self, request_id: str) -> int:
        """Number of unshared blocks. Shared blocks form a common prefix, so bisect for its end."""
        blocks = self.kv_cache_manager.get_blocks(request_id).blocks
        return sum(len(group) - bisect_left(group, True, key=lambda block: block.ref_cnt <= 1) for group in blocks)

    def _ready(self) -> Iterator[Waiting]:
        """Requests that vLLM could start in this step, in vLLM's order."""
        groups = len(self.kv_cache_config.kv_cache_groups)
        for request in merge(*self._queues()):
            if self._is_blocked_waiting_status(request.status):
                continue
            if getattr(request, "num_stale_output_tokens", 0) and not request.drop_stale_output:
                continue  # 0.27.1 lets it drain first
            need = -(-request.num_tokens // self.block_size) * groups
            yield Waiting(request.request_id, request.heddle.priority, self._arrival(request), need)

    def _preempt_request(self, request: Any, *args: Any, **kwargs: Any) -> None:
        if self.rule is not None:
            self.tally["preempted"] += 1
            self._changes += 1
            request.heddle.computed = request.num_computed_tokens
        super()._preempt_request(request, *args, **kwargs)

    def _note_starts(self, output: Any) -> None:
        cached, started = output.scheduled_cached_reqs, [(new.req_id, new.num_computed_tokens) for new in output.scheduled_new_reqs]
        # For Model Runner V2, vLLM lists resumed requests as new ones.
        if cached.resumed_req_ids:
            known = zip(cached.req_ids, cached.num_computed_tokens, strict=True)
            started += [pair for pair in known if pair[0] in cached.resumed_req_ids]
        self._changes += len(started)
        for request_id, kept in started:
            life = self.requests[request_id].heddle
            life.started = self.step
            self.tally["recomputed_tokens"] += max(0, life.computed - kept)
            life.computed = 0
            if life.won:
                life.won = False
                self.tally["winners_started"] += 1
                self.tally["winners_waited_steps"] += self.step - life.arrived

    def _arrival(self, request: Any) -> float:
        return request.arrival_time - self._epoch

    def _give_priority(self, request: Any, priority: int) -> None:
        if not hasattr(request, "heddle"):
            request.heddle = _Life(priority, self.step)
        request.heddle.priority = priority
        request.priority = aged(priority, self._arrival(request), self.rule.ageing_per_s) if self.rule.ageing_per_s else priority

    def set_priorities(self, table: dict[str, int]) -> int:
        """Set new priorities of live requests, by the caller's id; call between two steps. Returns how many requests it found."""
        if self.rule is None:
            return 0
        named = {request: table[name] for request in self.requests.values() if (name := _name(request.request_id, table)) is not None}
        self._changes += len(named)
        for queue in self._queues():
            moved = {request for request in _unordered(queue) if request in named}
            if moved:
                queue.remove_requests(moved)  # a heap on the priority: take out, change, put back
                for request in moved:
                    self._give_priority(request, named[request])
                    queue.add_request(request)
        for request in self.running:
            if request in named:
                self._give_priority(request, named[request])
        return len(named)

    def set_limits(self, table: dict[str, int]) -> dict[str, int]:
        """Limit the tokens that live requests may generate, by the caller's id; returns the tokens generated so far by those found. A
        request beyond its limit ends with its next token."""
        found = {}
        for request in self.requests.values():
            name = _name(request.request_id, table)
            if name is not None:
                request.max_tokens = min(request.max_tokens, max(1, table[name]))
                found[name] = request.num_output_tokens
        return found

    def counts(self) -> dict[str, int]:
        """Current queue and block counts, and event counts since the start."""
        pool = self.kv_cache_manager.block_pool
        since = {name: self.tally[name] for name in ("preempted_by_rule", "recomputed_tokens", "winners_started", "winners_waited_steps")}
        return {
            "rule_on": int(self.rule is not None),
            "steps": self.step,
            "requests": len(self.requests),
            "running": len(self.running),
            "waiting": sum(map(len, self._queues())),
            "free_blocks": pool.get_num_free_blocks(),
            "blocks": pool.num_gpu_blocks,
            "preempted_by_vllm": self.tally["preempted"] - self.tally["preempted_by_rule"],
            **since,
            **{f"refused_{why}": self.tally[f"refused_{why}"] for why in Objection},
        }


def _name(request_id: str, table: dict[str, int]) -> str | None:
    """The table's name of a request: vLLM appends "-<8 hex digits>" to the caller's id, unless configured not to."""
    short = request_id.rpartition("-")[0]
    return short if short in table else request_id if request_id in table else None


def _unordered(queue: Any) -> Any:
    """A queue's requests in any order; iterating over a vLLM queue would sort it."""
    return getattr(queue, "_heap", queue)


def _offer_utility_calls() -> None:
    """Add heddle's methods to `EngineCore` in its own process: the engine client's utility calls end there."""
    from vllm.v1.engine.core import EngineCore

    EngineCore.heddle_set_priorities = lambda core, table: _answer(lambda: core.scheduler.set_priorities(table), 0)
    EngineCore.heddle_set_limits = lambda core, table: _answer(lambda: core.scheduler.set_limits(table), {})
    EngineCore.heddle_counts = lambda core: _answer(core.scheduler.counts, {})
    EngineCore.heddle_why_off = lambda core: core.scheduler.off


def _answer(call: Callable[[], Any], otherwise: Any) -> Any:
    """Catch and log errors once: vLLM would log each with a traceback."""
    try:
        return call()
    except Exception as error:
        log_once(f"this vLLM's scheduler does not answer heddle's calls ({type(error).__name__}: {error})")
        return otherwise
