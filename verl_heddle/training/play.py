"""Plays a trainer over the simulated cluster: it asks for groups, takes complete ones, and interrupts them with weight updates.

Law. Inside a rollout, as `simulate.cluster`. A weight update pauses every engine, aborts its requests and wipes its caches. An aborted turn
is sent again after `RETRY_S` with the tokens it has, as the same turn; requests that reach a paused engine wait there. A group is complete
when all its trajectories are; a batch consists of the oldest complete groups.
Invariants: every group asked for is trained on once, dropped once, or in flight at the end; no trajectory of a trained group was cut.
Source: verl 0.9.1, `trainer/ppo/v1/trainer_{sync,colocate_async,separate_async}.py`, `replay_buffer.py`, `llm_server.py` (for `RETRY_S`).
Left out: the poll interval, validation, replicas that a trainer lends (`enable_switch`), and groups that fail.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

from verl_heddle.fleet import Replica
from verl_heddle.simulate.cluster import Cluster
from verl_heddle.simulate.options import EngineOptions
from verl_heddle.simulate.policy import Latency, Policy
from verl_heddle.simulate.stage import CHANGE, TURN
from verl_heddle.simulate.workload import Request, TrajectoryState, states
from verl_heddle.training.trainer import Run, Step, Trainer
from verl_heddle.trajectory import Outcome, Trajectory, TurnEnd

RETRY_S = 1.0
"""Seconds that verl's client waits before it sends an aborted request again."""

Condition = Callable[[], bool]


def train(
    groups: Sequence[Sequence[Trajectory]],
    fleet: Sequence[Replica],
    latency: Latency,
    policy: Policy,
    trainer: Trainer,
    engine: EngineOptions | None = None,
    skip: int = 0,
) -> Run:
    """Play a run.

    Args:
        groups: the trajectories of each prompt, with known lengths, in the order in which the trainer asks for them; enough for all steps
            and for dropped groups.
        skip: number of first steps to leave out of the results.

    Raises:
        ValueError: there are too few groups, or an input that `simulate` refuses.
    """
    return _Training(groups, fleet, latency, policy, trainer, engine or EngineOptions()).play(skip)


class _Group:
    """The samples of a prompt."""

    def __init__(self, samples: list[TrajectoryState]) -> None:
        self.samples = samples
        self.open = len(samples)
        self.step = 0
        """Training step that asked for it."""

    @property
    def tokens(self) -> int:
        return sum(state.generated for state in self.samples)


class _Training(Cluster):
    def __init__(
        self,
        groups: Sequence[Sequence[Trajectory]],
        fleet: Sequence[Replica],
        latency: Latency,
        policy: Policy,
        trainer: Trainer,
        options: EngineOptions,
    ) -> None:
        work = states([item for group in groups for item in group], options, 0)
        super().__init__(fleet, latency, policy, options, work)
        left = iter(work)
        self._to_ask = iter([_Group([next(left) for _ in group]) for group in groups])
        self._group_of: dict[str, _Group] = {}
        self._finished: list[_Group] = []
        self._in_flight = 0
        self._trainer = trainer
        self._steps: list[Step] = []
        self._wanted: Condition | None = None
        """The condition that the trainer waits for."""
        self._asked_tokens = self._asked = self._interrupted = self._dropped = 0
        self._over = False
        self._paused, self._resumed = getattr(policy, "paused", None), getattr(policy, "resumed", None)

    def play(self, skip: int) -> Run:
        """Play until the last step is trained."""
        training = self._train()
        self._go = partial(self._advance, training)
        self._at(0.0, CHANGE, self._go)
        while self._events and not self._over:
            self._next()
        if not self._over:
            raise RuntimeError(f"the run stopped in step {len(self._steps) + 1} with {self._in_flight} groups in flight")
        return Run(self._steps, self._asked_tokens / self._asked, skip)

    # --- the trainer ------------------------------------------------------------------------------------------------------

    def _advance(self, training: Iterator[float | Condition], now: float) -> None:
        """Run the trainer until it waits for some seconds or for a condition."""
        wish = next(training, None)
        if wish is None:
            self._over = True
        elif callable(wish):
            self._wanted = wish
            self._look()
        else:
            self._at(now + wish, CHANGE, self._go)

    def _look(self) -> None:
        """Continue the trainer if its condition holds."""
        if self._wanted is not None and self._wanted():
            self._wanted = None
            self._at(self._now, CHANGE, self._go)

    def _train(self) -> Iterator[float | Condition]:
        trainer = self._trainer
        parts = trainer.parameter_sync_step if trainer.mode == "separate_async" else 1
        self._ask(trainer.ahead, 1)
        for step in range(1, trainer.steps + 1):
            began, waited, recomputed = self._now, 0.0, sum(engine.recomputed for engine in self.engines)
            self._dropped = self._interrupted = 0
            self._ask(trainer.prompts, step)
            batch: list[_Group] = []
            for _ in range(parts):
                since = self._now
                yield partial(self._complete, trainer.prompts // parts, step)
                waited += self._now - since
                batch += self._batch(trainer.prompts // parts)
                if trainer.mode == "separate_async":
                    yield trainer.update_s / parts
            self._pause()
            yield trainer.transfer_s if trainer.mode == "separate_async" else trainer.update_s
            self._resume()
            self._steps.append(
                Step(
                    self._now - began,
                    waited,
                    sum(group.tokens for group in batch),
                    tuple(state.generated for group in batch for state in group.samples),
                    tuple(step - group.step for group in batch),
                    self._dropped,
                    sum(engine.recomputed for engine in self.engines) - recomputed,
                    self._interrupted,
                )
            )

    def _ask(self, prompts: int, step: int) -> None:
        for _ in range(prompts):
            group = next(self._to_ask, None)
            if group is None:
                raise ValueError(f"step {step} needs a prompt, but all groups have been used: pass more groups")
            group.step = step
            self._in_flight += 1
            for state in group.samples:
                self._group_of[state.key] = group
                self._asked += 1
                self._asked_tokens += sum(turn.output_tokens or 0 for turn in state.steps)
                state.start_s = state.end_s = self._now
                state.id = replace(state.id, step=step)
                self._at(self._now + self._overhead_s, TURN, state)

    def _complete(self, prompts: int, step: int) -> bool:
        """Whether a batch can be taken; drops groups that are too stale for it."""
        trainer = self._trainer
        if trainer.threshold is not None and not trainer.sync:
            if trainer.strategy == "drop":
                stale = [group for group in self._finished if step - group.step + 1 > trainer.threshold]
                for group in stale:
                    self._finished.remove(group)
                    self._dropped += group.tokens
                self._ask(len(stale), step)
            elif any(group.open and step - group.step + 1 >= trainer.threshold for group in self._group_of.values()):
                return False
        return len(self._finished) >= prompts

    def _batch(self, prompts: int) -> list[_Group]:
        self._finished.sort(key=lambda group: group.step)
        batch, self._finished = self._finished[:prompts], self._finished[prompts:]
        return batch

    # --- weight updates ---------------------------------------------------------------------------------------------------

    def _pause(self) -> None:
        now = self._now
        for engine in self.engines:
            if self._paused is not None:
                self._paused(engine.replica.name, now)
        for engine in self.engines:
            gone = [engine.queue.pop() for _ in range(engine.queue.count)]
            for request in gone:
                request.queue_s += now - request.queued_s
            gone += [request for request in list(engine.running) if engine.abort(request, now)]
            engine.pause(now, keep_cache=False)
            self._wake_later(engine)
            for request in gone:
                self._left(request, now)

    def _resume(self) -> None:
        for engine in self.engines:
            engine.resume(self._now)
            self._wake_later(engine)
            if self._resumed is not None:
                self._resumed(engine.replica.name, self._now)
        self._let_in(self._now)

    def _left(self, request: Request, now: float) -> None:
        if not request.left:
            super()._left(request, now)
            return
        state, made = request.trajectory, request.asked - request.left
        name = self.engines[request.engine].replica.name
        facts = (state.id, state.key, name, state.turn, made - request.told, False, self._engine_s(request, now))
        self._policy.turn_finished(TurnEnd(*facts, before_tokens=request.told, interrupted=True), now)
        request.told = made
        self._interrupted += 1
        self._let_in(now)
        self._at(now + RETRY_S, CHANGE, partial(self._go_on, request))

    def _go_on(self, before: Request, now: float) -> None:
        """Start the next leg of a turn, as a new request, because engines identify requests by object."""
        request = before.trajectory.request = Request(before.trajectory, before.context, before.left, before.known)
        for name in ("asked", "told", "start_s", "queue_s", "prefill_s", "preemptions", "recomputed", "cached"):
            setattr(request, name, getattr(before, name))
        self._place(request, now)

    def _end(self, state: TrajectoryState, outcome: Outcome, now: float) -> None:
        super()._end(state, outcome, now)
        group = self._group_of.pop(state.key)
        group.open -= 1
        if not group.open:
            self._in_flight -= 1
            self._finished.append(group)
            self._look()
