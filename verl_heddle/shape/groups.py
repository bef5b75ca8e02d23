"""The groups under way: which of their samples are kept, stopped, dropped. Events in, verdicts out; pure; the caller serialises.

    groups = Groups(n)
    groups.opened(uid, prompt, share, keys)              a group starts; keys: `TrajectoryId.key` of all its samples, in order
    verdict = groups.progress(key, tokens)               a sample has generated so many tokens (as often as is convenient; never needed)
    verdict = groups.finished(key, tokens, fate, reward) a sample is over, by itself
    groups.stopped(key, tokens)                          the engine is done with a sample that was to be stopped (its final tokens)
    visits = groups.take()                               between steps: what happened, for `Shaper.step_ended`

All samples of a group belong to one `Groups`, which may be one of many: in the cluster each worker has one, beside the tasks that it stops,
so that no verdict waits for another process.

A `Verdict` says what has changed:
    stop      samples that cannot be kept any more: abort them now, in engine and tools; told once each
    limits    tokens at which a sample still running cannot be kept any more (changed ones only): whoever sees its tokens stops it there
              and says so by `progress`, so that nobody has to stream tokens here. A multi-turn sample counts over all its turns
    keep      samples that are certainly kept: their rows may be written; told once each, n per group in the end unless it is `short`
    drop      samples that ended and are certainly not kept; told once each
    closed    nobody of the group runs any more: keep and drop are complete

What the caller owes: `finished` with `Fate.VALID` only for a sample whose row can be written (its reward is in, or cannot fail), since
others are stopped on the strength of it; `CUT` for one that a limit on tokens or turns ended, `USELESS` for a failure, a lost reward, an
abort not asked for here. Validation is not told here. Unknown keys are ignored.
Invariants: each key is told once in keep, drop or stop; at most n kept; n if n can be trained on; memory is the open groups and those not
yet taken. Cost: O(m log m) per event.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf
from typing import NamedTuple

from verl_heddle.shape.honesty import Row
from verl_heddle.shape.plan import Share
from verl_heddle.shape.select import Fate, Group, Sample, Standing


class Verdict(NamedTuple):
    """See the module. Keys are `TrajectoryId.key`."""

    stop: tuple[str, ...] = ()
    limits: dict[str, int] = {}
    keep: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()
    closed: bool = False
    short: bool = False


NOTHING = Verdict()


class Visit(NamedTuple):
    """What became of a group. `seen`: (tokens, censored) of every sample started; `rows`: those that ended and can be trained on, none
    if it was given up."""

    uid: str
    prompt: str
    share: Share
    closed: bool
    seen: tuple[tuple[int, bool], ...]
    rows: tuple[Row, ...]
    stopped_tokens: int

    @property
    def selected(self) -> bool:
        """Spare samples were started."""
        return self.share.samples > self.share.rule.size


@dataclass(slots=True)
class _Open:
    prompt: str
    share: Share
    keys: Sequence[str]
    group: Group
    rewards: dict[int, float | None] = field(default_factory=dict)
    told: set[int] = field(default_factory=set)
    limits: dict[int, int] = field(default_factory=dict)
    closed: bool = False


class Groups:
    """See the module. `size`: n, rows per prompt that the trainer gets."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._open: dict[str, _Open] = {}
        self._of: dict[str, tuple[_Open, int]] = {}

    def opened(self, uid: str, prompt: str, share: Share, keys: Sequence[str]) -> None:
        """A group starts.

        Raises:
            ValueError: not one key per sample, or a group that is open already.
        """
        if len(set(keys)) != share.samples or uid in self._open:
            raise ValueError(f"group {uid}: {len(keys)} keys for {share.samples} samples, or opened twice")
        one = _Open(prompt, share, tuple(keys), Group(share.rule, share.samples))
        self._open[uid] = one
        self._of.update((key, (one, number)) for number, key in enumerate(keys))

    def progress(self, key: str, tokens: int) -> Verdict:
        """A sample has generated so many tokens and goes on."""
        one, number = self._of.get(key, (None, 0))
        if one is None or one.closed or number not in one.group.running:
            return NOTHING
        one.group.progress(number, tokens)
        return self._verdict(one) if tokens >= one.group.stop_tokens(number) else NOTHING

    def finished(self, key: str, tokens: int, fate: Fate = Fate.VALID, reward: float | None = None) -> Verdict:
        """A sample is over. Of one that was told to stop this is the same as `stopped`."""
        one, number = self._of.get(key, (None, 0))
        if one is None:
            return NOTHING
        if number not in one.group.running:
            self.stopped(key, tokens)
            return NOTHING
        one.rewards[number] = reward
        one.group.end(Sample(number, tokens, fate))
        return self._verdict(one)

    def stopped(self, key: str, tokens: int) -> None:
        """How far a stopped sample got in the end, told before the group is taken; for the token account and the statistics."""
        one, number = self._of.get(key, (None, 0))
        if one is not None and number in one.group.stopped:
            one.group.stopped[number] = max(tokens, one.group.stopped[number])

    def take(self, forget: bool = True) -> list[Visit]:
        """The groups that are over, forgotten here.

        `forget`: groups that are still open are given up, their runners counted as longer than they got; False: they go on.
        """
        over = {uid: one for uid, one in self._open.items() if forget or one.closed}
        for uid, one in over.items():
            del self._open[uid]
            for key in one.keys:
                self._of.pop(key, None)
        return [_visit(uid, one) for uid, one in over.items()]

    def _verdict(self, one: _Open) -> Verdict:
        group, names = one.group, one.keys
        gone = group.stop()
        limits = {}
        for number in group.running:
            tokens = group.stop_tokens(number)
            if tokens < one.limits.get(number, inf):
                one.limits[number] = limits[number] = int(tokens)
        fresh = [(number, group.standing(number)) for number in group.ended if number not in one.told]
        keep = tuple(names[number] for number, standing in fresh if standing is Standing.IN)
        drop = tuple(names[number] for number, standing in fresh if standing is Standing.OUT)
        one.told.update(number for number, standing in fresh if standing is not Standing.OPEN)
        one.closed = group.settled
        if not one.closed:
            return Verdict(
                tuple(names[number] for number in gone), {names[number]: tokens for number, tokens in limits.items()}, keep, drop
            )
        kept = group.kept()
        return Verdict(tuple(names[number] for number in gone), {}, keep, drop, True, len(kept) < self._size)


def _visit(uid: str, one: _Open) -> Visit:
    group = one.group
    ended = [(sample.tokens, sample.fate is not Fate.VALID) for sample in group.ended.values()]
    seen = ended + [(tokens, True) for tokens in (*group.stopped.values(), *group.running.values())]
    rows: list[Row] = []
    if one.closed:
        kept = set(group.kept())
        for number, sample in group.ended.items():
            if sample.fate is Fate.VALID or number in kept:
                rows.append(Row(sample.tokens, one.rewards.get(number), number in kept))
    return Visit(uid, one.prompt, one.share, one.closed, tuple(seen), tuple(rows), sum(group.stopped.values()))
