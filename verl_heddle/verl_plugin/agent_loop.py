"""The agent-loop manager and its workers: verl's own, with a trajectory's identity around each agent loop and a record of its life.

The manager lives in the task runner, the workers are Ray actors. Records stay in the worker that made them until the trainer's
process collects them at the end of a step (`collect`), so they do not depend on the router.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections import Counter
from functools import partial
from typing import Any

import ray
import transfer_queue as tq
from ray.exceptions import ActorDiedError
from verl.experimental.agent_loop import AgentLoopWorker
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopManagerTQ, AgentLoopWorkerTQ
from verl.utils.ray_utils import auto_await

from verl_heddle.options import Options
from verl_heddle.predict.text import MAX_CHARS
from verl_heddle.traces.recorder import Recorder
from verl_heddle.trajectory import Outcome, Trajectory, TrajectoryEnd, TrajectoryId, TurnStart
from verl_heddle.verl_plugin import checkpoint
from verl_heddle.verl_plugin.client import HeddleClient
from verl_heddle.verl_plugin.live import CURRENT, watch_tool
from verl_heddle.verl_plugin.settings import options_of
from verl_heddle.verl_plugin.step_times import StepTimes
from verl_heddle.verl_plugin.tool_watchdog import Watchdog
from verl_heddle.verl_plugin.voice import say, say_once

SINCE_START = ("preempted_", "recomputed_", "winners_", "refused_")
"""What of a scheduler's counts (`vllm_scheduler`) goes on counting; the others tell how things are now."""

CHARS_PER_TOKEN = 4
"""Of prompts, roughly: what is planned with until the agent loop has applied its chat template."""

MANAGER: HeddleAgentLoopManager | None = None
"""The manager of this process; the sampler, which verl builds in the same process, collects through it."""


class HeddleWorker(AgentLoopWorkerTQ.__ray_actor_class__):  # type: ignore[misc, name-defined]
    """verl's worker; every trajectory it runs is named, recorded and can be cancelled."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Not the parent's __init__: Ray pickles its nameless class by value, which breaks the zero-argument super() in it.
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
        guard = (lambda tool: tool) if self._options.observe else Watchdog(self._options.tools, self.llm_client.counts).guard
        self.tools = [watch_tool(guard(tool)) for tool in self.tools]

    async def _run_agent_loop(self, sampling_params: dict[str, Any], trajectory: dict[str, Any], **kwargs: Any) -> Any:
        identity = TrajectoryId(
            prompt=prompt_digest(kwargs.get("raw_prompt")),
            uid=str(kwargs["uid"]),
            sample=int(kwargs["session_id"]),
            step=int(trajectory["step"]),
            validate=bool(trajectory["validate"]),
        )
        recorder = Recorder(identity, time.monotonic(), time.time(), text=prompt_text(kwargs.get("raw_prompt")))
        recorder.listener = partial(self.llm_client.tool_started, identity)
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
        final = output[-1] if isinstance(output, list) and output else output
        if recorder is not None and final:
            recorder.scoring_from_s = time.monotonic()
            recorder.prompt_tokens = len(final.prompt_ids)
            recorder.truncated = len(final.response_ids) >= self._most_tokens or len(recorder.turns) >= self._most_turns
            # A row half written to the transfer queue would crash the trainer later: from here on there is no cancelling.
            self._running.pop(recorder.id.key, None)
        result = await super()._agent_loop_postprocess(output, validate, **kwargs)
        if recorder is not None and final and final.reward_score is not None:
            recorder.reward = float(final.reward_score)
        return result

    def _ended(self, recorder: Recorder, outcome: Outcome) -> None:
        """Book a life that is over. Book-keeping must not fail a trajectory, so whatever goes wrong here is counted only."""
        try:
            end = TrajectoryEnd(recorder.id, outcome, recorder.output_tokens, len(recorder.turns), recorder.truncated)
            self.llm_client.trajectory_ended(end)
            workload = self._options.trace.workload
            record = recorder.finish(outcome, time.monotonic(), time.time(), "verl", workload, self._model)
            self._records.append(record)
        except Exception as error:
            self.llm_client.counts["record"] += 1
            say_once(f"a trajectory could not be recorded ({type(error).__name__}: {error})")

    async def cancel_trajectory(self, uid: str, sample: int) -> bool:
        """Stop a trajectory: its tools are cancelled and its request leaves vLLM. False if it is not running or is being written already.

        verl marks the prompt's group as failed, as it does whenever a trajectory does not come back.
        """
        task = self._running.get(f"{uid}_{sample}")
        return task is not None and task.cancel()

    async def running(self) -> list[tuple[str, int]]:
        """(uid, sample) of the trajectories that can be cancelled now."""
        return [(uid, int(sample)) for uid, sample in (key.rsplit("_", 1) for key in self._running)]

    async def collect(self) -> tuple[list[Trajectory], dict[str, int]]:
        """Hand over the records made since the last call, and the counts of what went wrong since the start."""
        records, self._records = self._records, []
        return records, dict(self.llm_client.counts)

    async def router_is_back(self) -> None:
        """The manager has heard from the router."""
        self.llm_client.router_is_back()


class HeddleAgentLoopManager(AgentLoopManagerTQ):
    """verl's manager with our workers and client. See `AgentLoopManagerTQ` for the arguments."""

    def __init__(self, config: Any, llm_client: Any, *args: Any, **kwargs: Any) -> None:
        self.options = options_of(config)
        self.router = llm_client._load_balancer
        rollout = config.actor_rollout_ref.rollout
        self._shape = {
            "tp": int(rollout.tensor_model_parallel_size),
            "slots": int(rollout.max_num_seqs),
            "deterministic": bool(rollout.get("full_determinism", False)),
            "cap_tokens": int(rollout.response_length),
        }
        self.servers: dict[str, Any] = {}
        self._configure_router(self.options.deadlines.start_s)  # its process imports verl first
        self._samples = (int(rollout.n), int(rollout.val_kwargs.n))
        self._step_times = StepTimes(self._shape["tp"])
        checkpoint.restore(self, config)
        super().__init__(config, HeddleClient(config, self.router, self.servers, self.options), *args, **kwargs)
        self.agent_loop_workers_class = ray.remote(HeddleWorker)  # after super(), which sets verl's own
        self._plans = not self.options.observe and self.options.place.enable and len(self.servers) > 1
        self._router_lost = False
        self._silent = 0

    @classmethod
    @auto_await
    async def create(cls, *args: Any, **kwargs: Any) -> Any:
        """Start the workers; if anything of ours fails, verl's own manager takes the job."""
        global MANAGER
        try:
            instance = cls(*args, **kwargs)
            await instance._init_agent_loop_workers()
            MANAGER = instance
            return instance
        except Exception as error:
            say(f"OFF, training goes on under verl's own agent-loop manager: {type(error).__name__}: {error}")
            stock = AgentLoopManagerTQ(*args, **kwargs)
            await stock._init_agent_loop_workers()
            return stock

    def generate_sequences(self, prompts: Any) -> None:
        """Dispatch a batch; see `AgentLoopManagerTQ.generate_sequences`."""
        if self._router_lost:
            self._try_router()
        if self._plans:
            try:
                self.router.batch_expected.remote(first_turns(prompts, *self._samples))
            except Exception as error:
                say_once(f"trajectories are placed one by one, not as a batch ({type(error).__name__}: {error})")
        super().generate_sequences(prompts)

    def collect(self) -> tuple[list[Trajectory], Counter[str]]:
        """Records since the last call and counts since the start; a worker that is silent too long is left out and counted."""
        refs = [worker.collect.remote() for worker in self.agent_loop_workers]
        ready, late = ray.wait(refs, num_returns=len(refs), timeout=self.options.deadlines.collect_s)
        records: list[Trajectory] = []
        counts: Counter[str] = Counter()
        self._silent += len(late)
        for ref in ready:
            try:
                some, trouble = ray.get(ref, timeout=self.options.deadlines.collect_s)
            except Exception as error:
                say_once(f"a worker's records are lost ({type(error).__name__})")
                self._silent += 1
                continue
            records += some
            counts.update(trouble)
        counts["worker_silent"] = self._silent
        self._router_lost = self._router_lost or counts["fallback_router"] > 0
        return records, counts

    def step_ended(self, step: int, records: list[Trajectory]) -> dict[str, float]:
        """Tell the router that the batch of a training step is complete; returns its counts since the start of the run."""
        if self._plans:
            self._step_times.learn(records, self.router.step_times_known.remote)
        try:
            return ray.get(self.router.step_ended.remote(step), timeout=self.options.deadlines.router_s)
        except Exception:
            self._router_lost = True
            return {}

    def engine_counts(self) -> Counter[str]:
        """What the engines' schedulers have counted since they started, all together; a silent engine counts nothing."""
        refs = {server.heddle_counts.remote(): name for name, server in self.servers.items()}
        ready, _ = ray.wait(list(refs), num_returns=len(refs), timeout=self.options.deadlines.collect_s)
        total: Counter[str] = Counter()
        for ref in ready:
            try:
                counts = ray.get(ref, timeout=self.options.deadlines.collect_s)
                total.update({name: count for name, count in counts.items() if name.startswith(SINCE_START)})
            except ActorDiedError:  # perhaps nobody had a request there
                del self.servers[refs[ref]]
                self.router.replica_lost.remote(refs[ref])
            except Exception as error:
                say_once(f"an engine does not tell its counts ({type(error).__name__}: {error})")
        return total

    def _configure_router(self, deadline_s: float) -> None:
        """Give the router the user's options and what the engines are like; servers that have died are told to it, if it has forgotten."""
        servers = ray.get(self.router.handles.remote(), timeout=deadline_s)
        held = {name: server.heddle_kv_tokens.remote() for name, server in servers.items()}
        kv_tokens, lost = [], []
        for name, ref in held.items():
            try:
                kv_tokens.append(ray.get(ref, timeout=deadline_s) or 0)
            except ActorDiedError:
                lost.append(name)
        least = min(kv_tokens, default=0) or None
        configured = self.router.configure.remote(self.options, **self._shape, kv_tokens=least, lost=lost)
        self.servers = ray.get(configured, timeout=deadline_s)

    def _try_router(self) -> None:
        """Between steps, see whether Ray has restarted the router; if so, set it up and send the workers back to it."""
        try:
            self._configure_router(self.options.deadlines.router_s)
        except Exception:
            return
        ray.get([worker.router_is_back.remote() for worker in self.agent_loop_workers], timeout=self.options.deadlines.collect_s)
        self._router_lost = False
        say("the router is back")


def first_turns(prompts: Any, samples: int, validation_samples: int) -> list[TurnStart]:
    """The first turns that verl's workers are about to start for a batch (`AgentLoopWorkerTQ._run_prompt`); `context_tokens` is a guess."""
    validate = bool(prompts["validate"]) if "validate" in prompts else False
    step = int(prompts["global_steps"])
    found = []
    for row in range(len(prompts)):
        raw_prompt = prompts["raw_prompt"][row]
        uid, own = str(prompts["uid"][row]), prompts["__rollout_n__"][row] if "__rollout_n__" in prompts else None
        prompt, text = prompt_digest(raw_prompt), prompt_text(raw_prompt)
        for sample in range(int(own) if own is not None else validation_samples if validate else samples):
            identity = TrajectoryId(prompt, uid, sample, step, validate)
            found.append(TurnStart(identity, identity.key, 0, len(text or "") // CHARS_PER_TOKEN, 0, text=text))
    return found


def prompt_text(raw_prompt: Any) -> str | None:
    """The words of a prompt's chat messages, as many as the predictor reads; None if there are none."""
    contents = [str(message.get("content", "")) for message in raw_prompt] if raw_prompt is not None else []
    return "\n".join(contents)[:MAX_CHARS] or None


def prompt_digest(raw_prompt: Any) -> str:
    """16 hex digits that are the same whenever the same chat messages come again, in any epoch or run."""
    messages = [dict(message) for message in raw_prompt] if raw_prompt is not None else []
    text = json.dumps(messages, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
