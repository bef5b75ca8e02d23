"""Play trajectories of given lengths on real engines under a policy of the simulator: the same object decides in both.

A `Policy` (`verl_heddle.simulate.policy`) gets the events that `simulate` gives it, on the wall clock, and its answers are carried out:
turns go to the replica it names with its priority, held turns wait until admitted, `Prewarm` is a one-token request on the target while
the tool runs, `Cancel` cancels the trajectory's task, which aborts its request inside vLLM. A turn is one `generate` of a fixed number of
tokens; the conversation grows by what was generated and by new ids, so prefix caches find what they would find in a rollout; a tool is a
sleep.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from bench.gpu.engines import Handle, words
from verl_heddle.fleet import Replica
from verl_heddle.simulate import Cancel, Policy, Prewarm
from verl_heddle.traces.recorder import EngineTimes, Recorder
from verl_heddle.trajectory import Decision, Outcome, ToolStart, Trajectory, TrajectoryEnd, TrajectoryId, TurnEnd, TurnStart


class Play:
    """One step of rollouts under way. Everything runs in one event loop, so the policy's calls are serialised as it asks."""

    def __init__(self, engines: Mapping[str, Handle], fleet: Sequence[Replica], policy: Policy, vocabulary: int, step: int) -> None:
        self._engines, self._policy, self._vocabulary, self._step = engines, policy, vocabulary, step
        self._began = time.monotonic()
        self._tasks: dict[str, asyncio.Task[Trajectory]] = {}
        self._cancelled: set[str] = set()
        self._held: dict[str, asyncio.Event] = {}
        self._contexts: dict[str, list[int]] = {}
        self._in_tool: set[str] = set()
        self._warming: dict[str, asyncio.Task[Any]] = {}
        self.prewarms = 0
        policy.replicas_added(fleet)

    async def run(self, items: Sequence[Trajectory]) -> list[Trajectory]:
        """All trajectories, submitted at once in this order; their records in the same order."""
        tasks = []
        for item in items:
            who = TrajectoryId(item.prompt_id, f"{self._step}:{item.prompt_id}", item.trial, self._step)
            task = asyncio.create_task(self._episode(item, who))
            self._tasks[who.key] = task
            tasks.append(task)
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            left = [task for task in (*tasks, *self._warming.values()) if not task.done()]
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)

    @property
    def _now(self) -> float:
        return time.monotonic() - self._began

    async def _episode(self, item: Trajectory, who: TrajectoryId) -> Trajectory:
        recorder = Recorder(who, time.monotonic(), time.time(), prompt_tokens=item.prompt_tokens)
        outcome = Outcome.FINISHED
        try:
            await self._turns(item, who, recorder)
        except asyncio.CancelledError:
            if who.key not in self._cancelled:
                raise
            outcome = Outcome.CANCELLED
        self._contexts.pop(who.key, None)
        ended = TrajectoryEnd(who, outcome, recorder.output_tokens, len(recorder.turns))
        self._act(self._policy.trajectory_ended(ended, self._now))
        self._refresh()
        return recorder.finish(outcome, time.monotonic(), time.time(), "replay", item.workload, "random")

    async def _turns(self, item: Trajectory, who: TrajectoryId, recorder: Recorder) -> None:
        context = self._contexts[who.key] = words(f"{self._step} {item.prompt_id}", item.prompt_tokens or 1, self._vocabulary)
        tool_s: float | None = None
        for index, turn in enumerate(item.steps):
            context += words(f"{self._step} {who.key} {index}", turn.input_tokens or 0, self._vocabulary)
            start = TurnStart(who, who.key, index, len(context), recorder.output_tokens, tool_s)
            tool_s = turn.tool_latency_s
            await self._turn(start, context, turn.output_tokens or 1, recorder, bool(tool_s))
            if tool_s:
                await self._tool(who, turn.tool or "sleep", tool_s, recorder)

    async def _turn(self, start: TurnStart, context: list[int], tokens: int, recorder: Recorder, tool_follows: bool) -> None:
        asked = time.monotonic()
        recorder.turn_asked(asked)
        decision: Decision = self._policy.turn_started(start, self._now)
        made, engine_s = 0, None
        try:
            if decision.held:
                gate = self._held[start.request] = asyncio.Event()
                self._let_in()
                await gate.wait()
            sent = time.monotonic()
            answer = await self._engines[decision.replica].generate(context, tokens, start.request, decision.priority)
            made, engine_s = len(answer.token_ids), max(0.0, answer.call_s - answer.queue_s)
        finally:
            self._held.pop(start.request, None)
            end = TurnEnd(start.trajectory, start.conversation, decision.replica, start.turn, made, made == tokens, engine_s)
            if made:
                times = EngineTimes(answer.call_s, answer.queue_s, answer.preemptions, answer.cached_tokens)
                held_s = sent - asked if decision.held else 0.0
                recorder.turn_done(len(context), made, decision, asked, sent, time.monotonic(), times, held_s)
                context += answer.token_ids
                if tool_follows:
                    self._in_tool.add(start.trajectory.key)
            self._act(self._policy.turn_finished(end, self._now))
            self._in_tool.discard(start.trajectory.key)
            self._let_in()

    async def _tool(self, who: TrajectoryId, name: str, seconds: float, recorder: Recorder) -> None:
        self._in_tool.add(who.key)
        begun = time.monotonic()
        if (told := getattr(self._policy, "tool_started", None)) is not None:
            told(ToolStart(who, name), self._now)
        try:
            await asyncio.sleep(seconds)
        finally:
            self._in_tool.discard(who.key)
            recorder.tool_ran(name, begun, time.monotonic())
            if (warming := self._warming.pop(who.key, None)) is not None and not warming.done():
                warming.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await warming

    def _act(self, actions: Iterable[Any] | None) -> None:
        for action in actions or ():
            if isinstance(action, Cancel):
                task = self._tasks.get(action.trajectory)
                if task is not None and not task.done() and task is not asyncio.current_task():
                    self._cancelled.add(action.trajectory)
                    task.cancel()
            elif isinstance(action, Prewarm) and action.trajectory in self._in_tool and action.trajectory not in self._warming:
                self.prewarms += 1
                self._warming[action.trajectory] = asyncio.create_task(self._warm(action))

    async def _warm(self, action: Prewarm) -> None:
        request = f"{action.trajectory}:warm{self.prewarms}"
        await self._engines[action.replica].generate(list(self._contexts[action.trajectory]), 1, request, action.priority)
        if (told := getattr(self._policy, "transferred", None)) is not None:
            self._act(told(action.trajectory, self._now))

    def _let_in(self) -> None:
        if self._held and (admitted := getattr(self._policy, "admitted", None)) is not None:
            for request in admitted(self._now):
                if request in self._held:
                    self._held[request].set()

    def _refresh(self) -> None:
        """Hand changed priorities of turns under way to the engines, without waiting for their answers."""
        if (changed := getattr(self._policy, "reprioritised", None)) is not None:
            for replica, table in changed(self._now).items():
                task = asyncio.create_task(self._engines[replica].utility("heddle_set_priorities", table))
                task.add_done_callback(lambda done: done.cancelled() or done.exception())


def makespan_s(records: Sequence[Trajectory]) -> float:
    """First start to last end."""
    return max(item.meta["end_s"] for item in records) - min(item.meta["start_s"] for item in records)
