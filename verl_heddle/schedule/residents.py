"""The resident sets: which trajectories each replica keeps, so that their contexts are not prefilled again after every tool call.

A trajectory is *resident* on a replica from its admission until it ends or is evicted. Its context stays counted against the replica's KV
cache through its tool calls, so that its next turn finds the context there. A trajectory that is not resident is assigned to no replica.

Law
- Footprint: the context of a trajectory, plus the mean growth of a turn while one runs. A prompt counts once per replica, however many
  samples share it.
- Admission: waiting trajectories are admitted in order: validation, then by training step, then by the policy's order. The first is
  admitted to a replica with room, that is, with footprints within `ADMIT` of its KV cache; slots are left to vLLM. Preferred is the
  replica that held its context last, then, as in verl, one of those with the fewest turns in flight. A replica without residents accepts
  any trajectory, so that none waits forever.
- A resident's turn goes in at once, so its worker need not ask (`put_out` says when it must again). If such a turn begins while its
  trajectory is being evicted, the trajectory becomes resident there again, whatever the room.
- Holding is renting (`resident.Rent`): an idle resident is held for t*, or not at all if recent tool calls were too long for that; then it
  is evicted if a trajectory waits.
- Over `FULL` (contexts grow) idle residents are evicted, the last in the order first.
- A weight update pauses an engine and wipes its contexts. Its idle residents are evicted, and so is a resident whose turn is interrupted
  or ends during the pause. Nothing is admitted there until the engine resumes and the others have too (`resident.Pauses`); then admission
  is in order, since no trajectory has a context to lose.
- If no turn completes for `silent_s`, trajectories that have waited that long are admitted whatever the room: a silent fleet does not
  keep them waiting.

Invariants (tests/unit/test_residents.py): after every event no replica over `FULL` has an idle resident; every waiting turn is admitted
exactly once or withdrawn; while a trajectory waits, every replica has residents and none is held beyond its t*. Times are arguments. Cost
per event: O(log n) for n live trajectories, and O(replicas).
Source: ThunderAgent (arXiv 2602.13692) for admitting programs rather than requests.
"""

from __future__ import annotations

from collections import Counter
from itertools import count
from math import inf
from random import Random

from verl_heddle.fleet import Replica
from verl_heddle.schedule.admission import most_turns
from verl_heddle.schedule.resident import Growth, Live, Order, Pauses, Queue, Rent, ReplicaState, Rooms, find_room
from verl_heddle.trajectory import TurnEnd, TurnStart

ADMIT, FULL = 0.95, 1.0
"""Shares of a replica's KV cache: trajectories are admitted up to the first, idle residents are evicted over the second. The gap keeps one
turn's growth from evicting a trajectory in whose place another is admitted at once: with both at 1.0 five times as much is recomputed."""

MANY = 32
"""Replicas above which the search for room is faster on arrays."""


class Residents:
    """The resident sets of all replicas.

    Args:
        order: order of admission; idle residents are evicted in the reverse order.
        rng: for ties between replicas.
        silent_s: seconds without a completed turn after which trajectories that have waited that long are admitted whatever the room.
    """

    def __init__(self, order: Order, rng: Random, silent_s: float = inf) -> None:
        self._order, self._rng, self._silent_s = order, rng, silent_s
        self._homes: dict[str, ReplicaState] = {}
        self._rooms: Rooms | None = None
        """Arrays for the search for room; None until a search needs them."""
        self._live: dict[str, Live] = {}
        self._queue = Queue(order)
        self._number = count()
        self._entry = count(1)
        self._growth = Growth()
        self._rents = Rent()
        self._completed_s = -inf
        """When a turn last completed."""
        self._pauses = Pauses()
        self._admitted: dict[str, str] = {}
        self._put_out: dict[str, None] = {}
        self.counts: Counter[str] = Counter()
        """Admissions, and evictions by reason."""
        self.now: Counter[str] = Counter()
        """Resident, idle and waiting trajectories; idle ones are resident."""
        self._most: Counter[str] = Counter()

    # --- the fleet --------------------------------------------------------------------------------------------------------

    def add(self, replica: Replica, hold_s: float) -> None:
        """A replica joins without residents; `hold_s` is its t*."""
        self.remove(replica.name)
        self._rooms, most = None, most_turns(replica.slots, replica.calls)
        self._homes[replica.name] = ReplicaState(replica, inf if replica.kv_tokens is None else replica.kv_tokens, most, hold_s)
        self._fill()

    def hold(self, name: str, hold_s: float) -> None:
        """Update a replica's t*; residents in a tool call keep the hold time they have."""
        if name in self._homes:
            self._homes[name].hold_s = hold_s

    def remove(self, name: str) -> None:
        """A replica leaves, and its residents are assigned to none. Their running turns end without it; turns that were admitted but not
        yet reported by `admitted` wait again."""
        home = self._homes.pop(name, None)
        if home is not None:
            self._rooms = None
            for live in home.residents.values():
                self._not_idle(live)
                live.waiting = [request for request in sorted(live.running) if self._admitted.pop(request, None) is not None]
                live.home, live.running, live.own = None, set(), 0.0
                self._put_out[live.key] = None
                if live.waiting:
                    self._wait(live)
            self._change("resident", -len(home.residents))
            self._fill()

    def forget(self) -> int:
        """The engines have dropped their caches: release idle residents; returns how many there were."""
        idle = [(home, live) for home in self._homes.values() for live in home.residents.values() if not live.running]
        for home, live in idle:
            self._leave(home, live)
            self._put_out[live.key], live.last = None, None
        self._fill()
        return len(idle)

    def pause(self, name: str, now: float) -> None:
        """A replica's engine takes no requests and loses its contexts until `resume`; the replica may be outside the fleet."""
        self._pauses.begin(name, now)
        if name in self._homes:
            for live in self.idle(name):
                self._evict(self._homes[name], live, "wiped")
                live.last = None
            self._fill()

    def resume(self, name: str, now: float) -> None:
        """A replica's engine takes requests again; without effect if it is not paused."""
        if self._pauses.end(name, now):
            self._resumed(now)

    def _resumed(self, now: float) -> None:
        self._completed_s = max(self._completed_s, now)  # the pause does not count as silence
        self._fill()

    # --- events -----------------------------------------------------------------------------------------------------------

    def turn_started(self, turn: TurnStart, now: float) -> str | None:
        """The replica where the turn runs at once; None: it waits until `admitted` names it."""
        live = self._update(turn, now)
        if live.home is not None:
            return self._run(live, turn)
        self._enqueue(live, turn, now)
        self.tick(now)
        return self._admitted.pop(turn.request, None)

    def turn_begun(self, turn: TurnStart, name: str, now: float) -> None:
        """The turn already runs on this replica, because its worker had not learned of an eviction. It is counted there, unless the replica
        has left or the trajectory has been admitted to a different one."""
        live = self._update(turn, now)
        if live.home is None and name in self._homes:
            self._enqueue(live, turn, now)
            self._admit(self._homes[name], live)
            self._admitted.pop(turn.request)
        elif live.home == name:
            self._run(live, turn)

    def _update(self, turn: TurnStart, now: float) -> Live:
        """The turn's trajectory, updated by its start."""
        key = turn.trajectory.key
        live = self._live.get(key)
        if live is None:
            number = next(self._number)
            batch = -inf if turn.trajectory.validate else turn.trajectory.step
            live = self._live[key] = Live(key, turn.trajectory.prompt, number, turn.context_tokens, turn.context_tokens, batch=batch)
        live.context, live.served = turn.context_tokens, max(live.served, turn.generated_tokens)
        if live.ended_s < inf:
            self._rents.measured(now - live.ended_s)
            live.ended_s = inf
        return live

    def _run(self, live: Live, turn: TurnStart) -> str:
        """Start a resident's turn."""
        assert live.home is not None
        home = self._homes[live.home]
        live.running.add(turn.request)
        home.running += 1
        self._not_idle(live)
        self._count(home, live)
        self._shrink(home)
        return live.home

    def _enqueue(self, live: Live, turn: TurnStart, now: float) -> None:
        """Hold a turn whose trajectory is not resident."""
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
            self._growth.turn(turn)
            self._completed_s = now
        if live.home is None or turn.request not in live.running:  # its replica has left
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
            home.push_idle(live, self._order)
            self._rents.push(live, now, home.hold_s, self.now["idle"])
        self._shrink(home)
        self.tick(now)

    def trajectory_ended(self, key: str, now: float) -> None:
        """The trajectory is over, whether or not its turns have been answered."""
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
        """Time has passed: evict residents held for longer than t* if that helps a waiting trajectory, and admit what fits."""
        if self._pauses.tick(now):
            self._resumed(now)
        self._fill()
        while self._queue.head() is not None and self._rents.due_s() <= now:
            live = self._rents.pop()
            assert live.home is not None
            self._evict(self._homes[live.home], live, "rent")
            self._fill()
        while (head := self._queue.head()) is not None and self._overdue_s(head) <= now:
            self._queue.pop()
            at_work = [home for name, home in self._homes.items() if name not in self._pauses]
            self._admit(min(at_work, key=lambda home: home.running), head)
            self.counts["overdue"] += 1

    def due_s(self) -> float:
        """When to call `tick` next if no event comes before; inf: not needed."""
        if (head := self._queue.head()) is None:
            return inf
        return min(self._pauses.due_s(self._homes), self._overdue_s(head), self._rents.due_s())

    def _overdue_s(self, live: Live) -> float:
        if not self._homes or self._pauses.all(self._homes):
            return inf
        return max(live.since_s, self._completed_s) + self._silent_s

    def admitted(self) -> list[tuple[str, str]]:
        """(turn, replica) of the turns admitted since the last call."""
        result, self._admitted = list(self._admitted.items()), {}
        return result

    def put_out(self) -> list[str]:
        """Trajectories evicted or released since the last call; some may be resident again."""
        result, self._put_out = list(self._put_out), {}
        return result

    # --- state ------------------------------------------------------------------------------------------------------------

    @property
    def waits(self) -> bool:
        """Whether a turn waits for admission."""
        return self._queue.head() is not None

    def metrics(self) -> dict[str, int]:
        """Admissions and evictions by reason since the start; and the maxima of resident, idle and waiting trajectories since the last
        call."""
        most, self._most = self._most, Counter(self.now)
        names = ("admitted", "full", "rent", "wiped", "interrupted")
        return {name: self.counts[name] for name in names} | {f"most_{name}": most[name] for name in ("resident", "idle", "waiting")}

    def homes(self) -> list[str]:
        """Names of the replicas."""
        return list(self._homes)

    def home_of(self, key: str) -> str | None:
        """The replica on which a trajectory is resident."""
        live = self._live.get(key)
        return None if live is None else live.home

    def stays(self, key: str) -> bool:
        """Whether a trajectory's next turns run on its replica until `put_out` names it."""
        return self.home_of(key) is not None

    def residents(self, name: str) -> list[Live]:
        """Residents of a replica."""
        return list(self._homes[name].residents.values())

    def idle(self, name: str) -> list[Live]:
        """Residents of a replica that have no turn."""
        return [live for live in self.residents(name) if not live.running]

    def used(self, name: str) -> float:
        """Tokens counted against a replica's KV cache."""
        return self._homes[name].used

    def _change(self, name: str, by: int) -> None:
        self.now[name] += by
        self._most[name] = max(self._most[name], self.now[name])

    # --- admission and eviction -------------------------------------------------------------------------------------------

    def _count(self, home: ReplicaState, live: Live) -> None:
        """Update a resident's footprint."""
        own = max(0, live.context - live.prompt_tokens) + self._growth.tokens() * len(live.running)
        home.used += own - live.own
        live.own = own
        if self._rooms is not None:
            self._rooms.changed(home)

    def _not_idle(self, live: Live) -> None:
        """A resident starts a turn, or stops being one."""
        if live.idle:
            live.idle = False
            self._change("idle", -1)

    def _wait(self, live: Live) -> None:
        self._change("waiting", 1)
        live.entry = next(self._entry)
        self._queue.push(live)

    def _fill(self) -> None:
        """Admit waiting trajectories in order until the first does not fit."""
        if self._pauses.settling(self._homes):
            return
        while (live := self._queue.head()) is not None:
            home = self._room(live)
            if home is None:
                return
            self._queue.pop()
            self._admit(home, live)

    def _room(self, live: Live) -> ReplicaState | None:
        own = max(0, live.context - live.prompt_tokens) + self._growth.tokens()
        if len(self._homes) > MANY:
            self._rooms = self._rooms or Rooms(self._homes.values(), ADMIT)
            found = self._rooms.find(own, live, self._pauses)
        else:
            found = find_room(self._homes, ADMIT, own, live, self._pauses)
        if found and found[0].replica.name == live.last:
            return found[0]
        return self._rng.choice(found) if found else None

    def _admit(self, home: ReplicaState, live: Live) -> None:
        name = home.replica.name
        live.home, live.own = name, 0.0
        live.running = set(live.waiting)
        home.running += len(live.running)
        home.add(live)
        if self._rooms is not None:
            self._rooms.changed(home, live.prompt)
        self._count(home, live)
        self._admitted |= dict.fromkeys(live.waiting, name)
        live.waiting.clear()
        self._change("waiting", -1)
        self._change("resident", 1)
        self.counts["admitted"] += 1
        self._shrink(home)

    def _shrink(self, home: ReplicaState) -> None:
        """Evict idle residents, the last in the order first, while contexts exceed the capacity."""
        while home.used > home.capacity * FULL and (live := home.pop_idle()) is not None:
            self._evict(home, live, "full")

    def _evict(self, home: ReplicaState, live: Live, why: str) -> None:
        self.counts[why] += 1
        self._leave(home, live)
        self._put_out[live.key] = None

    def _leave(self, home: ReplicaState, live: Live) -> None:
        name = home.replica.name
        home.remove(live)
        if self._rooms is not None:
            self._rooms.changed(home, live.prompt)
        self._not_idle(live)
        self._change("resident", -1)
        live.home, live.last, live.own, live.running = None, name, 0.0, set()
