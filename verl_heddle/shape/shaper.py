"""The door to shaping: what the orchestrator calls. Events in, decisions out; pure, no clock, no randomness; the caller serialises.

    shaper = Shaper(settings, n, cap_tokens)
    plan = shaper.plan(step, prompts, fleet)             before a step: samples and rule per prompt; `fleet` from `fleet_of`, or None
    shaper.opened(uid, prompt, share, keys)              a group starts; keys: `TrajectoryId.key` of all its samples, in order
    verdict = shaper.progress(key, tokens)               a sample has generated so many tokens (as often as is convenient; never needed)
    verdict = shaper.finished(key, tokens, fate, reward) a sample is over, by itself
    shaper.stopped(key, tokens)                          the engine is done with a sample that was to be stopped (its final tokens)
    shaper.step_ended(step)                              -> metrics of the step for `heddle/shape/*`; groups still open are given up
    shaper.state() / shaper.restore(state)               JSON values, for the checkpoint

A `Verdict` says what has changed:
    stop      samples that cannot be kept any more: abort them now, in engine and tools; told once each
    limits    tokens at which a sample still running cannot be kept any more (changed ones only): whoever sees its tokens stops it there
              and says so by `progress`, so that nobody has to stream tokens here. A multi-turn sample counts over all its turns
    keep      samples that are certainly kept: their rows may be written; told once each, n per group in the end unless it is `short`
    drop      samples that ended and are certainly not kept; told once each
    closed    nobody of the group runs any more: keep and drop are complete
    weights   with `closed`, in corrected mode: importance weight of each kept sample, mean 1

What the caller owes: `finished` with `Fate.VALID` only for a sample whose row can be written (its reward is in, or cannot fail), since
others are stopped on the strength of it; `CUT` for one that a limit on tokens or turns ended, `USELESS` for a failure, a lost reward, an
abort not asked for here. Validation is not told here. Unknown keys are ignored.
Invariants: each key is told once in keep, drop or stop; at most n kept; n if n can be trained on; memory is the open groups and the
statistics. Cost: O(m log m) per event, one plan per step (`plan`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any, NamedTuple

from verl_heddle.fleet import Replica
from verl_heddle.place.outlook import GRID
from verl_heddle.place.pace import Habit, Latency, Tempo
from verl_heddle.shape.budget import Fleet
from verl_heddle.shape.censored import Law, Prior, fit
from verl_heddle.shape.honesty import Account, Guard, Row, chance_of_mixed, is_mixed
from verl_heddle.shape.plan import Share, StepPlan, plain, plan
from verl_heddle.shape.select import Fate, Group, Sample, Standing
from verl_heddle.shape.settings import ShapeReason, ShapeSettings
from verl_heddle.shape.spread import Spreads
from verl_heddle.shape.weights import weights

FORMAT = 1
"""Version of `state`; others are refused."""


class Verdict(NamedTuple):
    """See the module. Keys are `TrajectoryId.key`."""

    stop: tuple[str, ...] = ()
    limits: dict[str, int] = {}
    keep: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()
    closed: bool = False
    short: bool = False
    weights: dict[str, float] = {}


NOTHING = Verdict()


@dataclass(slots=True)
class _Open:
    uid: str
    prompt: str
    share: Share
    keys: Sequence[str]
    group: Group
    law: Law
    rewards: dict[int, float | None] = field(default_factory=dict)
    told: set[int] = field(default_factory=set)
    limits: dict[int, int] = field(default_factory=dict)
    closed: bool = False


def fleet_of(latency: Latency, replicas: Sequence[Replica], habit: Habit, samples: int) -> Fleet:
    """What the forecast knows of the engines: `samples` is the most the step may start in all."""
    kinds: dict[tuple[int, int, int | None], list[Replica]] = {}
    for one in replicas:
        kinds.setdefault((one.tp, one.slots, one.kv_tokens), []).append(one)
    each = max(2.0, samples / max(1, len(replicas)))
    return Fleet([Tempo(latency, same[0], GRID, each, habit) for same in kinds.values()], [len(same) for same in kinds.values()])


class Shaper:
    """See the module.

    Args:
        size: n, rows per prompt that the trainer gets.
        cap_tokens: most tokens a trajectory may generate; None: no cap known.

    Raises:
        ValueError: the settings are wrong, one line per problem.
    """

    def __init__(self, settings: ShapeSettings, size: int, cap_tokens: int | None = None) -> None:
        if problems := settings.check(size):
            raise ValueError("\n".join(problems))
        self._settings, self._size, self._cap = settings, size, cap_tokens
        self.spreads = Spreads()
        """What is known of prompts' lengths."""
        self._guard = Guard(settings)
        self._open: dict[str, _Open] = {}
        self._of: dict[str, tuple[_Open, int]] = {}
        self._account = Account()
        self._last: StepPlan | None = None

    def plan(self, step: int, prompts: Sequence[str], fleet: Fleet | None, laws: Sequence[Law] | None = None) -> StepPlan:
        """Samples and rule of each prompt. `laws`: better ones than the prompts' own statistics, where somebody has them."""
        forced = self._guard.allows(step)
        if forced is not None:
            shares = tuple(plain(self._size, self._cap, forced) for _ in prompts)
            self._last = StepPlan(shares, counts={str(forced): len(prompts)})
            return self._last
        known = [self.spreads.law(prompt) for prompt in prompts] if laws is None else laws
        learnt = laws is not None or self.spreads.visits > 0
        unseen = [prompt not in self.spreads for prompt in prompts] if laws is None else ()
        made = plan(known, self._size, self._settings, fleet if learnt else None, self._cap, unseen)
        shares = tuple(self._overruled(number, *pair) for number, pair in enumerate(zip(prompts, made.shares, strict=True)))
        counts: dict[str, int] = {}
        for share in shares:
            counts[share.reason] = counts.get(share.reason, 0) + 1
        self._last = replace(made, shares=shares, counts=counts)
        return self._last

    def opened(self, uid: str, prompt: str, share: Share, keys: Sequence[str]) -> None:
        """A group starts. Raises ValueError: not one key per sample, or a group that is open already."""
        if len(set(keys)) != share.samples or uid in self._open:
            raise ValueError(f"group {uid}: {len(keys)} keys for {share.samples} samples, or opened twice")
        one = _Open(uid, prompt, share, tuple(keys), Group(share.rule, share.samples), self.spreads.law(prompt))
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
        """How far a stopped sample got in the end, told before the step's end; for the token account and the statistics."""
        one, number = self._of.get(key, (None, 0))
        if one is not None and number in one.group.stopped:
            one.group.stopped[number] = max(tokens, one.group.stopped[number])

    def step_ended(self, step: int, forget: bool = True) -> dict[str, float]:
        """Close the books: teach the statistics, judge the bounds; returns metrics without prefix.

        `forget`: groups that are still open are given up, their runners counted as longer than they got; False: they go on into the next
        step.
        """
        over = [one for one in self._open.values() if forget or one.closed]
        for one in over:
            self._learn(one)
            self._account.stopped(sum(one.group.stopped.values()))
        crossed = self._guard.step_ended(step, self._account)
        told = self._account.metrics()
        if self._last is not None:
            told |= {f"prompts/{reason}": float(count) for reason, count in self._last.counts.items()}
            told["spare"] = sum(share.samples - self._size for share in self._last.shares) / max(1, len(self._last.shares))
            if self._last.patience_tokens < inf:
                told["patience_tokens"] = self._last.patience_tokens
            if self._last.budget is not None:
                told |= {"forecast/saved_s": self._last.budget.saved_s, "forecast/cost_s": self._last.budget.cost_s}
        told["resting"] = float(self._guard.allows(step + 1) is not None)
        if crossed is not None:
            told[f"crossed/{crossed}"] = 1.0
        for one in over:
            del self._open[one.uid]
            for key in one.keys:
                self._of.pop(key, None)
        self._account, self._last = Account(), None
        return told

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: statistics and guard, as JSON values. Open groups are not part of it: ask between steps."""
        return {"format": FORMAT, "spreads": self.spreads.state(), "guard": self._guard.state()}

    def restore(self, state: dict[str, Any]) -> None:
        """Counterpart of `state`. Raises ValueError, with nothing changed: not such a state, or of another version."""
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            raise ValueError("not a state of shaping of this version")
        guard = Guard(self._settings)
        spreads = Spreads.restore(state["spreads"])
        guard.restore(state["guard"])
        self.spreads, self._guard = spreads, guard

    def _overruled(self, number: int, prompt: str, share: Share) -> Share:
        every = self._settings.control_every
        if share.samples == self._size:
            return share
        if self._guard.plain(prompt):
            return plain(self._size, self._cap, ShapeReason.MIXED_LOSS)
        return plain(self._size, self._cap, ShapeReason.CONTROL) if every and not number % every else share

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
        kept = group.kept() if group.settled else []
        given: dict[str, float] = {}
        if group.settled and self._settings.corrected and one.share.samples > self._size:
            tokens_of = [group.ended[number].tokens for number in kept]
            values = weights(one.share.rule, one.share.samples, one.law, tokens_of)
            given = {names[number]: value for number, value in zip(kept, values, strict=True)}
        if group.settled:
            self._close(one, kept, given)
        stop = tuple(names[number] for number in gone)
        told = {names[number]: tokens for number, tokens in limits.items()}
        return Verdict(stop, told, keep, drop, group.settled, group.settled and len(kept) < self._size, given)

    def _close(self, one: _Open, kept: Sequence[int], given: dict[str, float]) -> None:
        one.closed = True
        rows = [
            Row(sample.tokens, one.rewards.get(number), number in kept, given.get(one.keys[number], 1.0))
            for number, sample in one.group.ended.items()
            if sample.fate is Fate.VALID or number in kept
        ]
        selected = one.share.samples > self._size
        mean = None
        if selected and rows:
            mean = fit(self._seen(one.group), Prior(one.law.mean, one.law.spread**2, 0.0, 1.0))[0]
        self._account.add(rows, self._size, mean)
        rewards = [row.reward for row in rows]
        if selected and len(rows) > self._size and None not in rewards and not is_mixed([row.reward for row in rows if row.kept]):
            self._guard.lost(one.prompt, chance_of_mixed(rewards, self._size))

    def _learn(self, one: _Open) -> None:
        running = [(tokens, True) for tokens in one.group.running.values()]
        self.spreads.observe(one.prompt, self._seen(one.group) + running)

    @staticmethod
    def _seen(group: Group) -> list[tuple[int, bool]]:
        ended = [(one.tokens, one.fate is not Fate.VALID) for one in group.ended.values()]
        return ended + [(tokens, True) for tokens in group.stopped.values()]
