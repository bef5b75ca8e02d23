"""Shaping on verl: the manager shares out spare samples before a step (`Planner`), each worker selects among those it runs (`Selection`).

verl's worker starts as many samples of a prompt as the batch's `__rollout_n__` says, waits until all have settled, and publishes the group.
So spare samples need no more than that column, and a group of exactly n rows no more than this: a sample that is not kept returns without
writing its row, one that fails counts for nothing where n others are kept, and one that cannot be kept any more is cancelled, in engine and
tools, and settles as if it had returned. Nobody is cancelled once his row is being written, since a row half written ends the run.

The verdicts need the group only, and all of a prompt's samples run in one worker; so none waits for another process, and shaping goes on
without the router.
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
"""Column of the batch: each prompt's `Share`, None where shaping leaves it alone."""


class Planner:
    """The manager's half.

    Args:
        size: n, rows per prompt that the trainer gets.
        cap_tokens: most tokens a trajectory may generate.
    """

    def __init__(self, shape: Shape, size: int, cap_tokens: int) -> None:
        self._shape, self._size = shape, size
        self.shaper = Shaper(shape, size, cap_tokens)
        self.latency: Latency | None = None
        """Step times of the engines, once they are known."""
        self._habit = Habit()

    def share_out(self, prompts: Any, replicas: Sequence[Replica], facts: Sequence[Facts] | None = None) -> Any:
        """The batch with a share for each prompt that is sampled n times; a validation as it is. The batch given is not changed.

        `facts`: `facts_of_batch`, where they are known already.
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
        """Learn from a step; returns metrics without prefix."""
        self._habit = habit_of(records) or self._habit
        return self.shaper.step_ended(step, visits)


@dataclass(slots=True)
class _Sample:
    """One that may still be asked about: its group is not yet taken."""

    uid: str
    kept: asyncio.Future[bool]
    """Whether its row is to be written, once that is certain."""
    tokens: int = 0
    task: asyncio.Task[Any] | None = None
    stopped: bool = False
    """Told to."""
    ended: bool = False
    """Asks whether it is kept."""


class Selection:
    """A worker's half.

    Args:
        size: as in `Planner`.
        limit: takes tokens by trajectory key: of how many generated tokens each is of no more use.
        cancel_s: how long the engines may take to let go of a sample that was stopped.
    """

    def __init__(self, size: int, limit: Callable[[dict[str, int]], None], cancel_s: float) -> None:
        self._size, self._groups = size, Groups(size)
        self._limit, self._cancel_s = limit, cancel_s
        self._samples: dict[str, _Sample] = {}
        self._full: dict[str, asyncio.Future[bool]] = {}
        """By uid: whether the group, now closed, has its n rows."""
        self._given_up: set[str] = set()
        """Groups (uid) for which the rule failed."""
        self.failures = 0

    def __contains__(self, key: str) -> bool:
        return key in self._samples

    def opened(self, uid: str, prompt: str, share: Share) -> None:
        """A prompt's samples are about to start."""
        keys = [f"{uid}_{sample}" for sample in range(share.samples)]
        self._groups.opened(uid, prompt, share, keys)
        loop = asyncio.get_running_loop()
        self._full[uid] = loop.create_future()
        self._samples.update((key, _Sample(uid, loop.create_future())) for key in keys)

    async def live(self, key: str, life: Coroutine[Any, Any, Any]) -> Any:
        """Run a sample's agent loop to its end. None if it was stopped, or failed and is not missed.

        Raises:
            Exception: what it failed with, where its group is short of rows.
        """
        one = self._samples[key]
        one.task = asyncio.create_task(life)
        try:
            return await one.task
        except (Exception, asyncio.CancelledError) as error:
            if not one.stopped:
                if await self._missed(key, one):
                    raise
                log_once(f"a sample was lost ({type(error).__name__}: {error}); its group is full without it")
            return None
        finally:
            if one.stopped:  # the group is not published while an engine still works on it
                await cancellations_settled(self._cancel_s)
                self._groups.stopped(key, one.tokens)

    def generated(self, key: str, tokens: int) -> None:
        """A sample has generated so many tokens in all its turns so far. May cancel the task that calls."""
        one = self._samples.get(key)
        if one is not None:
            one.tokens = tokens
            self._ask(one, lambda: self._groups.progress(key, tokens))

    async def is_kept(self, key: str, tokens: int, truncated: bool, reward: float | None) -> bool:
        """A sample has ended, its reward is in: waits until it is certain whether its row is to be written.

        Siblings decide, each of which ends by its own limits; no other process is waited for.
        """
        one = self._samples[key]
        if not one.kept.done():
            one.tokens, one.ended = tokens, True
            self._ask(one, lambda: self._groups.finished(key, tokens, Fate.CUT if truncated else Fate.VALID, reward))
        return await one.kept

    def take(self) -> list[Visit]:
        """The groups that are closed, forgotten here."""
        self._full = {uid: full for uid, full in self._full.items() if not full.done()}
        self._samples = {key: one for key, one in self._samples.items() if one.uid in self._full}
        self._given_up &= self._full.keys()
        try:
            return self._groups.take(forget=False)
        except Exception as error:
            self._failed(error)
            return []

    async def _missed(self, key: str, one: _Sample) -> bool:
        """A sample is lost: whether its group is short of rows, once that is known. True if it was lost after it had been counted on."""
        if one.kept.done():
            return True
        full = self._full[one.uid]
        self._ask(one, lambda: self._groups.finished(key, one.tokens, Fate.USELESS))
        return not await full

    def _ask(self, one: _Sample, event: Callable[[], Verdict]) -> None:
        """Obey the rule's verdict on an event. If the rule raises, its group goes on without it: the first n to end are kept."""
        if one.uid not in self._given_up:
            try:
                return self._obey(one, event())
            except Exception as error:
                self._failed(error)
                self._given_up.add(one.uid)
        group = [other for other in self._samples.values() if other.uid == one.uid]
        for other in group:
            if other.ended and not other.kept.done():
                kept = sum(known.kept.done() and not known.kept.cancelled() and known.kept.result() for known in group)
                other.kept.set_result(kept < self._size)
        if not self._full[one.uid].done():
            self._full[one.uid].set_result(False)  # one that is lost is missed: verl's own rule

    def _failed(self, error: Exception) -> None:
        self.failures += 1
        log_once(f"a group goes on without selection ({type(error).__name__}: {error})")

    def _obey(self, of: _Sample, verdict: Verdict) -> None:
        for key in verdict.stop:
            one = self._samples[key]
            one.stopped = True
            if one.task is not None:
                one.task.cancel()
        for key in verdict.keep:
            self._samples[key].kept.set_result(True)
        for key in verdict.drop + verdict.stop:
            self._samples[key].kept.set_result(False)
        if verdict.limits:
            self._limit(verdict.limits)
        if verdict.closed:
            self._full[of.uid].set_result(not verdict.short)
