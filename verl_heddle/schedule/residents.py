"""The resident set: which trajectories a replica keeps, rather than which turns it takes.

A trajectory is *resident* on a replica from its admission until it ends or is evicted; through its tool calls its context stays counted
against the replica's KV cache, so that its next turn finds it there. Whoever is not resident belongs to no replica.

Law
- Footprint: the context of a trajectory, and while a turn of it runs what a turn adds in the mean; a prompt counts once per replica,
  however many samples share it.
- Admission: the first of the waiting, validation first, then by training step, then in the policy's order, is admitted to a replica with
  room: footprints within `ADMIT` of its KV cache; slots are vLLM's business. First choice is the replica where its context lay last, then,
  as verl chooses, one of those with the fewest turns in flight. A replica without residents takes anything, so nothing waits for ever.
- A resident's turn goes in at once, so its worker need not ask for it (`put_out` says from when on it must). Of one that has begun so while
  it was being evicted, the trajectory is resident there again, whatever the room.
- Holding is renting (`rent`): an idle resident is held for t*, or not at all where tools have been too long for it, then evicted if
  somebody waits.
- Over `FULL` (contexts grow): idle residents are evicted, the last in the order first.
- A weight update pauses an engine and wipes its contexts: its idle residents are evicted, a resident whose turn is interrupted, or ends
  meanwhile, has no home any more, and nobody is admitted until it goes on, and the others with it. Then whoever is first in the order is:
  nobody has a context that would be lost.
- Where no turn completes for `silent_s`, whoever has waited so long is admitted whatever the room: nothing waits for a silent fleet.

Invariants (tests/unit/test_residents.py): after every event no replica over `FULL` has an idle resident; every waiting turn is admitted
exactly once or withdrawn; while somebody waits, every replica has residents and none of them outstays its rent. Time comes in by arguments
only. Cost per event: O(log n) for n live trajectories, and O(replicas).
Source: ThunderAgent (arXiv 2602.13692) for admitting programs rather than requests.
"""

from __future__ import annotations

from collections import Counter
from heapq import heappop, heappush
from itertools import count
from math import inf
from random import Random

from verl_heddle.fleet import Replica
from verl_heddle.schedule.admission import most_turns
from verl_heddle.schedule.resident import Home, Live, Order, Pauses, Rent, Rooms, current, tidy
from verl_heddle.trajectory import TurnEnd, TurnStart

ADMIT, FULL = 0.95, 1.0
"""Shares of a replica's KV cache: up to the first newcomers are admitted, over the second idle residents are evicted. The gap keeps one
turn's growth from evicting somebody for whom somebody else is admitted at once: with both at 1.0 five times as much is read again."""

MANY = 32
"""Replicas from which on arrays are quicker than going through them."""

MEMORY = 1000.0
"""Turns until the mean growth of a turn forgets by a factor e."""


class Residents:
    """The resident sets of all replicas.

    Args:
        order: which of the waiting goes first, which of the idle is evicted last.
        rng: for ties between replicas.
        silent_s: seconds without a completed turn after which who has waited so long is admitted whatever the room.
    """

    def __init__(self, order: Order, rng: Random, silent_s: float = inf) -> None:
        self._order, self._rng, self._silent_s = order, rng, silent_s
        self._homes: dict[str, Home] = {}
        self._rooms: Rooms | None = None
        """Of these homes, if they are many and somebody has had to find room."""
        self._rents: list[tuple[float, int, Live]] = []
        """Heap of idle residents by the time their rent runs out."""
        self._live: dict[str, Live] = {}
        self._queue: list[tuple[float, float, int, int, Live]] = []
        self._number = count()
        self._entry = count(1)
        self._growth = self._turns = 0.0
        self._holding = Rent()
        self._completed_s = -inf
        """When a turn last completed."""
        self._pauses = Pauses()
        self._admitted: dict[str, str] = {}
        self._put_out: dict[str, None] = {}
        self.counts: Counter[str] = Counter()
        """Evictions by reason, admissions."""
        self.now: Counter[str] = Counter()
        """Trajectories that are resident, those of them that are idle, and those that wait."""
        self._most: Counter[str] = Counter()

    # --- the fleet --------------------------------------------------------------------------------------------------------

    def add(self, replica: Replica, hold_s: float) -> None:
        """A replica joins, empty; `hold_s` is its t*."""
        self.remove(replica.name)
        self._rooms, most = None, most_turns(replica.slots, replica.calls)
        self._homes[replica.name] = Home(replica, inf if replica.kv_tokens is None else replica.kv_tokens, most, hold_s)
        self._fill()

    def hold(self, name: str, hold_s: float) -> None:
        """A replica's t* is known, or known better; residents whose tool runs keep what they were given."""
        if name in self._homes:
            self._homes[name].hold_s = hold_s

    def remove(self, name: str) -> None:
        """A replica leaves; its residents have no home any more. Their running turns end without it; those that have not been told that
        they may go wait again."""
        home = self._homes.pop(name, None)
        if home is not None:
            self._rooms = None
            for live in home.residents.values():
                self._busy(live)
                live.waiting = [request for request in sorted(live.running) if self._admitted.pop(request, None) is not None]
                live.home, live.running, live.own = None, set(), 0.0
                self._put_out[live.key] = None
                if live.waiting:
                    self._wait(live)
            self._change("resident", -len(home.residents))
            self._fill()

    def forget(self) -> int:
        """Nobody's context is to be counted on any more (the engines have dropped their caches): who is idle has no home; returns how many
        there were."""
        idle = [(home, live) for home in self._homes.values() for live in home.residents.values() if not live.running]
        for home, live in idle:
            self._leave(home, live)
            self._put_out[live.key], live.last = None, None
        self._fill()
        return len(idle)

    def pause(self, name: str, now: float) -> None:
        """A replica's engine takes no requests and loses its contexts, until `resume`; it may be away meanwhile."""
        self._pauses.begin(name, now)
        if name in self._homes:
            for live in self.idle(name):
                self._evict(self._homes[name], live, "wiped")
                live.last = None
            self._fill()

    def resume(self, name: str, now: float) -> None:
        """A replica's engine goes on; without effect where it does already."""
        if self._pauses.end(name, now):
            self._goes_on(now)

    def _goes_on(self, now: float) -> None:
        self._completed_s = max(self._completed_s, now)  # silence began with the pause
        self._fill()

    # --- events -----------------------------------------------------------------------------------------------------------

    def turn_started(self, turn: TurnStart, now: float) -> str | None:
        """Where the turn goes at once; None: it waits until `admitted` names it."""
        live = self._begins(turn, now)
        if live.home is not None:
            return self._runs(live, turn)
        self._wants(live, turn, now)
        self.tick(now)
        return self._admitted.pop(turn.request, None)

    def turn_begun(self, turn: TurnStart, name: str, now: float) -> None:
        """The turn runs on this replica, of which its worker had not heard otherwise. Counted there, unless the replica has left, or the
        trajectory has been admitted to another meanwhile."""
        live = self._begins(turn, now)
        if live.home is None and name in self._homes:
            self._wants(live, turn, now)
            self._admit(self._homes[name], live)
            self._admitted.pop(turn.request)
        elif live.home == name:
            self._runs(live, turn)

    def _begins(self, turn: TurnStart, now: float) -> Live:
        """Whose turn it is, as it begins."""
        key = turn.trajectory.key
        live = self._live.get(key)
        if live is None:
            number = next(self._number)
            batch = -inf if turn.trajectory.validate else turn.trajectory.step
            live = self._live[key] = Live(key, turn.trajectory.prompt, number, turn.context_tokens, turn.context_tokens, batch=batch)
        live.context, live.served = turn.context_tokens, max(live.served, turn.generated_tokens)
        if live.ended_s < inf:
            self._holding.measured(now - live.ended_s)
            live.ended_s = inf
        return live

    def _runs(self, live: Live, turn: TurnStart) -> str:
        """A resident's turn goes in."""
        assert live.home is not None
        home = self._homes[live.home]
        live.running.add(turn.request)
        home.running += 1
        self._busy(live)
        self._count(home, live)
        self._shrink(home)
        return live.home

    def _wants(self, live: Live, turn: TurnStart, now: float) -> None:
        """A turn of one without a home."""
        live.waiting.append(turn.request)
        if len(live.waiting) == 1:
            live.since_s = now
            self._wait(live)

    def turn_finished(self, turn: TurnEnd, now: float) -> None:
        """The turn is over or withdrawn."""
        live = self._live.get(turn.trajectory.key)
        if live is None:
            return
        self._admitted.pop(turn.request, None)
        if turn.request in live.waiting:
            live.waiting.remove(turn.request)
            if not live.waiting:
                self._change("waiting", -1)
            return
        live.served += turn.output_tokens
        live.context += turn.output_tokens
        if turn.completed:
            keep = 1 - 1 / MEMORY
            self._growth, self._turns = self._growth * keep + turn.before_tokens + turn.output_tokens, self._turns * keep + 1
            self._completed_s = now
        if live.home is None or turn.request not in live.running:  # its replica left meanwhile
            return
        home = self._homes[live.home]
        live.running.discard(turn.request)
        home.running -= 1
        if not live.running and (turn.interrupted or live.home in self._pauses):
            self._evict(home, live, "interrupted" if turn.interrupted else "wiped")
            live.last = None
            return self.tick(now)
        self._count(home, live)
        if not live.running:
            live.idle, live.ended_s = True, now
            self._change("idle", 1)
            live.entry = next(self._entry)
            heappush(home.idle, (-live.batch, -self._order(live), -live.number, live.entry, live))
            tidy(home.idle, len(home.residents))
            heappush(self._rents, (now + self._holding.hold_s(home.hold_s), live.entry, live))
            tidy(self._rents, self.now["idle"])
        self._shrink(home)
        self.tick(now)

    def trajectory_ended(self, key: str, now: float) -> None:
        """The trajectory is over, whether its turns have been answered or not."""
        live = self._live.pop(key, None)
        self._put_out.pop(key, None)
        if live is None:
            return
        if live.waiting:
            live.waiting.clear()
            self._change("waiting", -1)
        if live.home is not None:
            home = self._homes[live.home]
            home.running -= len(live.running)
            for request in live.running:
                self._admitted.pop(request, None)
            self._leave(home, live)
        self.tick(now)

    def tick(self, now: float) -> None:
        """Rents may have run out: evict whom it pays to evict, admit whom there is room for."""
        if self._pauses.tick(now):
            self._goes_on(now)
        self._fill()
        while self._head() is not None and self._rent_s() <= now:
            *_, live = heappop(self._rents)
            assert live.home is not None
            self._evict(self._homes[live.home], live, "rent")
            self._fill()
        while (head := self._head()) is not None and self._overdue_s(head) <= now:
            heappop(self._queue)
            self._admit(min(self._at_work(), key=lambda home: home.running), head)
            self.counts["overdue"] += 1

    def due_s(self) -> float:
        """When `tick` should be called next if no event comes before; inf: no need."""
        if (head := self._head()) is None:
            return inf
        return min(self._pauses.due_s(self._homes), self._overdue_s(head), self._rent_s())

    def _overdue_s(self, live: Live) -> float:
        if not self._homes or self._pauses.all(self._homes):
            return inf
        return max(live.since_s, self._completed_s) + self._silent_s

    def _at_work(self) -> list[Home]:
        return [home for name, home in self._homes.items() if name not in self._pauses]

    def admitted(self) -> list[tuple[str, str]]:
        """(turn, replica) of those admitted since the last call."""
        result, self._admitted = list(self._admitted.items()), {}
        return result

    def put_out(self) -> list[str]:
        """Trajectories that have lost their home since the last call; some may have another by now."""
        result, self._put_out = list(self._put_out), {}
        return result

    # --- what is known ----------------------------------------------------------------------------------------------------

    @property
    def waits(self) -> bool:
        """Whether a turn waits for admission."""
        return self._head() is not None

    def metrics(self) -> dict[str, int]:
        """Counts since the start: admissions, evictions by reason. And the most residents, idle ones and waiting trajectories at a time
        since the last call."""
        most, self._most = self._most, Counter(self.now)
        names = ("admitted", "full", "rent", "wiped", "interrupted")
        return {name: self.counts[name] for name in names} | {f"most_{name}": most[name] for name in ("resident", "idle", "waiting")}

    def homes(self) -> list[str]:
        """Names of the replicas."""
        return list(self._homes)

    def home_of(self, key: str) -> str | None:
        """Where a trajectory is resident."""
        live = self._live.get(key)
        return None if live is None else live.home

    def stays(self, key: str) -> bool:
        """Whether a trajectory's next turns run at its home, until `put_out` names it."""
        return self.home_of(key) is not None

    def number_of(self, key: str) -> int:
        """Order of a live trajectory's first turn."""
        return self._live[key].number

    def residents(self, name: str) -> list[Live]:
        """Residents of a replica."""
        return list(self._homes[name].residents.values())

    def idle(self, name: str) -> list[Live]:
        """Its residents that have no turn."""
        return [live for live in self.residents(name) if not live.running]

    def used(self, name: str) -> float:
        """Tokens counted against its KV cache."""
        return self._homes[name].used

    def _change(self, name: str, by: int) -> None:
        self.now[name] += by
        self._most[name] = max(self._most[name], self.now[name])

    # --- how --------------------------------------------------------------------------------------------------------------

    def _count(self, home: Home, live: Live) -> None:
        """Count a resident's footprint anew."""
        growth = self._growth / self._turns if self._turns else 0.0
        own = max(0, live.context - live.prompt_tokens) + growth * len(live.running)
        home.used += own - live.own
        live.own = own
        if self._rooms is not None:
            self._rooms.changed(home)

    def _busy(self, live: Live) -> None:
        """A resident has a turn, or is none any more."""
        if live.idle:
            live.idle = False
            self._change("idle", -1)

    def _wait(self, live: Live) -> None:
        self._change("waiting", 1)
        live.entry = next(self._entry)
        heappush(self._queue, (live.batch, self._order(live), live.number, live.entry, live))

    def _head(self) -> Live | None:
        queue = self._queue
        while queue:
            *_, entry, live = queue[0]
            if live.entry == entry and live.waiting and live.home is None:
                return live
            heappop(queue)
        return None

    def _rent_s(self) -> float:
        """When the next rent runs out."""
        rents = self._rents
        while rents and not current(rents[0]):
            heappop(rents)
        return rents[0][0] if rents else inf

    def _fill(self) -> None:
        """Admit the waiting in order while there is room for the first."""
        if self._pauses.settling(self._homes):
            return
        while (live := self._head()) is not None:
            home = self._room(live)
            if home is None:
                return
            heappop(self._queue)
            self._admit(home, live)

    def _room(self, live: Live) -> Home | None:
        growth = self._growth / self._turns if self._turns else 0.0
        own = max(0, live.context - live.prompt_tokens) + growth
        fewest, found = inf, list[Home]()
        if len(self._homes) > MANY:
            self._rooms = self._rooms or Rooms(self._homes.values(), ADMIT)
            found = self._rooms.find(own, live.prompt, live.prompt_tokens, self._pauses, live.last)
            if found and found[0].replica.name == live.last:
                return found[0]
            return self._rng.choice(found) if found else None
        for name, home in self._homes.items():
            need = own + (0 if live.prompt in home.prompts else live.prompt_tokens)
            if name in self._pauses:
                continue
            if home.residents and (home.used + need > home.capacity * ADMIT or len(home.residents) >= home.most):
                continue
            if name == live.last:
                return home
            if home.running <= fewest:
                found = [home] if home.running < fewest else [*found, home]
                fewest = home.running
        return self._rng.choice(found) if found else None

    def _admit(self, home: Home, live: Live) -> None:
        name = home.replica.name
        live.home, live.own = name, 0.0
        live.running = set(live.waiting)
        home.running += len(live.running)
        sharing, tokens = home.prompts.get(live.prompt, (0, live.prompt_tokens))
        home.prompts[live.prompt] = (sharing + 1, tokens)
        home.used += 0 if sharing else tokens
        home.residents[live.key] = live
        if self._rooms is not None:
            self._rooms.changed(home, live.prompt)
        self._count(home, live)
        self._admitted |= dict.fromkeys(live.waiting, name)
        live.waiting.clear()
        self._change("waiting", -1)
        self._change("resident", 1)
        self.counts["admitted"] += 1
        self._shrink(home)

    def _shrink(self, home: Home) -> None:
        """Contexts have grown over the capacity: evict idle residents, the last in the order first."""
        while home.used > home.capacity * FULL and home.idle:
            item = heappop(home.idle)
            if current(item):
                self._evict(home, item[-1], "full")

    def _evict(self, home: Home, live: Live, why: str) -> None:
        self.counts[why] += 1
        self._leave(home, live)
        self._put_out[live.key] = None

    def _leave(self, home: Home, live: Live) -> None:
        name = home.replica.name
        del home.residents[live.key]
        home.used -= live.own
        sharing, tokens = home.prompts.pop(live.prompt)
        if sharing > 1:
            home.prompts[live.prompt] = (sharing - 1, tokens)
        else:
            home.used -= tokens
        if not home.residents:
            home.used = 0.0  # but for rounding, it is
        if self._rooms is not None:
            self._rooms.changed(home, live.prompt)
        self._busy(live)
        self._change("resident", -1)
        live.home, live.last, live.own, live.running = None, name, 0.0, set()
