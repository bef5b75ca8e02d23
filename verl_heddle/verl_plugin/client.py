"""The worker's client for turns: gets a decision, calls the engine, times both, pre-warms moves, survives the loss of router or replica.

A turn is one generation, numbered within its trajectory by the worker. Its request carries that name in the router and the engine
(`TurnStart.request`), not verl's request id: several trajectories may share that id, and under `full_determinism` all do.
The worker knows where a turn runs or asks the router (`link`). Later events need no answer, except that a task waits for the router's
pre-warm order while the tool runs. A turn whose replica dies restarts on a different one, because the worker holds its context.

Under an asynchronous trainer a weight update aborts requests, and verl's own client continues each with a new request: one generation,
several *legs* (`HeddleAsyncClient`).
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, defaultdict
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any

from ray.exceptions import ActorDiedError, RayTaskError
from verl.workers.rollout.llm_server import FullyAsyncLLMServerClient, LLMServerClient

from verl_heddle.options import Options
from verl_heddle.traces.recorder import EngineTimes, Legs, Recorder
from verl_heddle.trajectory import Decision, Reason, ToolStart, TrajectoryEnd, TrajectoryId, TurnEnd, TurnStart
from verl_heddle.verl_plugin.calls import ServerHandle, answer, of_a_dead_replica
from verl_heddle.verl_plugin.link import Link
from verl_heddle.verl_plugin.live import CURRENT
from verl_heddle.verl_plugin.log import log_once
from verl_heddle.verl_plugin.request_life import FIELD

ABORTED = ("aborted", "abort")
"""Values of `stop_reason` for an aborted request."""

MEDIA = ("image_data", "video_data", "audio_data")
"""Arguments of `generate` besides tokens; a context with any of them is not pre-warmed."""

LIMIT_TRIES, LIMIT_RETRY_S = 3, 0.05
"""Tries to set a limit, and seconds between them: the request may still be on its way into the engine."""


@dataclass(slots=True)
class _Generation:
    """One generation of a trajectory, across all its requests."""

    recorder: Recorder | None
    number: int
    sent: int = 0
    """Requests sent so far."""
    legs: Legs = field(default_factory=Legs)
    """Legs ended by weight updates."""
    recorded: bool = False
    decision: Decision | None = None
    """The decision for the last request."""


_GENERATION: ContextVar[_Generation | None] = ContextVar("heddle_generation", default=None)
"""The generation that verl's own loop over legs is running, if any."""


@dataclass(slots=True)
class _Call:
    """The `leg`-th request of a generation; filled in by `_acquire_server`, read once the engine has answered."""

    generation: _Generation
    leg: int
    turn: TurnStart | None = None
    decision: Decision | None = None
    asked_s: float = 0.0
    sent_s: float = 0.0
    held_s: float = 0.0
    held_paused_s: float = 0.0
    """The part of `held_s` during which every engine was paused."""
    tokens: int = 0
    """Tokens generated in the engine, as last reported."""

    @property
    def recorder(self) -> Recorder | None:
        """The trajectory's recorder; None outside agent loops."""
        return self.generation.recorder

    @property
    def decided_locally(self) -> bool:
        """Whether the worker chose the replica without the router."""
        return self.decision is not None and self.decision.reason is Reason.FALLBACK_ROUTER


_CALL: ContextVar[_Call] = ContextVar("heddle_call")


class HeddleClient(LLMServerClient):
    """verl's client plus trajectory identity, a priority per turn, cancellation in the engine, and a fallback if the router is lost.

    Args:
        config: verl's whole config.
        load_balancer_handle: the `HeddleRouter` actor.
        servers: server id -> actor handle, as of start-up; fetched again when an unknown id appears.
        options: `heddle.*`.
    """

    def __init__(self, config: Any, load_balancer_handle: Any, servers: dict[str, Any], options: Options) -> None:
        super().__init__(config=config, load_balancer_handle=load_balancer_handle)
        self.counts: Counter[str] = Counter()
        """Errors and fallbacks by name, and pre-warms done."""
        self._link = Link(load_balancer_handle, servers, options.deadlines.router_s, self.counts)
        self._options = options
        rollout = config.actor_rollout_ref.rollout
        self._priorities = rollout.name == "vllm" and rollout.get("scheduling_policy") == "priority"
        place = options.place
        self._may_prewarm = not options.observe and place.enable and place.transport == "prewarm" and len(servers) > 1
        self._warming: dict[str, asyncio.Task[None]] = {}
        """By trajectory: the task that waits for a pre-warm order or runs it."""
        self._limits: dict[str, int] = {}
        """By trajectory: limit on the tokens generated over all its turns; more are not needed."""
        self._flying: dict[str, dict[str, _Call]] = {}
        """By trajectory: its requests in engines, by request name."""
        self._outside = count()
        """Numbers requests outside any trajectory; with the link's name they are unique over all workers."""
        self._limit_tasks: set[asyncio.Task[None]] = set()

    @property
    def _servers(self) -> dict[str, Any]:
        """Server id -> actor handle, as last received."""
        return self._link.servers

    async def generate(self, request_id: str, **kwargs: Any) -> Any:
        """Run one turn; see `LLMServerClient.generate`.

        Raises:
            RayError: no replica is left.
        """
        generation = _GENERATION.get() or self._begin()
        for _ in range(len(self._servers)):
            call = _Call(generation, generation.sent)
            generation.sent += 1
            try:
                return await self._turn(call, request_id, **kwargs)
            except (ActorDiedError, RayTaskError) as error:
                decision = _CALL.get().decision
                if decision is None or not of_a_dead_replica(error):
                    raise
                last = error
                self.counts["replica_lost"] += 1
                log_once(f"replica {decision.replica} died; its turns restart on other replicas")
                await self._link.replica_lost(decision.replica)
        raise last

    def _begin(self) -> _Generation:
        recorder = CURRENT.get()
        if recorder is None:
            return _Generation(None, next(self._outside))
        recorder.begun += 1
        self._cancel_prewarm(recorder.id.key)
        return _Generation(recorder, recorder.begun - 1)

    async def _turn(self, call: _Call, request_id: str, **kwargs: Any) -> Any:
        _CALL.set(call)
        tokens, completed, interrupted, engine_s = 0, False, False, None
        context: list[int] = []
        generation, recorder = call.generation, call.recorder
        before_tokens = generation.legs.tokens
        try:
            output = await super().generate(request_id, **kwargs)
            tokens, completed = len(output.token_ids), output.stop_reason not in ABORTED
            interrupted = not completed and _GENERATION.get() is not None
            engine_times = output.extra_fields.pop(FIELD, None)
            if recorder is not None and call.decision is not None and call.turn is not None:
                facts = {"cached_tokens": output.extra_fields.get("num_cached_tokens"), "weights": output.extra_fields.get("global_steps")}
                times = EngineTimes(**facts, **engine_times) if engine_times else None
                moments = (call.asked_s, call.sent_s, time.monotonic())
                held = (call.held_s, call.held_paused_s)
                if interrupted:
                    generation.legs.ended(call.turn.context_tokens, tokens, *moments, times, *held)
                else:
                    recorder.turn_done(call.turn.context_tokens, tokens, call.decision, *moments, times, *held, generation.legs)
                    generation.recorded = True
                    engine_s = recorder.turns[-1].gen_s
                if completed and self._may_prewarm and not any(kwargs.get(name) for name in MEDIA):
                    context = [*kwargs["prompt_ids"], *output.token_ids]
            return output
        except asyncio.CancelledError:
            if recorder is not None and call.decision is not None and call.turn is not None and call.sent_s:
                moments = (call.asked_s, call.sent_s, time.monotonic())
                recorder.turn_cut(call.turn.context_tokens, call.decision, *moments, generation.legs)
                generation.recorded = True
            raise
        finally:
            generation.decision = call.decision
            if call.turn is not None and call.decision is not None:
                self._left_engine(call.turn)
                if interrupted:
                    self._link.ask_again(call.turn.trajectory.key)
                if not call.decided_locally:
                    turn, replica = call.turn, call.decision.replica
                    end = TurnEnd(
                        *(turn.trajectory, turn.conversation, replica, turn.turn, tokens, completed, engine_s, turn.leg),
                        before_tokens=before_tokens,
                        interrupted=interrupted,
                    )
                    self._report_turn(end, turn, context)

    async def _acquire_server(self, request_id: str, **extra: Any) -> tuple[str, Any]:
        call = _CALL.get()
        recorder, call.asked_s, legs = call.recorder, time.monotonic(), call.generation.legs
        legs.asked(call.asked_s)
        turn = TurnStart(
            trajectory=recorder.id if recorder else _outside_id(request_id, self._link.name),
            conversation=request_id,
            turn=call.generation.number,
            context_tokens=len(extra["prompt_ids"]),
            generated_tokens=recorder.output_tokens + legs.tokens if recorder else 0,
            tool_s=recorder.turn_asked(call.asked_s, again=call.leg > 0) if recorder and not legs.number else None,
            text=recorder.text if recorder and not recorder.turns else None,
            leg=call.leg,
        )
        decision = self._link.begin(turn)
        if decision is None:
            try:
                decision = await self._link.ask(turn)
            except asyncio.CancelledError:
                self._link.post("turn_withdrawn", turn)
                raise
        call.turn, call.decision = turn, decision
        if decision.held:
            since = time.monotonic()
            decision, call.held_paused_s = await self._link.wait(turn, decision)
            call.decision = decision
            call.held_s = time.monotonic() - since
        call.sent_s = time.monotonic()
        arguments: dict[str, Any] = {"request_id": turn.request}
        if self._priorities and decision.priority:
            arguments["priority"] = decision.priority
        limit = self._limits.get(turn.trajectory.key)
        if limit is not None:
            arguments["sampling_params"] = self._limited(extra["sampling_params"], turn, limit)
        self._flying.setdefault(turn.trajectory.key, {})[turn.request] = call
        deadline = self._options.deadlines.cancel_s
        return decision.replica, ServerHandle(self._servers[decision.replica], arguments, deadline, self._cancel_lost)

    def limit(self, table: dict[str, int]) -> None:
        """Limit the generated tokens of trajectories (key -> total over all turns), in turns in flight and later ones."""
        self._limits |= table
        by_replica: dict[str, dict[str, _Call]] = defaultdict(dict)
        for key in table:
            for name, call in self._flying.get(key, {}).items():
                if call.decision is not None:
                    by_replica[call.decision.replica][name] = call
        for replica, calls in by_replica.items():
            task = asyncio.create_task(self._send_limits(replica, calls))
            self._limit_tasks.add(task)
            task.add_done_callback(self._limit_tasks.discard)

    def _in_engine(self, turn: TurnStart) -> bool:
        return turn.request in self._flying.get(turn.trajectory.key, {})

    def _left_engine(self, turn: TurnStart) -> None:
        """Note that the turn's request has left the engine."""
        calls = self._flying.get(turn.trajectory.key, {})
        calls.pop(turn.request, None)
        if not calls:
            self._flying.pop(turn.trajectory.key, None)

    async def _send_limits(self, replica: str, calls: dict[str, _Call]) -> None:
        """Send the limits until the engine has found every request. It answers with tokens so far, which `Recorder.count` reports."""
        for _ in range(LIMIT_TRIES):
            table = {
                name: max(1, self._limits[call.turn.trajectory.key] - call.turn.generated_tokens)
                for name, call in calls.items()
                if call.turn is not None and self._in_engine(call.turn) and call.turn.trajectory.key in self._limits
            }
            if not table:
                return
            try:
                found = await answer(self._servers[replica].heddle_limits.remote(table), self._options.deadlines.cancel_s)
            except Exception:  # they run to their own ends and are dropped then
                self.counts["limit_lost"] += 1
                return
            for name, tokens in found.items():
                call = calls.pop(name)
                call.tokens, recorder = tokens, call.recorder
                if recorder is not None and call.turn is not None and self._in_engine(call.turn):
                    recorder.count(recorder.output_tokens + sum(live.tokens for live in self._flying[recorder.id.key].values()))
            if not calls:
                return
            await asyncio.sleep(LIMIT_RETRY_S)

    def _limited(self, sampling_params: dict[str, Any], turn: TurnStart, limit: int) -> dict[str, Any]:
        """Sampling parameters with the trajectory's limit applied. If they set no maximum, verl's server uses what is left of the
        configured lengths; that default is computed here."""
        rollout = self.config.actor_rollout_ref.rollout
        left = min(rollout.response_length, rollout.prompt_length + rollout.response_length - turn.context_tokens)
        own = sampling_params.get("max_tokens", sampling_params.get("max_new_tokens", left))
        # Given both names, verl uses `max_tokens` and passes `max_new_tokens` on to vLLM, which rejects it.
        others = {name: value for name, value in sampling_params.items() if name != "max_new_tokens"}
        return {**others, "max_tokens": max(1, min(own, limit - turn.generated_tokens))}

    async def _prewarm(self, order: Any, turn: TurnStart, context: list[int]) -> None:
        """Wait for the router's order, then prefill the context on the target replica. Cancelled when the next turn begins."""
        prewarm = await answer(order, self._options.tools.trajectory_s)
        if prewarm is None or prewarm.replica not in self._servers:
            return
        arguments: dict[str, Any] = {"request_id": f"{turn.request}:prewarm"}
        if self._priorities:
            arguments["priority"] = prewarm.priority
        server = ServerHandle(self._servers[prewarm.replica], arguments, self._options.deadlines.cancel_s, self._cancel_lost)
        sampling = {"max_tokens": 1, "temperature": 0.0}
        prefill = server.remote(request_id=turn.request, prompt_ids=context, sampling_params=sampling)
        await answer(prefill, self._options.tools.trajectory_s)
        self.counts["prewarm/done"] += 1

    def _prewarm_ended(self, key: str, task: asyncio.Task[None]) -> None:
        if self._warming.get(key) is task:
            del self._warming[key]
        if task.cancelled():
            return
        self._link.post("transferred", key)
        if task.exception() is not None:  # the turn will prefill its context itself
            self.counts["prewarm/failed"] += 1

    def _cancel_prewarm(self, key: str) -> None:
        """Cancel an unfinished pre-warm: the tool has returned or the episode is over."""
        task = self._warming.pop(key, None)
        if task is not None:
            task.cancel()

    def _release_server(self, server_id: str, request_id: str | None = None) -> None:
        if self._link.local is not None and _CALL.get().decided_locally:
            self._link.local.release_server(server_id)

    def router_is_back(self) -> None:
        """Use the router again; called by the manager once the router has answered."""
        self._link.router_is_back()

    def servers_are(self, servers: dict[str, Any]) -> None:
        """Replace the list of servers; called by the manager."""
        self._link.servers_are(servers)

    def _cancel_lost(self) -> None:
        self.counts["cancel_lost"] += 1
        log_once(f"a cancelled request was still running after {self._options.deadlines.cancel_s:g} s (heddle.deadlines.cancel_s)")

    def _report_turn(self, end: TurnEnd, turn: TurnStart, context: list[int]) -> None:
        """Report the end of a turn, and pre-warm if the router orders it. `context`: tokens that the next turn begins with; empty: do not
        pre-warm."""
        if not context:
            return self._link.post("turn_finished", end)
        order = self._link.ordered("turn_finished", end)
        if order is None:
            return
        key = turn.trajectory.key
        self._cancel_prewarm(key)
        self._warming[key] = task = asyncio.create_task(self._prewarm(order, turn, context))
        task.add_done_callback(partial(self._prewarm_ended, key))

    def tool_started(self, trajectory: TrajectoryId, tool: str) -> None:
        """Report the start of a tool call."""
        if self._options.predicts:  # only the predictor uses the event
            self._link.post("tool_started", ToolStart(trajectory, tool))

    def trajectory_ended(self, end: TrajectoryEnd) -> None:
        """Report the end of a trajectory and drop its state."""
        self._cancel_prewarm(end.trajectory.key)
        self._limits.pop(end.trajectory.key, None)
        self._link.ended(end.trajectory.key)
        self._link.post("trajectory_ended", end)

    def flush(self) -> None:
        """Send every pending event to the router now: a step may be over."""
        self._link.flush()


class HeddleAsyncClient(FullyAsyncLLMServerClient, HeddleClient):
    """The client for asynchronous trainers: verl's own loop continues generations aborted by a weight update, and runs each leg through
    `HeddleClient`, the next class in the method resolution order."""

    async def generate(self, request_id: str, **kwargs: Any) -> Any:
        """Run one generation, across all its legs; see `FullyAsyncLLMServerClient.generate`."""
        generation = self._begin()
        _GENERATION.set(generation)
        try:
            return await super().generate(request_id, **kwargs)
        finally:
            _GENERATION.set(None)
            recorder, now = generation.recorder, time.monotonic()
            if recorder is not None and generation.legs.number and not generation.recorded:  # it ended between two legs
                generation.legs.asked(now)
                recorder.turn_cut(0, generation.decision, now, now, now, generation.legs)


def _outside_id(request_id: str, worker: str) -> TrajectoryId:
    """Identity of a request outside any agent loop (e.g. reward code that generates); the predictor does not learn from it."""
    return TrajectoryId(prompt="", uid=request_id, sample=worker, step=-1, validate=True)
