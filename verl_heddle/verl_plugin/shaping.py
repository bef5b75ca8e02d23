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
from verl_heddle.verl_plugin.prompts import OWN_COUNT, own_count, prompt_digest, validates
from verl_heddle.verl_plugin.voice import say_once

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

    def share_out(self, prompts: Any, replicas: Sequence[Replica]) -> Any:
        """The batch with a share for each prompt that is sampled n times; a validation as it is. The batch given is not changed."""
        if validates(prompts):
            return prompts
        counts = [own_count(prompts, row) for row in range(len(prompts))]
        rows = [row for row, own in enumerate(counts) if own is None or own == self._size]
        names = [prompt_digest(prompts["raw_prompt"][row]) for row in rows]
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


class Selection:
    """A worker's half.

    Args:
        size: as in `Planner`.
        limit: takes tokens by trajectory key: of how many generated tokens each is of no more use.
        cancel_s: how long the engines may take to let go of a sample that was stopped.
    """

    def __init__(self, size: int, limit: Callable[[dict[str, int]], None], cancel_s: float) -> None:
        self._groups = Groups(size)
        self._limit, self._cancel_s = limit, cancel_s
        self._uids: dict[str, str] = {}
        """Of every sample whose group is not yet taken."""
        self._keys: dict[str, list[str]] = {}
        self._tokens: dict[str, int] = {}
        self._lives: dict[str, asyncio.Task[Any]] = {}
        self._kept: dict[str, asyncio.Future[bool]] = {}
        self._gone: set[str] = set()
        """Told to stop."""
        self._full: dict[str, asyncio.Future[bool]] = {}
        """By uid: whether the group, now closed, has its n rows."""

    def __contains__(self, key: str) -> bool:
        return key in self._uids

    def opened(self, uid: str, prompt: str, share: Share) -> None:
        """A prompt's samples are about to start."""
        keys = [f"{uid}_{sample}" for sample in range(share.samples)]
        self._groups.opened(uid, prompt, share, keys)
        loop = asyncio.get_running_loop()
        self._full[uid] = loop.create_future()
        self._keys[uid] = keys
        for key in keys:
            self._uids[key], self._tokens[key], self._kept[key] = uid, 0, loop.create_future()

    async def live(self, key: str, life: Coroutine[Any, Any, Any]) -> Any:
        """Run a sample's agent loop to its end. None if it was stopped, or failed and is not missed.

        Raises:
            Exception: what it failed with, where its group is short of rows.
        """
        task = self._lives[key] = asyncio.create_task(life)
        try:
            return await task
        except (Exception, asyncio.CancelledError) as error:
            if not task.done():
                raise  # not the sample was cancelled, but who waits for it
            if not self._stopped(key):
                if await self._missed(key):
                    raise
                say_once(f"a sample was lost ({type(error).__name__}: {error}); its group is full without it")
            return None
        finally:
            del self._lives[key]
            if self._stopped(key):  # the group is not published while an engine still works on it
                await cancellations_settled(self._cancel_s)
                self._groups.stopped(key, self._tokens.get(key, 0))

    def generated(self, key: str, tokens: int) -> None:
        """A sample has generated so many tokens in all its turns so far. May cancel the task that calls."""
        if key in self._uids:
            self._tokens[key] = tokens
            self._obey(key, self._groups.progress(key, tokens))

    async def is_kept(self, key: str, tokens: int, truncated: bool, reward: float | None) -> bool:
        """A sample has ended, its reward is in: waits until it is certain whether its row is to be written.

        Siblings decide, each of which ends by its own limits; no other process is waited for.
        """
        if not self._kept[key].done():
            self._tokens[key] = tokens
            self._obey(key, self._groups.finished(key, tokens, Fate.CUT if truncated else Fate.VALID, reward))
        return await self._kept[key]

    def take(self) -> list[Visit]:
        """The groups that are closed, forgotten here."""
        for uid in [uid for uid, full in self._full.items() if full.done()]:
            del self._full[uid]
            for key in self._keys.pop(uid):
                del self._uids[key], self._tokens[key], self._kept[key]
                self._gone.discard(key)
        return self._groups.take(forget=False)

    async def _missed(self, key: str) -> bool:
        """A sample is lost: whether its group is short of rows, once that is known. True if it was lost after it had been counted on."""
        if self._kept[key].done():
            return True
        self._obey(key, self._groups.finished(key, self._tokens[key], Fate.USELESS))
        return not await self._full[self._uids[key]]

    def _stopped(self, key: str) -> bool:
        return key in self._gone

    def _obey(self, of: str, verdict: Verdict) -> None:
        for key in verdict.stop:
            self._gone.add(key)
            if key in self._lives:
                self._lives[key].cancel()
        for key in verdict.keep:
            self._kept[key].set_result(True)
        for key in verdict.drop + verdict.stop:
            self._kept[key].set_result(False)
        if verdict.limits:
            self._limit(verdict.limits)
        if verdict.closed:
            self._full[self._uids[of]].set_result(not verdict.short)
