"""Where a first turn goes, and whether a trajectory moves at the end of a turn: planned on what is left, again at every event.

Law. Each replica has an expected drain time D (`books`, `outlook`), from everybody's remaining tokens as a distribution.
- First turn: the replica with the smallest D after taking it, plus the prefill of its prompt where no sibling has left it in the cache, if
  that is clearly sooner than where stock's rule would put it: so samples of one prompt stay together exactly as far as prefill weighs more
  than balance. A batch that is announced (`expect`) is placed as a whole (`first`), by stock's rule if no plan is clearly better.
- Turn end: the trajectory moves from h to the r that makes the expected makespan of the fleet smallest, if all of
      D_h >= `CRITICAL` * max D                            only replicas that the step waits for send
      D_r with it, and its prefill <= (1 - `MARGIN`) * D_h     not to change places with its like
      expected makespan falls by `PER_COST` * prefill and by `LEAST_GAIN` of itself, the prefill already counted
  and it has moved fewer than `MOST_MOVES` times. It goes with its next turn; the tool call between is for pre-warming the target.
- Predictions count for what they have been worth (`trust`); where first placements or moves have not paid by the true lengths (`audit`),
  stock's rule decides, with `Reason.NOT_PAYING`, or nobody moves.

Invariants: with no latency model, or `deterministic`, the choices are verl's (`sticky`), and so are those of requests without a prompt,
which belong to no trajectory; in-flight counts are verl's in any case; a trajectory is in the books from its first turn's start to its end.
No clock, and no randomness but stock's ties. A latency model that comes while trajectories are under way waits until there are none.
Source: receding horizon in place of Heddle's rank rescaling (arXiv 2603.28101, section 6); margins from verl #6533 and #7435, where eager
moves lost. Cost: per event O(len(GRID)) for each replica that may be chosen, all of
them at worst; with 64 replicas and 10,000 trajectories about 0.3 ms a turn (bench/router).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from random import Random

import numpy as np

from verl_heddle.fleet import Replica
from verl_heddle.place.audit import Audit, Trust
from verl_heddle.place.books import Books, reading_s, soon, soonest
from verl_heddle.place.cost import Floats
from verl_heddle.place.decisions import Expected, Move
from verl_heddle.place.first import CLEARLY, Batch, place_batch
from verl_heddle.place.outlook import curves
from verl_heddle.place.pace import Latency, LiveTotals, TrajectoryMeans
from verl_heddle.place.sticky import StickyLeastInflight
from verl_heddle.predict.quantities import Estimate
from verl_heddle.trajectory import Outcome, Reason, TrajectoryEnd, TrajectoryId, TurnEnd, TurnStart

CRITICAL = 0.9
"""Moves elsewhere do not shorten the step; with every replica allowed to send, moves tripled and gained nothing (bench/placement)."""

MARGIN = 0.1
"""Drain times are forecast to about a tenth (bench/placement); verl #7435 lost with eager moves and won with a margin."""

PER_COST = 0.5
"""The gain is an estimate and net of the prefill; the prefill is certain, and in the way of others."""

LEAST_GAIN = 0.002
"""A move is not worth its risk for less."""

TARGETS = 8
"""Replicas looked at closely, those that would be soonest empty."""

MOST_MOVES = 3
"""Per trajectory; a bound against thrashing, reached by few."""

UNKNOWN = Estimate(2000.0, 2000.0 * 9.0**0.5, 4.0, 0.0)
"""Where nobody predicts: everybody alike, with the spread of real workloads."""


@dataclass(slots=True)
class _Live:
    home: str | None
    context: int
    generated: int
    left: Estimate
    target: str | None = None
    moves: int = 0
    started: bool = False
    plain: bool = False
    """Announced, and no plan for its batch was clearly better than stock's rule."""


class Replanner:
    """Events in, decisions out; the caller serialises.

    Args:
        latency: times of the model on these replicas; None: not known, verl's rule decides.
        rng: for verl's random ties.
        deterministic: verl's `rollout.full_determinism`.
        cap_tokens: most tokens a trajectory may generate; None: no cap known.
        moves: whether trajectories may change replica at all.
    """

    def __init__(
        self, latency: Latency | None, rng: Random, deterministic: bool = False, cap_tokens: int | None = None, moves: bool = True
    ) -> None:
        self._latency: Latency | None = None
        self._deterministic = deterministic
        self._stock = StickyLeastInflight(rng, deterministic)
        self._fleet: dict[str, Replica] = {}
        self._books: Books | None = None
        self._audit = Audit(Random(0))  # of its own: `rng` is for the ties that verl itself draws
        self._trust = Trust()
        self._cap = inf if cap_tokens is None else float(cap_tokens)
        self._may_move = moves
        self._live: dict[str, _Live] = {}
        self._means, self._totals = TrajectoryMeans(), LiveTotals()
        self._ended = self._most = 0
        self._next: Latency | None = None
        if latency is not None:
            self.learn(latency)

    @property
    def plans(self) -> bool:
        """Whether anything but verl's rule decides: there is a latency model."""
        return self._books is not None

    @property
    def rule(self) -> StickyLeastInflight:
        """verl's own, which counts the requests in flight."""
        return self._stock

    @property
    def inflight(self) -> dict[str, int]:
        """Requests in flight by replica name."""
        return self._stock.inflight

    def metrics(self) -> dict[str, float]:
        """What the planner thinks of itself: for `heddle/place/*`."""
        told = {"slope": self._trust.slope, "widen": self._trust.widen, "pays": float(self._audit.placing.pays)}
        told |= {"paid": self._audit.placing.last, "moves_pay": float(self._audit.moving.pays), "moves_paid": self._audit.moving.last}
        return told if self._trust.quality is None else told | {"quality": self._trust.quality}

    def add(self, replica: Replica) -> None:
        """A replica joins, with nothing in flight."""
        self._stock.add(replica.name)
        self._fleet[replica.name] = replica
        self._audit.add(replica.name)
        if self._books is not None:
            self._books.add(replica)

    def remove(self, name: str) -> None:
        """A replica leaves; who lived there is placed anew at the next turn."""
        self._stock.remove(name)
        self._fleet.pop(name, None)
        self._audit.remove(name)
        if self._books is not None:
            self._books.remove(name)

    def learn(self, latency: Latency | None) -> None:
        """Plan with these times from now on, or from when nobody is under way; without effect if `deterministic`. None: the times of this
        fleet are not known any more, verl's rule decides at once."""
        if latency is None:
            self._next = None
            for key in list(self._live):
                self.abandon(key)
            self._latency = self._books = None
            return
        if self._live or self._deterministic:
            self._next = None if self._deterministic else latency
            return
        self._latency, self._next, books = latency, None, Books(latency)
        for replica in self._fleet.values():
            books.add(replica)
        self._books = books
        self._means.look_again()

    def forget(self) -> int:
        """Prefix caches are gone: everybody is placed anew; returns how many conversations had a home."""
        for one in self._live.values():
            one.home = one.target = None
        return self._stock.forget()

    def expect(self, batch: Sequence[Expected]) -> None:
        """A step is about to start these: place them together. Optional, and worth it; whoever never starts must be told to `ended`."""
        books = self._books
        fresh = [item for item in batch if item.trajectory.key not in self._live]
        if books is None or not books.names or not fresh or not self._audit.placing.pays:
            return
        empty = not self._live
        made = [self._new(item.trajectory, item.prompt_tokens, 0, item.estimate or UNKNOWN) for item in fresh]
        self._tune()
        if not empty:  # the rest of a batch under way
            for item, one in sorted(zip(fresh, made, strict=True), key=lambda pair: -pair[1].left.median_tokens):
                self._assign_replica(item.trajectory, one, item.trajectory.key)
            return
        rows, medians = np.stack([self._rows(one) for one in made]), np.array([one.left.median_tokens for one in made])
        reading = np.stack([self._reading(one.context) for one in made])
        where = place_batch(books, Batch(medians, rows, reading, [item.trajectory.uid for item in fresh]))
        if where is None:
            for one in made:
                one.plain = True
            return
        for item, one, row, number in zip(fresh, made, rows, where, strict=True):
            one.home = books.names[number]
            books.put(item.trajectory.key, one.home, row, item.trajectory.uid)

    def acquire(self, turn: TurnStart, estimate: Estimate | None, home: str | None = None) -> tuple[str, Reason]:
        """Choose the replica of a turn and count it in flight there.

        Args:
            home: where the conversation's last turn ran, as `StickyLeastInflight.acquire`.

        Raises:
            RuntimeError: there is no replica (verl's own words).
        """
        books, identity = self._books, turn.trajectory
        if books is None or not books.names or not identity.prompt:
            return self._stock.acquire(turn.conversation, home)
        one = self._live.get(identity.key)
        if one is None and turn.turn:  # it began before there was a plan: it stays where it is
            return self._stock.acquire(turn.conversation, home)
        if one is not None and one.started:
            self._means.answered(turn.context_tokens - one.context)
            self._totals.context += turn.context_tokens - one.context
            one.context = turn.context_tokens
            if one.target in books.fleet:
                one.home, one.target = one.target, None
                one.moves += 1
                return self._commit(turn, one, Reason.MOVED)
            if one.home in books.fleet:
                return self._commit(turn, one, Reason.STICKY)
        if one is None:
            one = self._new(identity, turn.context_tokens, turn.generated_tokens, estimate or UNKNOWN)
        if one.home not in books.fleet:
            self._update_estimate(one, estimate or UNKNOWN)
            self._tune()
            self._assign_replica(identity, one, turn.conversation)
        first, one.started = not one.started, True
        if self._audit.placing.pays:
            return self._commit(turn, one, Reason.PLANNED, first)
        return self._commit(turn, one, Reason.NOT_PAYING)

    def release(self, end: TurnEnd, estimate: Estimate | None, may_move: bool = True) -> Move | None:
        """A request ended, somehow; `estimate`: what is left now; `may_move`: no other turn of the trajectory is under way. Returns the
        move to prepare, if there is one."""
        self._stock.release(end.replica)
        self._audit.finished(end.request)
        one = self._live.get(end.trajectory.key)
        if self._books is None or one is None:
            return None
        one.context += end.output_tokens
        self._totals.context += end.output_tokens
        one.generated += end.output_tokens
        if not end.completed or end.replica not in self._books.fleet:
            return None
        self._means.spoke(end.output_tokens)
        self._update_estimate(one, estimate or UNKNOWN)
        self._tune()
        rows = self._rows(one)
        self._books.put(end.trajectory.key, end.replica, rows)
        if not (self._may_move and may_move) or one.moves >= MOST_MOVES or len(self._books.names) < 2 or not self._audit.moving.pays:
            return None
        return self._move(end, one, rows)

    def ended(self, end: TrajectoryEnd) -> None:
        """The episode is over."""
        whole = end.outcome is Outcome.FINISHED and not end.trajectory.validate
        self._gone(end.trajectory.key, end.output_tokens, whole)

    def abandon(self, key: str) -> None:
        """It will never be heard of again: its worker died."""
        if key in self._live:
            self._gone(key, self._live[key].generated, False)

    def _gone(self, key: str, tokens: int, whole: bool) -> None:
        one = self._live.pop(key, None)
        if self._books is None or one is None:
            return
        self._totals.go(one.context, one.left)
        self._books.take(key)
        self._trust.ended(key, tokens if whole else None)
        self._audit.ended(key, tokens)
        self._ended += 1
        if not self._live or self._ended > 2 * self._most:
            self._trust.close()
            self._audit.close(self._books.names, self._books.drains_of)
            self._ended = self._most = 0
        if not self._live and self._next is not None:
            self.learn(self._next)

    def _commit(self, turn: TurnStart, one: _Live, reason: Reason, first: bool = False) -> tuple[str, Reason]:
        assert one.home is not None
        self._stock.note(turn.conversation, one.home)
        self._audit.started(turn, one.home if first else None)
        return one.home, reason

    def _new(self, identity: TrajectoryId, context: int, generated: int, estimate: Estimate) -> _Live:
        self._trust.told(identity.key, estimate)
        one = self._live[identity.key] = _Live(None, context, generated, estimate)
        self._totals.come(context, estimate)
        self._most = max(self._most, len(self._live))
        return one

    def _assign_replica(self, identity: TrajectoryId, one: _Live, conversation: str) -> None:
        """Give a trajectory a home: it is new, or has lost its own."""
        assert self._books is not None
        rows = self._rows(one)
        one.home, _ = self._stock.acquire(conversation)
        self._stock.release(one.home)
        if self._audit.placing.pays and not one.plain:
            reading = self._reading(one.context, self._books.homes_of(identity.uid))
            best, there = soonest(self._books, rows, reading), self._books.index(one.home)
            ours, stocks = self._books.drains_with(rows, [best, there]) + reading[[best, there]]
            if ours <= CLEARLY * stocks:
                one.home = self._books.names[best]
        self._books.put(identity.key, one.home, rows, identity.uid)

    def _move(self, end: TurnEnd, one: _Live, rows: Floats) -> Move | None:
        assert self._books is not None
        key, home = end.trajectory.key, self._books.index(end.replica)
        drains = self._books.drains()
        if drains[home] < CRITICAL * drains.max():
            return None
        reading = self._reading(one.context)
        targets = soon(self._books, rows, reading, home, (1.0 - MARGIN) * drains[home])[:TARGETS]
        if not len(targets):
            return None
        stay, gone = self._books.makespans_moved(key, reading, targets)
        target, gain = int(targets[gone.argmin()]), stay - float(gone.min())
        if gain < max(PER_COST * reading[target], LEAST_GAIN * stay):
            return None
        one.target = self._books.names[target]
        if self._audit.wants_moves():
            here, there = self._residents(end.replica), self._residents(one.target)
            self._audit.moved(end.replica, one.target, (here, there, key))
        self._books.put(key, one.target, rows)
        return Move(key, one.target, gain, float(reading[target]))

    def _residents(self, replica: str) -> dict[str, int]:
        assert self._books is not None
        return {key: self._live[key].generated for key in self._books.on[replica]}

    def _reading(self, tokens: int, cached: Sequence[int] = ()) -> Floats:
        assert self._books is not None and self._latency is not None
        return reading_s(self._books, self._latency, tokens, cached)

    def _update_estimate(self, one: _Live, estimate: Estimate) -> None:
        self._totals.change(one.left, estimate)
        one.left = estimate

    def _rows(self, one: _Live) -> Floats:
        left = self._trust.believed(one.left, self._totals.usual_log)
        return curves(left.median_tokens, left.scale, max(1.0, self._cap - one.generated))

    def _tune(self) -> None:
        """Tell the books what trajectories are like these days, when it is time."""
        assert self._books is not None
        if self._means.due(len(self._live)):
            self._books.tune(self._means.covers, self._means.habit(self._totals))
