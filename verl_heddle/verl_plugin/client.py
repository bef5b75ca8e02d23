"""The worker's end of a turn: ask the router, call the engine, time both, pre-warm where a trajectory moves, go on if either dies.

A turn is one generation, numbered within its trajectory by the worker, and its request bears that name in the router and in the engine
(`TurnStart.request`), whatever verl's request id is: several trajectories may share that, and under `full_determinism` all do.
Where a turn runs its worker knows, or asks the router (`link`); what is told to it afterwards waits for no answer, but for a task beside
the tool call that waits for the router's order to pre-warm. A turn whose replica dies starts again elsewhere: its context is here.

Under an asynchronous trainer a weight update aborts requests, and verl's own client goes on with another request from where each was:
one generation, several *legs* (`HeddleAsyncClient`).
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
"""`stop_reason` of a request that did not come to its end."""

MEDIA = ("image_data", "video_data", "audio_data")
"""Arguments of `generate` besides tokens; a context with them is not pre-warmed."""


LIMIT_TRIES, LIMIT_RETRY_S = 3, 0.05
"""A limit that comes while the request is on its way into the engine finds nobody there yet."""


@dataclass(slots=True)
class _Generation:
    """A generation of a trajectory, over all its requests."""

    recorder: Recorder | None
    number: int
    sent: int = 0
    """Requests so far."""
    legs: Legs = field(default_factory=Legs)
    """Those that weight updates have ended."""
    recorded: bool = False
    decision: Decision | None = None
    """The last."""


_GENERATION: ContextVar[_Generation | None] = ContextVar("heddle_generation", default=None)
"""The one that verl's own loop over legs is at, if it is at one."""


@dataclass(slots=True)
class _Call:
    """One request of a generation, the `leg`-th: filled in by `_acquire_server`, read when the engine has answered."""

    generation: _Generation
    leg: int
    turn: TurnStart | None = None
    decision: Decision | None = None
    asked_s: float = 0.0
    sent_s: float = 0.0
    held_s: float = 0.0
    held_paused_s: float = 0.0
    """Of it, while every engine was paused."""
    tokens: int = 0
    """Generated in the engine, as last heard."""

    @property
    def recorder(self) -> Recorder | None:
        """Of the trajectory."""
        return self.generation.recorder

    @property
    def alone(self) -> bool:
        """Whether the worker chose the replica without the router."""
        return self.decision is not None and self.decision.reason is Reason.FALLBACK_ROUTER


_CALL: ContextVar[_Call] = ContextVar("heddle_call")


class HeddleClient(LLMServerClient):
    """verl's client with a trajectory's identity, a priority per turn, real cancellation, and a way on without the router.

    Args:
        config: verl's whole config.
        load_balancer_handle: the `HeddleRouter` actor.
        servers: server id -> actor handle, as of start-up; asked again when an unknown id comes.
        options: `heddle.*`.
    """

    def __init__(self, config: Any, load_balancer_handle: Any, servers: dict[str, Any], options: Options) -> None:
        super().__init__(config=config, load_balancer_handle=load_balancer_handle)
        self.counts: Counter[str] = Counter()
        """What went wrong and was got around, by name."""
        self._link = Link(load_balancer_handle, servers, options.deadlines.router_s, self.counts)
        self._options = options
        rollout = config.actor_rollout_ref.rollout
        self._priorities = rollout.name == "vllm" and rollout.get("scheduling_policy") == "priority"
        place = options.place
        self._warms = not options.observe and place.enable and place.transport == "prewarm" and len(servers) > 1
        self._warming: dict[str, asyncio.Task[None]] = {}
        """By trajectory: waiting for the order to pre-warm, or pre-warming."""
        self._limits: dict[str, int] = {}
        """By trajectory: generated tokens of all its turns at which it is of no more use."""
        self._flying: dict[str, dict[str, _Call]] = {}
        """By trajectory: its turns in engines, by request."""
        self._outside = count()
        """With the link's name it names requests outside any trajectory, which no other worker must have."""
        self._telling: set[asyncio.Task[None]] = set()

    @property
    def _servers(self) -> dict[str, Any]:
        """Server id -> actor handle, as last heard."""
        return self._link.servers

    async def generate(self, request_id: str, **kwargs: Any) -> Any:
        """One turn; see `LLMServerClient.generate`.

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
                log_once(f"replica {decision.replica} died; its turns start again elsewhere")
                await self._link.replica_lost(decision.replica)
        raise last

    def _begin(self) -> _Generation:
        recorder = CURRENT.get()
        if recorder is None:
            return _Generation(None, next(self._outside))
        recorder.begun += 1
        self._drop_warming(recorder.id.key)
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
            told = output.extra_fields.pop(FIELD, None)
            if recorder is not None and call.decision is not None and call.turn is not None:
                seen = {"cached_tokens": output.extra_fields.get("num_cached_tokens"), "weights": output.extra_fields.get("global_steps")}
                times = EngineTimes(**seen, **told) if told else None
                moments = (call.asked_s, call.sent_s, time.monotonic())
                held = (call.held_s, call.held_paused_s)
                if interrupted:
                    generation.legs.ended(call.turn.context_tokens, tokens, *moments, times, *held)
                else:
                    recorder.turn_done(call.turn.context_tokens, tokens, call.decision, *moments, times, *held, generation.legs)
                    generation.recorded = True
                    engine_s = recorder.turns[-1].gen_s
                if completed and self._warms and not any(kwargs.get(name) for name in MEDIA):
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
                self._landed(call.turn)
                if interrupted:
                    self._link.ask_again(call.turn.trajectory.key)
                if not call.alone:
                    turn, replica = call.turn, call.decision.replica
                    end = TurnEnd(
                        *(turn.trajectory, turn.conversation, replica, turn.turn, tokens, completed, engine_s, turn.leg),
                        before_tokens=before_tokens,
                        interrupted=interrupted,
                    )
                    self._finished(end, turn, context)

    async def _acquire_server(self, request_id: str, **extra: Any) -> tuple[str, Any]:
        call = _CALL.get()
        recorder, call.asked_s, legs = call.recorder, time.monotonic(), call.generation.legs
        legs.asked(call.asked_s)
        turn = TurnStart(
            trajectory=recorder.id if recorder else _outside(request_id, self._link.name),
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
        """Trajectories of which the engines need not generate more tokens than this, over all their turns, now and in later turns."""
        self._limits |= table
        by_replica: dict[str, dict[str, _Call]] = defaultdict(dict)
        for key in table:
            for name, call in self._flying.get(key, {}).items():
                if call.decision is not None:
                    by_replica[call.decision.replica][name] = call
        for replica, calls in by_replica.items():
            task = asyncio.create_task(self._tell_limits(replica, calls))
            self._telling.add(task)
            task.add_done_callback(self._telling.discard)

    def _flies(self, turn: TurnStart) -> bool:
        return turn.request in self._flying.get(turn.trajectory.key, {})

    def _landed(self, turn: TurnStart) -> None:
        """The turn's request is not in an engine any more, if it was."""
        calls = self._flying.get(turn.trajectory.key, {})
        calls.pop(turn.request, None)
        if not calls:
            self._flying.pop(turn.trajectory.key, None)

    async def _tell_limits(self, replica: str, calls: dict[str, _Call]) -> None:
        """Until the engine has heard it of all that are there; how far they have got comes back, and goes to whoever set the limit."""
        for _ in range(LIMIT_TRIES):
            table = {
                name: max(1, self._limits[call.turn.trajectory.key] - call.turn.generated_tokens)
                for name, call in calls.items()
                if call.turn is not None and self._flies(call.turn) and call.turn.trajectory.key in self._limits
            }
            if not table:
                return
            try:
                found = await answer(self._servers[replica].heddle_limits.remote(table), self._options.deadlines.cancel_s)
            except Exception:  # they run on to their own ends, and are dropped then
                self.counts["limit_lost"] += 1
                return
            for name, tokens in found.items():
                call = calls.pop(name)
                call.tokens, recorder = tokens, call.recorder
                if recorder is not None and call.turn is not None and self._flies(call.turn):
                    recorder.count(recorder.output_tokens + sum(one.tokens for one in self._flying[recorder.id.key].values()))
            if not calls:
                return
            await asyncio.sleep(LIMIT_RETRY_S)

    def _limited(self, sampling_params: dict[str, Any], turn: TurnStart, limit: int) -> dict[str, Any]:
        """Sampling parameters of a turn whose trajectory has a limit; without one of their own, verl's server takes what is left of its
        lengths, which is said here."""
        rollout = self.config.actor_rollout_ref.rollout
        left = min(rollout.response_length, rollout.prompt_length + rollout.response_length - turn.context_tokens)
        own = sampling_params.get("max_tokens", sampling_params.get("max_new_tokens", left))
        # Of the two, verl takes the first and hands the second on to vLLM, which does not know it.
        others = {name: value for name, value in sampling_params.items() if name != "max_new_tokens"}
        return {**others, "max_tokens": max(1, min(own, limit - turn.generated_tokens))}

    async def _warm(self, order: Any, turn: TurnStart, context: list[int]) -> None:
        """Wait for the router's order, then let the replica that it names read the context. Lasts no longer than the tool."""
        prewarm = await answer(order, self._options.tools.trajectory_s)
        if prewarm is None or prewarm.replica not in self._servers:
            return
        arguments: dict[str, Any] = {"request_id": f"{turn.request}:prewarm"}
        if self._priorities:
            arguments["priority"] = prewarm.priority
        server = ServerHandle(self._servers[prewarm.replica], arguments, self._options.deadlines.cancel_s, self._cancel_lost)
        sampling = {"max_tokens": 1, "temperature": 0.0}
        reading = server.remote(request_id=turn.request, prompt_ids=context, sampling_params=sampling)
        await answer(reading, self._options.tools.trajectory_s)
        self.counts["prewarm/done"] += 1

    def _warmed(self, key: str, task: asyncio.Task[None]) -> None:
        if self._warming.get(key) is task:
            del self._warming[key]
        if task.cancelled():
            return
        self._link.post("transferred", key)
        if task.exception() is not None:  # the turn will read its context itself
            self.counts["prewarm/failed"] += 1

    def _drop_warming(self, key: str) -> None:
        """The tool is back, or the episode over: a pre-warm that is not done is in the way."""
        task = self._warming.pop(key, None)
        if task is not None:
            task.cancel()

    def _release_server(self, server_id: str, request_id: str | None = None) -> None:
        if self._link.local is not None and _CALL.get().alone:
            self._link.local.release_server(server_id)

    def router_is_back(self) -> None:
        """Trust the router again (told by the manager once it has answered)."""
        self._link.router_is_back()

    def servers_are(self, servers: dict[str, Any]) -> None:
        """These and no others (told by the manager)."""
        self._link.servers_are(servers)

    def _cancel_lost(self) -> None:
        self.counts["cancel_lost"] += 1
        log_once(f"a cancelled request was still running after {self._options.deadlines.cancel_s:g} s (heddle.deadlines.cancel_s)")

    def _finished(self, end: TurnEnd, turn: TurnStart, context: list[int]) -> None:
        """Tell that a turn ended, and pre-warm where the router orders it; `context`: what the next turn begins with, empty if it is not to
        be read beforehand."""
        if not context:
            return self._link.post("turn_finished", end)
        order = self._link.ordered("turn_finished", end)
        if order is None:
            return
        key = turn.trajectory.key
        self._drop_warming(key)
        self._warming[key] = task = asyncio.create_task(self._warm(order, turn, context))
        task.add_done_callback(partial(self._warmed, key))

    def tool_started(self, who: TrajectoryId, tool: str) -> None:
        """Pass on that a tool begins."""
        if self._options.predicts:  # nobody else wants to know
            self._link.post("tool_started", ToolStart(who, tool))

    def trajectory_ended(self, end: TrajectoryEnd) -> None:
        """Pass on how a trajectory's life ended."""
        self._drop_warming(end.trajectory.key)
        self._limits.pop(end.trajectory.key, None)
        self._link.ended(end.trajectory.key)
        self._link.post("trajectory_ended", end)

    def flush(self) -> None:
        """Send the router every pending event: a step may be over."""
        self._link.flush()


class HeddleAsyncClient(FullyAsyncLLMServerClient, HeddleClient):
    """For the asynchronous trainers: verl's own loop, which goes on with what a weight update has aborted, around each leg of which is
    `HeddleClient`, next in the order of methods."""

    async def generate(self, request_id: str, **kwargs: Any) -> Any:
        """One generation, over all its legs; see `FullyAsyncLLMServerClient.generate`."""
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


def _outside(request_id: str, worker: str) -> TrajectoryId:
    """Identity of a request from outside any agent loop (reward code that generates, say): it teaches the predictor nothing."""
    return TrajectoryId(prompt="", uid=request_id, sample=worker, step=-1, validate=True)
