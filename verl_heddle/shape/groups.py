"""Groups in flight: which of their samples are kept, stopped or dropped. Events in, verdicts out; pure; the caller serialises.

    groups = Groups(n)
    groups.opened(uid, prompt, share, keys)              a group starts; keys: `TrajectoryId.key` of all its samples, in order
    verdict = groups.progress(key, tokens)               a sample has generated this many tokens (optional, at any frequency)
    verdict = groups.finished(key, tokens, fate, reward) a sample has ended by itself
    groups.stopped(key, tokens)                          the engine has finished stopping a sample; its final tokens
    visits = groups.take()                               between steps: the outcomes, for `Shaper.step_ended`

All samples of a group belong to the same `Groups`. In the cluster each worker has its own, beside the tasks that it stops, so no verdict
waits for another process.

A `Verdict` contains only changes:
    stop      samples that can no longer be kept: abort them now, in engine and tools; each is listed once
    limits    tokens at which a running sample can no longer be kept (changed limits only). The caller stops it there and reports that with
              `progress`, so tokens need not be streamed here. A multi-turn sample counts over all its turns
    keep      samples that are certainly kept, so their rows may be written; each is listed once, finally n per group unless it is `short`
    drop      samples that ended and are certainly not kept; each is listed once
    closed    no sample of the group is running: keep and drop are complete

Caller's obligations: report `Fate.VALID` only for a sample whose row can be written (its reward has arrived or cannot fail), because other
samples are stopped on the strength of it; `CUT` if a limit on tokens or turns ended the sample; `USELESS` for a failure, a lost reward, or
an abort not requested here. Do not report validation samples. Unknown keys are ignored.
Invariants: each key appears once in keep, drop or stop; at most n are kept, and exactly n if n can be trained on; memory holds the open
groups and those not yet taken. Cost: O(m log m) per event.
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
    """Changes caused by one event (see the module). Keys are `TrajectoryId.key`."""

    stop: tuple[str, ...] = ()
    limits: dict[str, int] = {}
    keep: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()
    closed: bool = False
    short: bool = False


NOTHING = Verdict()


class Visit(NamedTuple):
    """Outcome of a group. `seen`: (tokens, censored) of every sample started; `rows`: samples that ended and can be trained on, empty if
    the group was abandoned."""

    uid: str
    prompt: str
    share: Share
    closed: bool
    seen: tuple[tuple[int, bool], ...]
    rows: tuple[Row, ...]
    stopped_tokens: int

    @property
    def selected(self) -> bool:
        """Whether spare samples were started."""
        return self.share.samples > self.share.rule.size


@dataclass(slots=True)
class _Open:
    prompt: str
    share: Share
    keys: Sequence[str]
    group: Group
    rewards: dict[int, float | None] = field(default_factory=dict)
    announced: set[int] = field(default_factory=set)
    limits: dict[int, int] = field(default_factory=dict)
    closed: bool = False


class Groups:
    """Open groups (see the module). `size`: n, the rows per prompt that the trainer gets."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._open: dict[str, _Open] = {}
        self._of: dict[str, tuple[_Open, int]] = {}

    def opened(self, uid: str, prompt: str, share: Share, keys: Sequence[str]) -> None:
        """Register a group that starts.

        Raises:
            ValueError: not one key per sample, or the group is already open.
        """
        if len(set(keys)) != share.samples or uid in self._open:
            raise ValueError(f"group {uid}: {len(keys)} keys for {share.samples} samples, or opened twice")
        entry = _Open(prompt, share, tuple(keys), Group(share.rule, share.samples))
        self._open[uid] = entry
        self._of.update((key, (entry, number)) for number, key in enumerate(keys))

    def progress(self, key: str, tokens: int) -> Verdict:
        """A running sample has generated `tokens` tokens so far."""
        entry, number = self._of.get(key, (None, 0))
        if entry is None or entry.closed or number not in entry.group.running:
            return NOTHING
        entry.group.progress(number, tokens)
        return self._verdict(entry) if tokens >= entry.group.stop_tokens(number) else NOTHING

    def finished(self, key: str, tokens: int, fate: Fate = Fate.VALID, reward: float | None = None) -> Verdict:
        """A sample has ended. For a sample in an earlier `stop` this equals `stopped`."""
        entry, number = self._of.get(key, (None, 0))
        if entry is None:
            return NOTHING
        if number not in entry.group.running:
            self.stopped(key, tokens)
            return NOTHING
        entry.rewards[number] = reward
        entry.group.end(Sample(number, tokens, fate))
        return self._verdict(entry)

    def stopped(self, key: str, tokens: int) -> None:
        """Final tokens of a stopped sample, for the token account and the statistics. Call it before the group is taken."""
        entry, number = self._of.get(key, (None, 0))
        if entry is not None and number in entry.group.stopped:
            entry.group.stopped[number] = max(tokens, entry.group.stopped[number])

    def take(self, forget: bool = True) -> list[Visit]:
        """Remove and return the closed groups.

        `forget`: also abandon open groups, with their running samples censored at their current length; False: leave them open.
        """
        over = {uid: entry for uid, entry in self._open.items() if forget or entry.closed}
        for uid, entry in over.items():
            del self._open[uid]
            for key in entry.keys:
                self._of.pop(key, None)
        return [_visit(uid, entry) for uid, entry in over.items()]

    def _verdict(self, entry: _Open) -> Verdict:
        group, keys = entry.group, entry.keys
        stopped = tuple(keys[number] for number in group.stop())
        limits = {}
        for number in group.running:
            tokens = group.stop_tokens(number)
            if tokens < entry.limits.get(number, inf):
                entry.limits[number] = limits[number] = int(tokens)
        pending = [(number, group.standing(number)) for number in group.ended if number not in entry.announced]
        keep = tuple(keys[number] for number, standing in pending if standing is Standing.IN)
        drop = tuple(keys[number] for number, standing in pending if standing is Standing.OUT)
        entry.announced.update(number for number, standing in pending if standing is not Standing.OPEN)
        entry.closed = group.settled
        if not entry.closed:
            return Verdict(stopped, {keys[number]: tokens for number, tokens in limits.items()}, keep, drop)
        kept = group.kept()
        return Verdict(stopped, {}, keep, drop, True, len(kept) < self._size)


def _visit(uid: str, entry: _Open) -> Visit:
    group = entry.group
    ended = [(sample.tokens, sample.fate is not Fate.VALID) for sample in group.ended.values()]
    seen = ended + [(tokens, True) for tokens in (*group.stopped.values(), *group.running.values())]
    rows: list[Row] = []
    if entry.closed:
        kept = set(group.kept())
        for number, sample in group.ended.items():
            if sample.fate is Fate.VALID or number in kept:
                rows.append(Row(sample.tokens, entry.rewards.get(number), number in kept))
    return Visit(uid, entry.prompt, entry.share, entry.closed, tuple(seen), tuple(rows), sum(group.stopped.values()))
