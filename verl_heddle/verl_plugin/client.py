"""The worker's end of a turn: ask the router, call the engine, time both, and route alone if the router is gone.

One RPC to the router stands before each generation; everything told to it afterwards is fire-and-forget.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from verl.workers.rollout.llm_server import LLMServerClient
from verl.workers.rollout.router import GlobalRequestLoadBalancer

from verl_heddle.options import Options
from verl_heddle.traces.recorder import EngineTimes, Recorder
from verl_heddle.trajectory import Decision, Reason, ToolStart, TrajectoryEnd, TrajectoryId, TurnEnd, TurnStart
from verl_heddle.verl_plugin.calls import ServerHandle, answer
from verl_heddle.verl_plugin.live import CURRENT
from verl_heddle.verl_plugin.replicas import FIELD
from verl_heddle.verl_plugin.voice import say_once


@dataclass(slots=True)
class _Call:
    """One `generate` under way: filled in by `_acquire_server`, read when the engine has answered."""

    recorder: Recorder | None
    turn: TurnStart | None = None
    decision: Decision | None = None
    asked_s: float = 0.0
    sent_s: float = 0.0
    held_s: float = 0.0


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
        super().__init__(config, load_balancer_handle)
        self._servers = dict(servers)
        self._options = options
        self._local: GlobalRequestLoadBalancer | None = None
        rollout = config.actor_rollout_ref.rollout
        self._priorities = rollout.name == "vllm" and rollout.get("scheduling_policy") == "priority"
        self._names = not rollout.get("full_determinism", False)  # then verl names requests itself, the same in every run
        self.counts: Counter[str] = Counter()
        """What went wrong and was got around, by name."""

    async def generate(self, request_id: str, **kwargs: Any) -> Any:
        """One turn; see `LLMServerClient.generate`."""
        call = _Call(CURRENT.get())
        _CALL.set(call)
        tokens, completed, engine_s = 0, False, None
        try:
            output = await super().generate(request_id, **kwargs)
            tokens, completed = len(output.token_ids), output.stop_reason != "aborted"
            told = output.extra_fields.pop(FIELD, None)
            if call.recorder is not None and call.decision is not None and call.turn is not None:
                times = EngineTimes(cached_tokens=output.extra_fields.get("num_cached_tokens"), **told) if told else None
                moments = (call.asked_s, call.sent_s, time.monotonic())
                call.recorder.turn_done(call.turn.context_tokens, tokens, call.decision, *moments, times, call.held_s)
                engine_s = call.recorder.turns[-1].gen_s
            return output
        finally:
            if call.turn is not None and call.decision is not None:
                turn = call.turn
                end = TurnEnd(turn.trajectory, turn.conversation, call.decision.replica, turn.turn, tokens, completed, engine_s)
                self.tell("turn_finished", end)

    async def _acquire_server(self, request_id: str, **extra: Any) -> tuple[str, Any]:
        call = _CALL.get()
        recorder, call.asked_s = call.recorder, time.monotonic()
        if recorder is not None:
            recorder.turn_asked(call.asked_s)
        turns = recorder.turns if recorder else []
        turn = TurnStart(
            trajectory=recorder.id if recorder else _nobody(request_id),
            conversation=request_id,
            turn=len(turns),
            context_tokens=len(extra["prompt_ids"]),
            generated_tokens=recorder.output_tokens if recorder else 0,
            tool_s=turns[-1].tool_latency_s if turns else None,
            text=recorder.text if recorder and not turns else None,
        )
        try:
            decision = await self._decide(turn)
        except asyncio.CancelledError:
            self.tell("turn_withdrawn", turn)
            raise
        call.turn, call.decision = turn, decision
        if decision.held:
            since = time.monotonic()
            await self._wait_for_turn(turn)
            call.held_s = time.monotonic() - since
        call.sent_s = time.monotonic()
        arguments: dict[str, Any] = {"request_id": turn.request} if self._names else {}
        if self._priorities and decision.priority:
            arguments["priority"] = decision.priority
        deadline = self._options.deadlines.cancel_s
        return decision.replica, ServerHandle(self._servers[decision.replica], arguments, deadline, self._cancel_lost)

    async def _decide(self, turn: TurnStart) -> Decision:
        if self._local is None:
            try:
                return await self._ask(turn)
            except RuntimeError:
                raise  # "No available servers": verl's own error, and verl's own clients know it
            except Exception as error:
                self._go_local(error)
        self.counts["fallback_router"] += 1
        assert self._local is not None
        replica, _ = self._local.acquire_server(turn.conversation)
        return Decision(replica, 0, Reason.FALLBACK_ROUTER)

    async def _wait_for_turn(self, turn: TurnStart) -> None:
        """Until the router lets a held turn in; one that is not let in in time goes all the same."""
        deadline = self._options.admission.hold_s + self._options.deadlines.router_s
        try:
            await answer(self._load_balancer.wait_for_turn.remote(turn.request), deadline)
        except Exception as error:
            self.counts["hold_lost"] += 1
            say_once(f"a turn that was held back was never let in ({type(error).__name__}: {error}); it goes without")

    async def _ask(self, turn: TurnStart) -> Decision:
        deadline = self._options.deadlines.router_s
        decision = await answer(self._load_balancer.turn_started.remote(turn), deadline)
        if decision.replica not in self._servers:
            self._servers = await answer(self._load_balancer.handles.remote(), deadline)
        if decision.replica not in self._servers:
            raise LookupError(f"the router chose {decision.replica}, which it does not list")
        return decision

    def _release_server(self, server_id: str, request_id: str | None = None) -> None:
        if self._local is not None:
            self._local.release_server(server_id)

    def _go_local(self, error: Exception) -> None:
        """From now on this worker applies verl's rule by itself, to what it sends itself."""
        if self._local is None:
            say_once(f"router lost ({type(error).__name__}: {error}); this worker goes on under verl's own rule")
            self._local = GlobalRequestLoadBalancer(self._servers)

    def router_is_back(self) -> None:
        """Trust the router again (told by the manager once it has answered)."""
        self._local = None

    def _cancel_lost(self) -> None:
        self.counts["cancel_lost"] += 1
        say_once(f"a cancelled request was still running after {self._options.deadlines.cancel_s:g} s (heddle.deadlines.cancel_s)")

    def tell(self, method: str, *args: Any) -> None:
        """Tell the router something without waiting; a dead router is found out by the next question."""
        if self._local is None:
            try:
                getattr(self._load_balancer, method).remote(*args)
            except Exception as error:
                self._go_local(error)

    def tool_started(self, who: TrajectoryId, tool: str) -> None:
        """Pass on that a tool begins."""
        self.tell("tool_started", ToolStart(who, tool))

    def trajectory_ended(self, end: TrajectoryEnd) -> None:
        """Pass on how a trajectory's life ended."""
        self.tell("trajectory_ended", end)


def _nobody(request_id: str) -> TrajectoryId:
    """Identity of a request from outside any agent loop (reward code that generates, say): it teaches the predictor nothing."""
    return TrajectoryId(prompt="", uid=request_id, sample=0, step=-1, validate=True)
