"""Chooses the replica of each first turn, and decides at each turn end whether the trajectory moves; replans at every event.

Law. Each replica has an expected drain time D (`books`, `outlook`), computed from the remaining-token distributions of its trajectories.
- First turn: the replica with the smallest D after admitting the trajectory, plus the prefill of its prompt if no sibling has cached it
  there, provided that is clearly sooner than the replica stock's rule would choose. Samples of one prompt therefore stay together exactly
  as far as prefill outweighs balance. An announced batch (`expect`) is placed as a whole (`first`), or by stock's rule if no plan is
  clearly better.
- Turn end: the trajectory moves from h to the r that minimizes the expected makespan of the fleet, if all of these hold:
      D_h >= `CRITICAL` * max D                            only replicas that the step waits for send
      D_r with it, and its prefill <= (1 - `MARGIN`) * D_h     prevents swaps between similar replicas
      expected makespan falls by `PER_COST` * prefill and by `LEAST_GAIN` of itself, after the prefill is charged
  and it has moved fewer than `MOST_MOVES` times. It moves with its next turn; the tool call in between is used to pre-warm the target.
- Predictions are weighted by their past accuracy (`trust`). If first placements have not paid by the true lengths (`audit`), stock's rule
  decides, with `Reason.NOT_PAYING`. If moves have not paid, they stop.

Invariants: with no latency model, or `deterministic`, the choices are verl's (`sticky`), and so are those of requests without a prompt,
which belong to no trajectory. In-flight counts are always verl's. A trajectory is in the books from the start of its first turn to its end.
No clock, and no randomness but stock's ties. A new latency model takes effect once no trajectory is live.
Source: receding horizon in place of Heddle's rank rescaling (arXiv 2603.28101, section 6); margins from verl #6533 and #7435, where eager
moves lost. Cost: per event O(len(GRID)) for each candidate replica, all of them at worst; about 0.3 ms a turn with 64 replicas and 10,000
trajectories (bench/router).
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
"""Moves from other replicas do not shorten the step; when every replica could send, moves tripled and gained nothing (bench/placement)."""

MARGIN = 0.1
"""Drain times are forecast to about a tenth (bench/placement); verl #7435 lost with eager moves and won with a margin."""

PER_COST = 0.5
"""The gain is an estimate, net of the prefill; the prefill is certain and delays other requests."""

LEAST_GAIN = 0.002
"""A smaller gain is not worth the risk of a move."""

TARGETS = 8
"""Candidate targets priced per move: the replicas that would drain first."""

MOST_MOVES = 3
"""Per trajectory; bounds thrashing. Few trajectories reach it."""

UNKNOWN = Estimate(median_tokens=2000.0, upper_tokens=2000.0 * 9.0**0.5, turns=4.0, tool_s=0.0)
"""Used without a prediction: all trajectories alike, with the spread of real workloads."""


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
    """Announced in a batch for which no plan clearly beat stock's rule."""


class Replanner:
    """Takes events and returns decisions; the caller serialises calls.

    Args:
        latency: latency model of these replicas; None: unknown, verl's rule decides.
        rng: for verl's random ties.
        deterministic: verl's `rollout.full_determinism`.
        cap_tokens: most tokens a trajectory may generate; None: no known cap.
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
        self._audit = Audit(Random(0))  # separate: `rng` draws verl's ties only
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
        """Whether there is a latency model to plan with; without one, verl's rule decides."""
        return self._books is not None

    @property
    def rule(self) -> StickyLeastInflight:
        """verl's rule, which also counts requests in flight."""
        return self._stock

    @property
    def inflight(self) -> dict[str, int]:
        """Requests in flight by replica name."""
        return self._stock.inflight

    def metrics(self) -> dict[str, float]:
        """Predictor trust and audit results, for `heddle/place/*`."""
        facts = {"slope": self._trust.slope, "widen": self._trust.widen, "pays": float(self._audit.placing.pays)}
        facts |= {"paid": self._audit.placing.last, "moves_pay": float(self._audit.moving.pays), "moves_paid": self._audit.moving.last}
        return facts if self._trust.quality is None else facts | {"quality": self._trust.quality}

    def add(self, replica: Replica) -> None:
        """A replica joins, with nothing in flight."""
        self._stock.add(replica.name)
        self._fleet[replica.name] = replica
        self._audit.add(replica.name)
        if self._books is not None:
            self._books.add(replica)

    def remove(self, name: str) -> None:
        """A replica leaves; its trajectories are reassigned at their next turn."""
        self._stock.remove(name)
        self._fleet.pop(name, None)
        self._audit.remove(name)
        if self._books is not None:
            self._books.remove(name)

    def learn(self, latency: Latency | None) -> None:
        """Plan with this latency model, once no trajectory is live; no effect if `deterministic`. None: the fleet's latency is no longer
        known, so verl's rule decides at once."""
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
        """Prefix caches were dropped: reassign every trajectory; returns how many conversations were assigned."""
        for live in self._live.values():
            live.home = live.target = None
        return self._stock.forget()

    def expect(self, batch: Sequence[Expected]) -> None:
        """Place the trajectories a step is about to start as one batch. Optional; report any that never start to `ended`."""
        books = self._books
        fresh = [item for item in batch if item.trajectory.key not in self._live]
        if books is None or not books.names or not fresh or not self._audit.placing.pays:
            return
        empty = not self._live
        made = [self._new(item.trajectory, item.prompt_tokens, 0, item.estimate or UNKNOWN) for item in fresh]
        self._tune()
        if not empty:  # the rest of a batch in progress
            for item, live in sorted(zip(fresh, made, strict=True), key=lambda pair: -pair[1].left.median_tokens):
                self._assign_replica(item.trajectory, live, item.trajectory.key)
            return
        rows, medians = np.stack([self._rows(live) for live in made]), np.array([live.left.median_tokens for live in made])
        reading = np.stack([self._reading(live.context) for live in made])
        where = place_batch(books, Batch(medians, rows, reading, [item.trajectory.uid for item in fresh]))
        if where is None:
            for live in made:
                live.plain = True
            return
        for item, live, row, number in zip(fresh, made, rows, where, strict=True):
            live.home = books.names[number]
            books.put(item.trajectory.key, live.home, row, item.trajectory.uid)

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
        live = self._live.get(identity.key)
        if live is None and turn.turn:  # it began before planning did: keep its replica
            return self._stock.acquire(turn.conversation, home)
        if live is not None and live.started:
            self._means.answered(turn.context_tokens - live.context)
            self._totals.context += turn.context_tokens - live.context
            live.context = turn.context_tokens
            if live.target in books.fleet:
                live.home, live.target = live.target, None
                live.moves += 1
                return self._commit(turn, live, Reason.MOVED)
            if live.home in books.fleet:
                return self._commit(turn, live, Reason.STICKY)
        if live is None:
            live = self._new(identity, turn.context_tokens, turn.generated_tokens, estimate or UNKNOWN)
        if live.home not in books.fleet:
            self._update_estimate(live, estimate or UNKNOWN)
            self._tune()
            self._assign_replica(identity, live, turn.conversation)
        first, live.started = not live.started, True
        if self._audit.placing.pays:
            return self._commit(turn, live, Reason.PLANNED, first)
        return self._commit(turn, live, Reason.NOT_PAYING)

    def release(self, end: TurnEnd, estimate: Estimate | None, may_move: bool = True) -> Move | None:
        """A request ended, completed or not; `estimate`: what is left now; `may_move`: the trajectory has no other turn in flight. Returns
        the move to prepare, if any."""
        self._stock.release(end.replica)
        self._audit.finished(end.request)
        live = self._live.get(end.trajectory.key)
        if self._books is None or live is None:
            return None
        live.context += end.output_tokens
        self._totals.context += end.output_tokens
        live.generated += end.output_tokens
        if not end.completed or end.replica not in self._books.fleet:
            return None
        self._means.spoke(end.output_tokens)
        self._update_estimate(live, estimate or UNKNOWN)
        self._tune()
        rows = self._rows(live)
        self._books.put(end.trajectory.key, end.replica, rows)
        if not (self._may_move and may_move) or live.moves >= MOST_MOVES or len(self._books.names) < 2 or not self._audit.moving.pays:
            return None
        return self._move(end, live, rows)

    def ended(self, end: TrajectoryEnd) -> None:
        """The episode is over."""
        whole = end.outcome is Outcome.FINISHED and not end.trajectory.validate
        self._gone(end.trajectory.key, end.output_tokens, whole)

    def abandon(self, key: str) -> None:
        """Drop the trajectory: its worker died."""
        if key in self._live:
            self._gone(key, self._live[key].generated, False)

    def _gone(self, key: str, tokens: int, whole: bool) -> None:
        live = self._live.pop(key, None)
        if self._books is None or live is None:
            return
        self._totals.go(live.context, live.left)
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

    def _commit(self, turn: TurnStart, live: _Live, reason: Reason, first: bool = False) -> tuple[str, Reason]:
        assert live.home is not None
        self._stock.note(turn.conversation, live.home)
        self._audit.started(turn, live.home if first else None)
        return live.home, reason

    def _new(self, identity: TrajectoryId, context: int, generated: int, estimate: Estimate) -> _Live:
        self._trust.told(identity.key, estimate)
        live = self._live[identity.key] = _Live(None, context, generated, estimate)
        self._totals.come(context, estimate)
        self._most = max(self._most, len(self._live))
        return live

    def _assign_replica(self, identity: TrajectoryId, live: _Live, conversation: str) -> None:
        """Assign a replica to a trajectory that is new or has lost its replica."""
        assert self._books is not None
        rows = self._rows(live)
        live.home, _ = self._stock.acquire(conversation)
        self._stock.release(live.home)
        if self._audit.placing.pays and not live.plain:
            reading = self._reading(live.context, self._books.homes_of(identity.uid))
            best, there = soonest(self._books, rows, reading), self._books.index(live.home)
            ours, stocks = self._books.drains_with(rows, [best, there]) + reading[[best, there]]
            if ours <= CLEARLY * stocks:
                live.home = self._books.names[best]
        self._books.put(identity.key, live.home, rows, identity.uid)

    def _move(self, end: TurnEnd, live: _Live, rows: Floats) -> Move | None:
        assert self._books is not None
        key, home = end.trajectory.key, self._books.index(end.replica)
        drains = self._books.drains()
        if drains[home] < CRITICAL * drains.max():
            return None
        reading = self._reading(live.context)
        targets = soon(self._books, rows, reading, home, (1.0 - MARGIN) * drains[home])[:TARGETS]
        if not len(targets):
            return None
        stay, gone = self._books.makespans_moved(key, reading, targets)
        target, gain = int(targets[gone.argmin()]), stay - float(gone.min())
        if gain < max(PER_COST * reading[target], LEAST_GAIN * stay):
            return None
        live.target = self._books.names[target]
        if self._audit.wants_moves():
            here, there = self._residents(end.replica), self._residents(live.target)
            self._audit.moved(end.replica, live.target, (here, there, key))
        self._books.put(key, live.target, rows)
        return Move(key, live.target, gain, float(reading[target]))

    def _residents(self, replica: str) -> dict[str, int]:
        assert self._books is not None
        return {key: self._live[key].generated for key in self._books.on[replica]}

    def _reading(self, tokens: int, cached: Sequence[int] = ()) -> Floats:
        assert self._books is not None and self._latency is not None
        return reading_s(self._books, self._latency, tokens, cached)

    def _update_estimate(self, live: _Live, estimate: Estimate) -> None:
        self._totals.change(live.left, estimate)
        live.left = estimate

    def _rows(self, live: _Live) -> Floats:
        left = self._trust.believed(live.left, self._totals.usual_log)
        return curves(left.median_tokens, left.scale, max(1.0, self._cap - live.generated))

    def _tune(self) -> None:
        """Update the books with current trajectory means, if an update is due."""
        assert self._books is not None
        if self._means.due(len(self._live)):
            self._books.tune(self._means.covers, self._means.habit(self._totals))
