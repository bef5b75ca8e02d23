"""The one object that decides, in the cluster and in the simulator alike: events in, decisions out.

A pure state machine. It owns no task, socket, clock or thread; the caller serialises its calls and passes the time. Each question has
one policy in one file (`predict`, `schedule`, `place`); this file only asks them in the right order. Which replicas there are (`layout`)
and how many samples a prompt gets (`shape`) is decided between steps, by the manager.

Invariants
- every `turn_started` is answered by one `turn_finished`, completed or not, and a second one has no effect; a trajectory may have several
  turns under way; in-flight counts return to zero when all have been answered, and when `step_ended` has closed what nobody will answer;
- a held turn is named by `admitted` exactly once, unless its `turn_finished` comes first;
- a trajectory that `stays` is named by `put_out` before its next `turn_started` is answered with another replica; until then that turn may
  as well be told, by `turn_begun`, as asked;
- requests in flight are the open turns, by replica: `turns.recount` makes it so again where a policy has raised in between;
- a pre-warm is ordered by `prewarms` at most once per move, and is over with the trajectory's next `turn_started`;
- a conversation stays on its replica for as long as its trajectory lives, unless the replica leaves, or the trajectory is evicted or moved;
- decisions depend on the events, their times and the seed only: the same sequence gives the same decisions;
- with `observe`, or `priority.enable=False`, `place.enable=False`, `residents.enable=False` and no bound on admission, the decisions are
  those of stock verl; so is the placement of resident sets while there is room for all, and planned placement until there are step times
  to plan with (`step_times_known`). One exception without `observe`: stock verl forgets the replica of a conversation once
  `sticky.CACHE_SIZE` others have asked since;
- so they are for trajectories that begin while resident sets rest (`rest`);
- where the host keeps what replicas evict (`Replica.tier`), resident sets rest, and verl's rule decides: what they save costs little
  there, and they lost up to 14 % to stock with the same tier.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import ceil, inf
from random import Random

from verl_heddle.fleet import BATCH_TOKENS, Replica
from verl_heddle.options import Options
from verl_heddle.place.decisions import LAST_PRIORITY, Expected, Transfer, Transfers
from verl_heddle.place.pace import Latency
from verl_heddle.place.replan import Replanner
from verl_heddle.place.sticky import StickyLeastInflight
from verl_heddle.predict.predictor import Predictor
from verl_heddle.predict.quantities import Estimate
from verl_heddle.schedule.admission import Admission, most_turns
from verl_heddle.schedule.priority import VALIDATION, Pace, longest_first, work_tokens
from verl_heddle.schedule.resident import ORDERS
from verl_heddle.schedule.residents import Residents
from verl_heddle.trajectory import Decision, Prewarm, Reason, ToolStart, TrajectoryEnd, TurnEnd, TurnStart
from verl_heddle.turns import Life, OpenTurn, OpenTurns

FIRST_HOLD_S = 15.0
"""How long a context is held through a tool call before step times are known: the KV cache of an H200 is read in 5 to 40 s, by model and
degree."""

SLICE = 256
"""Turns that one `reprioritised` predicts anew: 5 ms, in which no turn is answered."""


class Orchestrator:
    """Decides where and how urgently each turn runs. See `Options` for what can be tuned.

    Args:
        options: the user's settings; `observe` switches every policy but verl's own placement off.
        deterministic: verl's `rollout.full_determinism`: place by hash of the conversation id.
        cap_tokens: most tokens a trajectory may generate (verl's `rollout.response_length`); None: no cap known.
    """

    def __init__(self, options: Options, deterministic: bool = False, cap_tokens: int | None = None) -> None:
        self._options = options
        self._decides = not options.observe
        self._orders = self._decides and options.priority.enable
        self._plans = self._decides and options.place.enable
        self._placement = Replanner(None, Random(options.seed), deterministic, cap_tokens, moves=options.place.moves)
        self._transfers = Transfers()
        self.predictor = Predictor(cap_tokens) if options.predicts else None
        """What is known of lengths; None when nobody asks for it."""
        self.residents: Residents | None = None
        """Which trajectories each replica keeps; None: turns go where `place` says, bounded by `admission`."""
        self.admission: Admission | None = None
        if options.admits and not deterministic:
            self.residents = Residents(ORDERS[options.residents.order], Random(options.seed), options.admission.hold_s)
        elif self._decides and options.admission.per_slot:
            self.admission = Admission(options.admission.hold_s)
        self._latency: Latency | None = None
        self._pace = Pace()
        self._replicas: dict[str, Replica] = {}
        self._rests = False
        """Whether resident sets rest for trajectories that begin."""
        self._tiered = False
        """Whether the host keeps what some replica evicts."""
        self._lives: dict[str, Life] = {}
        """By trajectory key."""
        self.turns = OpenTurns(self._placement.rule)
        """Under way."""
        self._refreshes = self._orders and options.priority.order == "longest" and options.priority.refresh_s > 0
        self._changed: dict[str, None] = {}
        """Groups with open turns of which a trajectory has ended since the last refresh."""
        self._refreshing: deque[str] = deque()
        """Requests of which the refresh under way has still to predict."""
        self._refreshed_s = float("-inf")
        self.counts: Counter[str] = Counter()
        """Decisions by reason since the start of the run."""

    @property
    def inflight(self) -> dict[str, int]:
        """Requests in flight by replica name."""
        return dict(self._placement.inflight)

    @property
    def rule(self) -> StickyLeastInflight:
        """verl's own, on the orchestrator's count of what is in flight: for whoever knows no turns."""
        return self._placement.rule

    @property
    def replicas(self) -> dict[str, Replica]:
        """The fleet, by name."""
        return dict(self._replicas)

    def replicas_added(self, replicas: Iterable[Replica]) -> None:
        """Replicas joined the fleet, empty."""
        for replica in replicas:
            self._replicas[replica.name] = replica
            self._placement.add(replica)
            if self.residents is not None:
                self.residents.add(replica, self._hold_s(replica))
            if self.admission is not None:
                bound = ceil(self._options.admission.per_slot * replica.slots)
                self.admission.add(replica.name, bound, most_turns(replica.slots, replica.calls))
        self._tiered = any(replica.tier for replica in self._replicas.values())

    def replicas_removed(self, names: Iterable[str]) -> None:
        """Replicas left the fleet; their conversations move at the next turn."""
        for name in names:
            self._replicas.pop(name, None)
            self._placement.remove(name)
            self._transfers.removed(name)
            if self.residents is not None:
                self.residents.remove(name)
            if self.admission is not None:
                self.admission.remove(name)
        self._tiered = any(replica.tier for replica in self._replicas.values())

    def paused(self, name: str, now: float) -> None:
        """A weight update stops this replica's engine and wipes its contexts; turns under way there are interrupted. Whether it is in the
        fleet at the moment or comes back to it later: nobody is admitted there before `resumed`."""
        if self.residents is not None:
            self.residents.pause(name, now)

    def resumed(self, name: str, now: float) -> None:
        """The replica's engine goes on."""
        if self.residents is not None:
            self.residents.resume(name, now)

    def rest(self, rests: bool, now: float) -> None:
        """Resident sets rest, or decide again, for trajectories that begin from now on (`twin.choice`)."""
        self._rests = rests

    def homes_forgotten(self) -> int:
        """Forget where conversations live (verl's `clear_sticky_cache`); returns how many there were."""
        for life in self._lives.values():
            life.homes.clear()
        if self.residents is not None:
            self.residents.forget()
        return self._placement.forget()

    def step_times_known(self, latency: Latency | None) -> None:
        """The times of the model on these replicas have been learnt, or learnt anew: placement is planned with them from now on, and
        contexts are held for as long as they say. None: they are not known any more."""
        self._latency = latency
        if self._plans:
            self._placement.learn(latency)
        if self.residents is not None:
            for name, replica in self._replicas.items():
                self.residents.hold(name, self._hold_s(replica))

    def _hold_s(self, replica: Replica) -> float:
        """For how long it pays to hold a context through a tool call: the time in which the replica reads its whole KV cache, full steps at
        a time."""
        if not replica.caches:
            return 0.0
        if replica.kv_tokens is None:
            return inf
        if self._latency is None:
            return FIRST_HOLD_S
        return replica.kv_tokens / BATCH_TOKENS * float(self._latency.prefill_s(replica.tp, BATCH_TOKENS))

    def batch_expected(self, batch: Sequence[TurnStart], now: float) -> None:
        """These first turns are about to start, their `context_tokens` perhaps a guess: time to place them as a whole. Optional."""
        if self.predictor is None or not self._placement.plans:
            return
        expected = []
        for turn in batch:
            self.predictor.turn_started(turn)
            expected.append(Expected(turn.trajectory, turn.context_tokens, self.predictor.predict(turn.trajectory.key)))
        self._placement.expect(expected)

    def turn_started(self, turn: TurnStart, now: float) -> Decision:
        """A trajectory wants to generate: where, and how urgently? Who asks again has not heard the answer: what it was is void.

        Raises:
            RuntimeError: the fleet is empty.
        """
        return self._start(turn, now)

    def turn_begun(self, turn: TurnStart, replica: str, now: float) -> None:
        """A turn of a trajectory that `stays` runs there. Where the trajectory has been put out meanwhile, it has come back."""
        self._start(turn, now, replica)

    def stays(self, key: str) -> bool:
        """Whether the trajectory's next turns run where it is now, and as urgently, whatever they tell when they begin: until `put_out`
        names it, they need not be asked for."""
        return self.residents is not None and self.predictor is None and not self._tiered and self.residents.stays(key)

    def put_out(self) -> list[str]:
        """Keys of trajectories that do not stay any more. To be asked after every event."""
        return [] if self.residents is None else self.residents.put_out()

    def _start(self, turn: TurnStart, now: float, at: str | None = None) -> Decision:
        if (before := self.turns.get(turn.request)) is not None:
            self._void(before, now)
        key, estimate, life = turn.trajectory.key, None, None
        if turn.trajectory.prompt:  # a request outside any trajectory has no prompt, and never ends
            life = self._started(turn)
            if self.predictor is not None:
                self.predictor.turn_started(turn)
                estimate = self.predictor.predict(key)
        priority = self._priority(turn, life, None if estimate is None else (estimate.median_tokens, estimate.tool_s))
        self._transfers.over(key)
        replica, reason, held = self._where(turn, life, estimate, priority, now) if at is None else self._there(turn, life, at, now)
        self.counts[reason] += 1
        self.turns.add(OpenTurn(turn, replica, priority, life))
        if life is not None:
            life.homes[turn.conversation] = replica
            life.open.add(turn.request)
        if estimate is None:
            return Decision(replica, priority, reason, held=held, stays=not held and life is not None and self.stays(key))
        return Decision(replica, priority, reason, estimate.median_tokens, estimate.upper_tokens, held)

    def _where(self, turn: TurnStart, life: Life | None, estimate: Estimate | None, priority: int, now: float) -> tuple[str, Reason, bool]:
        """Replica, why, and whether the turn is held."""
        if self.residents is not None and life is not None and self._replicas and not (self._tiered or life.plain):
            resident = self.residents.home_of(turn.trajectory.key) is not None
            replica = self.residents.turn_started(turn, now)
            if replica is not None:
                self._placement.acquire(turn, None, replica)
            return replica or "", Reason.STICKY if resident else Reason.ADMITTED, replica is None
        home = life.homes.get(turn.conversation) if life is not None and self._decides else None
        replica, reason = self._placement.acquire(turn, estimate, home)
        begun = turn.generated_tokens > 0
        return replica, reason, self.admission is not None and not self.admission.ask(turn.request, replica, priority, now, begun)

    def _there(self, turn: TurnStart, life: Life | None, at: str, now: float) -> tuple[str, Reason, bool]:
        """As `_where`, of a turn that is on its way to `at`."""
        if self.residents is not None and life is not None and not (self._tiered or life.plain):
            self.residents.turn_begun(turn, at, now)
        if at in self._replicas:
            self._placement.rule.note(turn.conversation, at)
        return at, Reason.STICKY, False

    def turn_finished(self, turn: TurnEnd, now: float) -> None:
        """The engine is done with the turn, or it gave up waiting. Without effect if the turn is not under way."""
        opened = self.turns.close(turn.request)
        if opened is not None:
            if turn.replica != opened.replica:  # its worker went away before it heard where it had been let in
                turn = replace(turn, replica=opened.replica)
            self._close(opened, turn, now)

    def _void(self, opened: OpenTurn, now: float) -> None:
        turn = opened.turn
        self.turn_finished(TurnEnd(turn.trajectory, turn.conversation, opened.replica, turn.turn, 0, False, leg=turn.leg), now)

    def _close(self, opened: OpenTurn, turn: TurnEnd, now: float) -> None:
        if turn.trajectory.uid not in self.turns.groups:
            self._changed.pop(turn.trajectory.uid, None)
        if opened.life is not None:
            opened.life.open.discard(turn.request)
        if self.admission is not None:
            self.admission.left(turn.request, turn.replica, now if turn.completed else None)
        if self.residents is not None:
            self.residents.turn_finished(turn, now)
        if turn.completed:
            self._pace.turn(turn.output_tokens, turn.engine_s)
        estimate = None
        if self.predictor is not None:
            self.predictor.turn_finished(turn)
            if self._placement.plans and turn.completed:
                estimate = self.predictor.predict(turn.trajectory.key)
        alone = opened.life is None or not opened.life.open
        move = self._placement.release(turn, estimate, alone)
        if move is not None and estimate is not None and self._options.place.transport == "prewarm":
            self._transfers.ask(Transfer(move.trajectory, move.replica, (move.replica,), estimate.median_tokens))

    def transferred(self, key: str, now: float) -> None:
        """The pre-warm of this trajectory is done, or was given up."""
        self._transfers.over(key)

    def prewarms(self, now: float) -> list[Prewarm]:
        """Contexts to be read on the replicas their trajectories move to, from now on. To be asked after every event."""
        return [Prewarm(one.key, one.target, LAST_PRIORITY) for one in self._transfers.start()]

    def awaits_transfer(self, key: str) -> bool:
        """Whether a pre-warm of this trajectory is waiting or under way."""
        return key in self._transfers

    def tool_started(self, start: ToolStart, now: float) -> None:
        """A tool runs; the trajectory's estimate takes its name in."""
        if self.predictor is not None:
            self.predictor.tool_started(start)

    def trajectory_ended(self, end: TrajectoryEnd, now: float) -> None:
        """The episode is over; what it teaches goes into the history (validation runs under other sampling, so it teaches nothing)."""
        self._forget(end.trajectory.key, now)
        self._placement.ended(end)
        if self.predictor is not None:
            self.predictor.trajectory_ended(end)
            if self._refreshes and end.trajectory.uid in self.turns.groups:
                self._changed[end.trajectory.uid] = None

    def step_ended(self, step: int, now: float) -> int:
        """The batch of a training step is complete: forget trajectories of earlier steps that never ended, and their turns; returns how
        many trajectories there were."""
        lost = {key for key, life in self._lives.items() if life.who.step < step}
        if self.predictor is not None:
            lost.update(self.predictor.abandon_before(step))  # those that were announced and never began, too
        for opened in [one for one in self.turns if one.life is not None and one.life.who.step < step]:
            self._void(opened, now)
        for key in lost:
            self._forget(key, now)
            self._placement.abandon(key)
        return len(lost)

    def metrics(self) -> dict[str, float]:
        """What the planner thinks of itself, as `place/...`, and the resident sets, as `residents/...`; empty while verl's rule places."""
        result = {f"place/{name}": value for name, value in self._placement.metrics().items()} if self._placement.plans else {}
        if self.residents is not None:
            result |= {f"residents/{name}": float(count) for name, count in self.residents.metrics().items()}
        return result

    def admitted(self, now: float) -> list[tuple[str, str]]:
        """(request, replica) of those that were held and may go. To be asked after every event, and after `tick`."""
        if self.residents is not None:
            result = []
            for request, replica in self.residents.admitted():
                opened = self.turns.get(request)
                if opened is None or opened.replica:  # verl's rule has taken over after a policy raised
                    continue
                opened.replica = replica
                if opened.life is not None:
                    opened.life.homes[opened.turn.conversation] = replica
                self._placement.acquire(opened.turn, None, replica)
                result.append((request, replica))
            return result
        if self.admission is None:
            return []
        let_in = map(self.turns.get, self.admission.admitted(now))
        return [(opened.turn.request, opened.replica) for opened in let_in if opened is not None]

    @property
    def overdue(self) -> int:
        """Turns let in because nothing completed for `admission.hold_s`, since the start of the run."""
        if self.residents is not None:
            return self.residents.counts["overdue"]
        return 0 if self.admission is None else self.admission.overdue

    @property
    def holds(self) -> bool:
        """Whether turns are held."""
        return bool(self.admission) or (self.residents is not None and self.residents.waits)

    def tick(self, now: float) -> None:
        """Time has passed: contexts may not be worth holding any more, or a silent fleet not worth waiting for."""
        if self.residents is not None:
            self.residents.tick(now)

    def due_s(self, now: float) -> float:
        """When `tick` should be called next if no event comes before; inf: no need."""
        return inf if self.residents is None else self.residents.due_s()

    @property
    def refresh_due_s(self) -> float | None:
        """When `reprioritised` has something to do: a time that may have passed; None: not before another trajectory ends."""
        if self._refreshing:
            return self._refreshed_s
        return self._refreshed_s + self._options.priority.refresh_s if self._changed else None

    def reprioritised(self, now: float) -> dict[str, dict[str, int]]:
        """Requests under way whose priority has changed by the preemption margin or more, by replica. Looks at `SLICE` of them at most;
        `refresh_due_s` says when to ask again: at once while some are left, otherwise every `priority.refresh_s` at most.

        The estimate of a turn under way changes when a sibling ends. (A new model comes between steps, when no turn is under way.)
        """
        due = self.refresh_due_s
        if due is None or now < due or self.predictor is None:
            return {}
        if not self._refreshing:
            self._refreshed_s = now
            self._refreshing.extend(request for group in self._changed for request in self.turns.groups[group])
            self._changed.clear()
        turns: list[OpenTurn] = []
        while self._refreshing and len(turns) < SLICE:
            turn = self.turns.get(self._refreshing.popleft())
            if turn is not None and turn.life is not None and turn.life.who.key in self.predictor:
                turns.append(turn)
        estimates = self.predictor.predict_many([turn.turn.trajectory.key for turn in turns])
        changed: dict[str, dict[str, int]] = defaultdict(dict)
        for turn, tokens, tool_s in zip(turns, estimates.median_tokens.tolist(), estimates.tool_s.tolist(), strict=True):
            priority = self._priority(turn.turn, turn.life, (tokens, tool_s))
            if abs(priority - turn.priority) >= self._options.preempt.margin:
                turn.priority = changed[turn.replica][turn.turn.request] = priority
        if self.admission is not None:
            for table in changed.values():
                self.admission.reprioritise(table)
        return dict(changed)

    def _started(self, turn: TurnStart) -> Life:
        """The life of the trajectory, begun if it is new, with what the turn tells of it."""
        life = self._lives.get(turn.trajectory.key)
        if life is None:
            life = self._lives[turn.trajectory.key] = Life(turn.trajectory, plain=self._rests)
        if turn.turn >= life.turns:  # otherwise its replica was lost, and it starts again
            life.turns = turn.turn + 1
            life.tool_s += turn.tool_s or 0.0
        return life

    def _forget(self, key: str, now: float) -> None:
        self._transfers.over(key)
        if self.residents is not None:
            self.residents.trajectory_ended(key, now)
        self._lives.pop(key, None)

    def _priority(self, turn: TurnStart, life: Life | None, left: tuple[float, float] | None) -> int:
        """Of a turn whose trajectory has so many tokens and tool seconds left (None: nobody predicts)."""
        if not self._orders or life is None:
            return 0
        if self._options.priority.order == "arrival":
            return VALIDATION if life.who.validate else 0
        if left is None:
            return 0
        length = turn.generated_tokens + work_tokens(left[0], life.tool_s + left[1], self._pace.s_per_token)
        return longest_first(length, self._options.priority.quantum_tokens)
