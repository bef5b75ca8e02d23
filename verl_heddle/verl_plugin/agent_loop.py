"""The agent-loop workers: verl's own, which also identify and record every trajectory.

Records stay in their worker until the trainer's process collects them at the end of a step (`collect`), so they do not depend on the
router.
"""

from __future__ import annotations

import asyncio
import time
from contextvars import ContextVar
from functools import partial
from typing import Any

import transfer_queue as tq
from verl.experimental.agent_loop import AgentLoopWorker
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopWorkerTQ

from verl_heddle.options import Options
from verl_heddle.shape.groups import Visit
from verl_heddle.traces.columns import Columns
from verl_heddle.traces.recorder import Recorder
from verl_heddle.trajectory import Outcome, Trajectory, TrajectoryEnd, TrajectoryId
from verl_heddle.verl_plugin.live import CURRENT, watch_tool
from verl_heddle.verl_plugin.log import log_once
from verl_heddle.verl_plugin.prompts import OWN_COUNT, Facts, facts_of, is_plain
from verl_heddle.verl_plugin.settings import options_of
from verl_heddle.verl_plugin.shaping import SHARE, Selection
from verl_heddle.verl_plugin.tool_watchdog import Watchdog

FACTS: ContextVar[Facts] = ContextVar("heddle_prompt")
"""Facts of the current prompt: set in its task, inherited by the tasks of its samples."""


class HeddleWorker(AgentLoopWorkerTQ.__ray_actor_class__):  # type: ignore[misc, name-defined]
    """verl's worker; identifies and records its trajectories, and can cancel them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Not the parent's __init__: Ray pickles its anonymous class by value, which breaks the zero-argument super() in it.
        AgentLoopWorker.__init__(self, *args, **kwargs)
        tq.init()
        self.background_tasks: set[asyncio.Task] = set()
        self._options: Options = options_of(self.config)
        self._model = str(self.config.actor_rollout_ref.model.path)
        self._records: list[Trajectory] = []
        self._running: dict[str, asyncio.Task] = {}
        rollout = self.config.actor_rollout_ref.rollout
        self._most_tokens = int(rollout.response_length)
        self._most_turns = rollout.multi_turn.get("max_assistant_turns") or float("inf")
        self._selection = Selection(int(rollout.n), self.llm_client.limit, self._options.deadlines.cancel_s)
        guard = (lambda tool: tool) if self._options.observe else Watchdog(self._options.tools, self.llm_client.counts).guard
        for tool in self.tools:  # wrapped in place
            try:
                watch_tool(guard(tool))
            except Exception as error:
                self._odd("tool", error)

    async def _run_prompt(self, prompt: dict, sampling_params: dict[str, Any], trajectory: dict[str, Any], **kwargs: Any) -> None:
        share = prompt.pop(SHARE, None)
        try:  # an exception before verl's own method would leave the prompt pending for ever
            FACTS.set(await self._facts(prompt.get("raw_prompt")))
            if share is not None:
                self._selection.opened(str(prompt["uid"]), FACTS.get().digest, share)
        except Exception as error:
            prompt.pop(OWN_COUNT, None)
            self._odd("prompt", error)
        await super()._run_prompt(prompt, sampling_params, trajectory, **kwargs)

    async def _facts(self, raw_prompt: Any) -> Facts:
        """Facts of a prompt, for all its samples; images are hashed off the event loop."""
        return facts_of(raw_prompt) if is_plain(raw_prompt) else await asyncio.to_thread(facts_of, raw_prompt)

    async def _run_agent_loop(self, sampling_params: dict[str, Any], trajectory: dict[str, Any], **kwargs: Any) -> Any:
        facts = FACTS.get(None) or facts_of(kwargs.get("raw_prompt"))
        identity = TrajectoryId(
            prompt=facts.digest,
            uid=str(kwargs.get("uid")),
            sample=_sample(kwargs.get("session_id")),
            step=_integer(trajectory.get("step")),
            validate=bool(trajectory.get("validate")),
        )
        life = self._live(identity, facts.text, sampling_params, trajectory, **kwargs)
        return await (self._selection.live(identity.key, life) if identity.key in self._selection else life)

    async def _live(
        self, identity: TrajectoryId, text: str | None, sampling_params: dict[str, Any], trajectory: dict[str, Any], **kwargs: Any
    ) -> Any:
        recorder = Recorder(identity, time.monotonic(), time.time(), text=text)
        recorder.listener = partial(self.llm_client.tool_started, identity)
        recorder.counter = partial(self._selection.generated, identity.key)
        CURRENT.set(recorder)
        task = asyncio.current_task()
        assert task is not None
        self._running[identity.key] = task
        outcome = Outcome.FAILED
        try:
            result = await super()._run_agent_loop(sampling_params, trajectory, **kwargs)
            outcome = Outcome.FINISHED
            return result
        except asyncio.CancelledError:
            outcome = Outcome.CANCELLED
            raise
        finally:
            self._running.pop(identity.key, None)
            self._ended(recorder, outcome)

    async def _agent_loop_postprocess(self, output: Any, validate: bool, **kwargs: Any) -> Any:
        recorder = CURRENT.get()
        outputs = output if isinstance(output, list) else [output]
        if recorder is None or not outputs:
            return await super()._agent_loop_postprocess(output, validate, **kwargs)
        final, key = outputs[-1], recorder.id.key
        self._note_output(recorder, final)
        if key in self._selection:
            await self._compute_score(outputs, kwargs=kwargs)  # verl's own call below keeps an existing score
            recorder.reward = self._reward(final)
        # A row half written to the transfer queue would crash the trainer later: not cancellable from here on.
        self._running.pop(key, None)
        if key in self._selection:
            record = self._ended(recorder, Outcome.FINISHED)
            if not await self._selection.is_kept(key, recorder.output_tokens, recorder.truncated, recorder.reward):
                return None
            if record is not None:
                record.meta["kept"] = True
        result = await super()._agent_loop_postprocess(output, validate, **kwargs)
        recorder.reward = self._reward(final)
        return result

    def _note_output(self, recorder: Recorder, final: Any) -> None:
        """Copy facts of the agent loop's output into the record; an unexpected output is counted and left to verl."""
        recorder.scoring_from_s = time.monotonic()
        try:
            recorder.prompt_tokens = len(final.prompt_ids)
            recorder.truncated = len(final.response_ids) >= self._most_tokens or len(recorder.turns) >= self._most_turns
        except Exception as error:
            self._odd("record", error)

    def _reward(self, final: Any) -> float | None:
        try:
            return None if final.reward_score is None else float(final.reward_score)
        except Exception as error:  # the row may be written already, so the session must not fail
            self._odd("record", error)
            return None

    def _odd(self, name: str, error: Exception) -> None:
        """Count and log a failure of ours that does not stop the prompt or trajectory."""
        self.llm_client.counts[name] += 1
        log_once(f"a {name} is not as expected ({type(error).__name__}: {error}); it continues as in stock verl")

    def _ended(self, recorder: Recorder, outcome: Outcome) -> Trajectory | None:
        """Record a finished trajectory, once. Errors here are counted only, since book-keeping must not fail a trajectory."""
        if recorder.booked:
            return None
        recorder.booked = True
        try:
            end = TrajectoryEnd(recorder.id, outcome, recorder.output_tokens, len(recorder.turns), recorder.truncated)
            self.llm_client.trajectory_ended(end)
            workload = self._options.trace.workload
            record = recorder.finish(outcome, time.monotonic(), time.time(), "verl", workload, self._model)
            if recorder.id.key in self._selection:
                record.meta["kept"] = False
            self._records.append(record)
            return record
        except Exception as error:
            self._odd("record", error)
            return None

    async def cancel_trajectory(self, uid: str, sample: int) -> bool:
        """Cancel a trajectory, its tools and its vLLM request. False if it is not running or is already being written.

        verl marks the prompt's group as failed, as for any trajectory that does not return.
        """
        task = self._running.get(f"{uid}_{sample}")
        return task is not None and task.cancel()

    async def running(self) -> list[tuple[str, int]]:
        """(uid, sample) of the trajectories that can be cancelled."""
        return [(uid, int(sample)) for uid, sample in (key.rsplit("_", 1) for key in self._running)]

    async def collect(self) -> tuple[Columns, dict[str, int], list[Visit]]:
        """Records and closed groups since the last call, and counts of failures since the start."""
        self.llm_client.flush()
        records, self._records = self._records, []
        visits = self._selection.take()
        return Columns.of(records), {**self.llm_client.counts, "selection": self._selection.failures}, visits

    async def router_is_back(self) -> None:
        """The router answers the manager again."""
        self.llm_client.router_is_back()

    async def servers_are(self, servers: dict[str, Any]) -> None:
        """The replicas in rotation changed."""
        self.llm_client.servers_are(servers)


def _integer(value: Any) -> int:
    """A step; -1 if it is not a number."""
    try:
        return int(value)
    except (TypeError, ValueError):
        return -1


def _sample(value: Any) -> int | str:
    """A sample's number, as in verl, or the name a custom worker gave it."""
    try:
        return int(value)
    except (TypeError, ValueError):
        return str(value)
