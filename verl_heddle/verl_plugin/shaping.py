"""Runs shaping on verl: the manager allots spare samples before a step (`Planner`), each worker selects among those it runs (`Selection`).

verl's worker starts as many samples of a prompt as the batch's `__rollout_n__` says, waits until all have settled, and publishes the group.
So spare samples need only that column. A group gets exactly n rows by three rules: a sample that is not kept returns without writing its
row; a failed sample is ignored if n others are kept; and a sample that can no longer be kept is cancelled, in engine and tools, and settles
as if it had returned. No sample is cancelled while its row is being written, because a half-written row ends the run.

A verdict needs only the group, and all samples of a prompt run in one worker. So no verdict waits for a different process, and shaping
works without the router.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from verl.utils import tensordict_utils as tu

from verl_heddle.fleet import Replica
from verl_heddle.options import Shape
from verl_heddle.place.pace import Habit, Latency, habit_of
from verl_heddle.shape.groups import Groups, Verdict, Visit
from verl_heddle.shape.plan import Share
from verl_heddle.shape.select import Fate
from verl_heddle.shape.shaper import Shaper, fleet_of
from verl_heddle.trajectory import Trajectory
from verl_heddle.verl_plugin.calls import cancellations_settled
from verl_heddle.verl_plugin.log import log_once
from verl_heddle.verl_plugin.prompts import OWN_COUNT, Facts, facts_of_batch, own_count, validates

SHARE = "heddle_share"
"""Column of the batch: each prompt's `Share`, None if shaping does not apply."""


class Planner:
    """The manager's half: decides how many samples each prompt gets.

    Args:
        size: n, the rows per prompt that the trainer gets.
        cap_tokens: most tokens that a trajectory may generate.
    """

    def __init__(self, shape: Shape, size: int, cap_tokens: int) -> None:
        self._shape, self._size = shape, size
        self.shaper = Shaper(shape, size, cap_tokens)
        self.latency: Latency | None = None
        """Step times of the engines; None until they are known."""
        self._habit = Habit()

    def share_out(self, prompts: Any, replicas: Sequence[Replica], facts: Sequence[Facts] | None = None) -> Any:
        """A copy of the batch with a share for each prompt that is sampled n times; a validation batch is returned unchanged.

        `facts`: the result of `facts_of_batch`, if already computed.
        """
        if validates(prompts):
            return prompts
        counts = [own_count(prompts, row) for row in range(len(prompts))]
        rows = [row for row, own in enumerate(counts) if own is None or own == self._size]
        known = facts_of_batch(prompts) if facts is None else facts
        names = [known[row].digest for row in rows]
        most = int(self._shape.most * self._size) * len(prompts)
        fleet = None if self.latency is None or not replicas else fleet_of(self.latency, replicas, self._habit, most)
        plan = self.shaper.plan(int(prompts["global_steps"]), names, fleet)
        shares: list[Share | None] = [None] * len(prompts)
        for row, share in zip(rows, plan.shares, strict=True):
            shares[row], counts[row] = share, share.samples
        made = prompts.copy()
        tu.assign_non_tensor_stack(made, SHARE, shares)
        if plan.shares:
            tu.assign_non_tensor_stack(made, OWN_COUNT, counts)
        return made

    def step_ended(self, step: int, records: Sequence[Trajectory], visits: Sequence[Visit]) -> dict[str, float]:
        """Learn from a step; returns metrics, named without prefix."""
        self._habit = habit_of(records) or self._habit
        return self.shaper.step_ended(step, visits)


@dataclass(slots=True)
class _Sample:
    """A sample whose group has not been taken yet."""

    uid: str
    kept: asyncio.Future[bool]
    """Resolves, once it is certain, to whether its row is written."""
    tokens: int = 0
    task: asyncio.Task[Any] | None = None
    stopped: bool = False
    """A verdict has cancelled it."""
    ended: bool = False
    """It has ended and waits for `kept`."""


class Selection:
    """A worker's half: decides which samples of a group are kept, dropped or stopped.

    Args:
        size: as in `Planner`.
        limit: called with limits by trajectory key: the generated tokens beyond which a sample is no longer needed.
        cancel_s: time limit for the engines to release a stopped sample.
    """

    def __init__(self, size: int, limit: Callable[[dict[str, int]], None], cancel_s: float) -> None:
        self._size, self._groups = size, Groups(size)
        self._limit, self._cancel_s = limit, cancel_s
        self._samples: dict[str, _Sample] = {}
        self._full: dict[str, asyncio.Future[bool]] = {}
        """By uid: resolves, when the group closes, to whether it has its n rows."""
        self._given_up: set[str] = set()
        """Groups (uid) whose rule has failed."""
        self.failures = 0

    def __contains__(self, key: str) -> bool:
        return key in self._samples

    def opened(self, uid: str, prompt: str, share: Share) -> None:
        """Register a prompt's samples before they start."""
        keys = [f"{uid}_{sample}" for sample in range(share.samples)]
        self._groups.opened(uid, prompt, share, keys)
        loop = asyncio.get_running_loop()
        self._full[uid] = loop.create_future()
        self._samples.update((key, _Sample(uid, loop.create_future())) for key in keys)

    async def live(self, key: str, life: Coroutine[Any, Any, Any]) -> Any:
        """Run a sample's agent loop to its end. None if it was stopped, or failed and its group is full without it.

        Raises:
            Exception: the sample's own failure, if its group is short of rows.
        """
        sample = self._samples[key]
        sample.task = asyncio.create_task(life)
        try:
            return await sample.task
        except (Exception, asyncio.CancelledError) as error:
            if not sample.stopped:
                if await self._missed(key, sample):
                    raise
                log_once(f"a sample failed ({type(error).__name__}: {error}); its group is full without it")
            return None
        finally:
            if sample.stopped:  # the group must not be published while an engine still runs the sample
                await cancellations_settled(self._cancel_s)
                self._groups.stopped(key, sample.tokens)

    def generated(self, key: str, tokens: int) -> None:
        """Record the tokens that a sample has generated in all its turns so far. May cancel the calling task."""
        sample = self._samples.get(key)
        if sample is not None:
            sample.tokens = tokens
            self._ask(sample, lambda: self._groups.progress(key, tokens))

    async def is_kept(self, key: str, tokens: int, truncated: bool, reward: float | None) -> bool:
        """For a sample that has ended and has its reward: waits until it is certain whether its row is written, and returns that.

        It waits only for siblings, each of which ends by its own limits, and for no other process.
        """
        sample = self._samples[key]
        if not sample.kept.done():
            sample.tokens, sample.ended = tokens, True
            self._ask(sample, lambda: self._groups.finished(key, tokens, Fate.CUT if truncated else Fate.VALID, reward))
        return await sample.kept

    def take(self) -> list[Visit]:
        """Returns the closed groups and forgets them here."""
        self._full = {uid: full for uid, full in self._full.items() if not full.done()}
        self._samples = {key: sample for key, sample in self._samples.items() if sample.uid in self._full}
        self._given_up &= self._full.keys()
        try:
            return self._groups.take(forget=False)
        except Exception as error:
            self._failed(error)
            return []

    async def _missed(self, key: str, sample: _Sample) -> bool:
        """For a failed sample: waits for its group to close, returns whether it is short of rows. True if its verdict was already known."""
        if sample.kept.done():
            return True
        full = self._full[sample.uid]
        self._ask(sample, lambda: self._groups.finished(key, sample.tokens, Fate.USELESS))
        return not await full

    def _ask(self, sample: _Sample, event: Callable[[], Verdict]) -> None:
        """Apply the rule's verdict on an event. If the rule raises, its group goes on without it: the first n to end are kept."""
        if sample.uid not in self._given_up:
            try:
                return self._obey(sample, event())
            except Exception as error:
                self._failed(error)
                self._given_up.add(sample.uid)
        group = [other for other in self._samples.values() if other.uid == sample.uid]
        for other in group:
            if other.ended and not other.kept.done():
                kept = sum(known.kept.done() and not known.kept.cancelled() and known.kept.result() for known in group)
                other.kept.set_result(kept < self._size)
        if not self._full[sample.uid].done():
            self._full[sample.uid].set_result(False)  # from here verl's own rule applies: a failed sample fails its group

    def _failed(self, error: Exception) -> None:
        self.failures += 1
        log_once(f"a group goes on without selection ({type(error).__name__}: {error})")

    def _obey(self, sample: _Sample, verdict: Verdict) -> None:
        for key in verdict.stop:
            victim = self._samples[key]
            victim.stopped = True
            if victim.task is not None:
                victim.task.cancel()
        for key in verdict.keep:
            self._samples[key].kept.set_result(True)
        for key in verdict.drop + verdict.stop:
            self._samples[key].kept.set_result(False)
        if verdict.limits:
            self._limit(verdict.limits)
        if verdict.closed:
            self._full[sample.uid].set_result(not verdict.short)
