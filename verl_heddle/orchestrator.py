"""The object that decides where and when turns run, in the cluster and in the simulator: events in, decisions out.

A pure state machine without tasks, sockets, clocks or threads; the caller serialises calls and passes the time. Every policy has a file of
its own (`predict`, `schedule`, `place`); this one calls them in the right order. Between steps, the manager decides which replicas exist
(`layout`) and how many samples a prompt gets (`shape`).

Invariants
- every `turn_started` is matched by one `turn_finished`, completed or not, and a second one has no effect; a trajectory may have several
  turns in flight; in-flight counts return to zero when all are matched, or when `step_ended` closes those that never will be;
- a held turn is named by `admitted` exactly once, unless its `turn_finished` comes first;
- a trajectory that `stays` is named by `put_out` before a `turn_started` of it is answered with a different replica; until then the caller
  may start its turns there and report them by `turn_begun`;
- requests in flight are the open turns, by replica; `turns.recount` restores that after a policy has raised;
- a pre-warm is ordered by `prewarms` at most once per move, and ends with the trajectory's next `turn_started`;
- a conversation stays on its replica while its trajectory lives, unless the replica leaves, or the trajectory is evicted or moved;
- decisions depend only on the events, their times and the seed;
- decisions are stock verl's with `observe`, or with `priority.enable=False`, `place.enable=False`, `residents.enable=False` and no bound on
  admission; placement is stock verl's while there is room for all trajectories, before planned placement has step times, and for
  trajectories that begin while resident sets rest (`rest`). One exception without `observe`: stock verl forgets the replica of a
  conversation after `sticky.CACHE_SIZE` others have asked;
- if the host keeps what replicas evict (`Replica.tier`), resident sets rest and verl's rule decides: they save little there, and lost up to
  14 % to stock with the same tier.
"""

from __future__ import annotations

from collections import Counter, defaultdict
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
from verl_heddle.turns import Life, Lives, OpenTurn, OpenTurns, Refresh

FIRST_HOLD_S = 15.0
"""Hold time for a tool call before step times are known: an H200 reads its whole KV cache in 5 to 40 s, depending on model and degree."""

SLICE = 256
"""Turns that one `reprioritised` predicts: 5 ms, during which no other turn is answered."""


class Orchestrator:
    """Decides the replica and priority of every turn.

    Args:
        options: the user's settings; `observe` switches off every policy except verl's own placement.
        deterministic: verl's `rollout.full_determinism`: place by hash of the conversation id.
        cap_tokens: maximum tokens of a trajectory (verl's `rollout.response_length`); None: not known.
    """

    def __init__(self, options: Options, deterministic: bool = False, cap_tokens: int | None = None) -> None:
        self._options = options
        self._decides = not options.observe
        self._orders = self._decides and options.priority.enable
        self._plans = self._decides and options.place.enable
        self._placement = Replanner(None, Random(options.seed), deterministic, cap_tokens, moves=options.place.moves)
        self._transfers = Transfers()
        self.predictor = Predictor(cap_tokens) if options.predicts else None
        """Predicts lengths; None: no policy needs them."""
        self.residents: Residents | None = None
        """The trajectories that each replica keeps; None: `place` chooses replicas, and `admission` bounds turns in flight."""
        self.admission: Admission | None = None
        if options.admits and not deterministic:
            self.residents = Residents(ORDERS[options.residents.order], Random(options.seed), options.admission.hold_s)
        elif self._decides and options.admission.per_slot:
            self.admission = Admission(options.admission.hold_s)
        self._latency: Latency | None = None
        self._pace = Pace()
        self._replicas: dict[str, Replica] = {}
        self._rests = False
        """Whether resident sets rest for new trajectories."""
        self._tiered = False
        """Whether some replica has a host tier."""
        self._lives = Lives()
        self.turns = OpenTurns(self._placement.rule)
        """Turns in flight."""
        self._refreshes = self._orders and options.priority.order == "longest" and options.priority.refresh_s > 0
        self._refresh = Refresh(self.turns, options.priority.refresh_s)
        self.counts: Counter[str] = Counter()
        """Decisions by reason since the start of the run."""

    @property
    def inflight(self) -> dict[str, int]:
        """Requests in flight by replica name."""
        return dict(self._placement.inflight)

    @property
    def rule(self) -> StickyLeastInflight:
        """verl's own rule with the orchestrator's in-flight counts, for requests outside any turn."""
        return self._placement.rule

    @property
    def replicas(self) -> dict[str, Replica]:
        """The fleet, by name."""
        return dict(self._replicas)

    def replicas_added(self, replicas: Iterable[Replica]) -> None:
        """Replicas joined the fleet without requests."""
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
        """A weight update stops this engine, in the fleet or outside; it loses contexts and turns, and admits nothing before `resumed`."""
        if self.residents is not None:
            self.residents.pause(name, now)

    def resumed(self, name: str, now: float) -> None:
        """The replica's engine takes requests again."""
        if self.residents is not None:
            self.residents.resume(name, now)

    def rest(self, rests: bool, now: float) -> None:
        """Whether resident sets rest for trajectories that begin from now on (`twin.choice`)."""
        self._rests = rests

    def homes_forgotten(self) -> int:
        """Forget the replicas of conversations (verl's `clear_sticky_cache`); returns how many there were."""
        for life in self._lives.values():
            life.homes.clear()
        if self.residents is not None:
            self.residents.forget()
        return self._placement.forget()

    def step_times_known(self, latency: Latency | None) -> None:
        """Use new step times of the model on these replicas to plan placement and hold contexts. None: they are no longer known."""
        self._latency = latency
        if self._plans:
            self._placement.learn(latency)
        if self.residents is not None:
            for name, replica in self._replicas.items():
                self.residents.hold(name, self._hold_s(replica))

    def _hold_s(self, replica: Replica) -> float:
        """A replica's t*: the time in which it reads its whole KV cache in full steps (`schedule.resident`)."""
        if not replica.caches:
            return 0.0
        if replica.kv_tokens is None:
            return inf
        if self._latency is None:
            return FIRST_HOLD_S
        return replica.kv_tokens / BATCH_TOKENS * float(self._latency.prefill_s(replica.tp, BATCH_TOKENS))

    def batch_expected(self, batch: Sequence[TurnStart], now: float) -> None:
        """These first turns are about to start: plan them as a whole. Optional; their `context_tokens` may be estimates."""
        if self.predictor is None or not self._placement.plans:
            return
        expected = []
        for turn in batch:
            self.predictor.turn_started(turn)
            expected.append(Expected(turn.trajectory, turn.context_tokens, self.predictor.predict(turn.trajectory.key)))
        self._placement.expect(expected)

    def turn_started(self, turn: TurnStart, now: float) -> Decision:
        """Decide a turn's replica and priority. If the request is in flight already, its caller missed the answer, and that turn is closed.

        Raises:
            RuntimeError: the fleet is empty.
        """
        return self._start(turn, now)

    def turn_begun(self, turn: TurnStart, replica: str, now: float) -> None:
        """A turn of a trajectory that `stays` already runs on `replica`; if it was evicted in the meantime, it is resident again."""
        self._start(turn, now, replica)

    def stays(self, key: str) -> bool:
        """Whether the trajectory's next turns run on its replica with the same priority, without asking, until `put_out` names it."""
        return self.residents is not None and self.predictor is None and not self._tiered and self.residents.stays(key)

    def put_out(self) -> list[str]:
        """Keys of trajectories whose turns must ask again. Call it after every event."""
        return [] if self.residents is None else self.residents.put_out()

    def _start(self, turn: TurnStart, now: float, at: str | None = None) -> Decision:
        if (before := self.turns.get(turn.request)) is not None:
            self.turn_finished(before.withdrawn(), now)
        key, estimate, life = turn.trajectory.key, None, None
        if turn.trajectory.prompt:  # a request outside any trajectory has no prompt, and never ends
            life = self._lives.started(turn, plain=self._rests)
            if self.predictor is not None:
                self.predictor.turn_started(turn)
                estimate = self.predictor.predict(key)
        priority = self._priority(turn, life, None if estimate is None else (estimate.median_tokens, estimate.tool_s))
        self._transfers.over(key)
        replica, reason, held = self._choose(turn, life, estimate, priority, now) if at is None else self._accept(turn, life, at, now)
        self.counts[reason] += 1
        self.turns.add(OpenTurn(turn, replica, priority, life))
        if life is not None:
            life.homes[turn.conversation] = replica
            life.open.add(turn.request)
        if estimate is None:
            return Decision(replica, priority, reason, held=held, stays=not held and life is not None and self.stays(key))
        return Decision(replica, priority, reason, estimate.median_tokens, estimate.upper_tokens, held)

    def _choose(self, turn: TurnStart, life: Life | None, estimate: Estimate | None, priority: int, now: float) -> tuple[str, Reason, bool]:
        """Replica, reason, and whether the turn is held."""
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

    def _accept(self, turn: TurnStart, life: Life | None, at: str, now: float) -> tuple[str, Reason, bool]:
        """As `_choose`, for a turn that is on its way to `at`."""
        if self.residents is not None and life is not None and not (self._tiered or life.plain):
            self.residents.turn_begun(turn, at, now)
        if at in self._replicas:
            self._placement.rule.note(turn.conversation, at)
        return at, Reason.STICKY, False

    def turn_finished(self, turn: TurnEnd, now: float) -> None:
        """The engine is done with the turn, or the turn was withdrawn. Without effect if it is not in flight."""
        opened = self.turns.close(turn.request)
        if opened is not None:
            if turn.replica != opened.replica:  # its worker died before it learned where the turn was admitted
                turn = replace(turn, replica=opened.replica)
            self._close(opened, turn, now)

    def _close(self, opened: OpenTurn, turn: TurnEnd, now: float) -> None:
        self._refresh.turn_closed(turn.trajectory.uid)
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
        """The pre-warm of this trajectory is done or was given up."""
        self._transfers.over(key)

    def prewarms(self, now: float) -> list[Prewarm]:
        """Pre-warms to start now, on the replicas to which trajectories move. Call it after every event."""
        return [Prewarm(transfer.key, transfer.target, LAST_PRIORITY) for transfer in self._transfers.start()]

    def awaits_transfer(self, key: str) -> bool:
        """Whether a pre-warm of this trajectory is waiting or in flight."""
        return key in self._transfers

    def tool_started(self, start: ToolStart, now: float) -> None:
        """A tool starts; its name enters the trajectory's estimate."""
        if self.predictor is not None:
            self.predictor.tool_started(start)

    def trajectory_ended(self, end: TrajectoryEnd, now: float) -> None:
        """The episode is over and enters the history, unless it is validation, which samples differently."""
        self._forget(end.trajectory.key, now)
        self._placement.ended(end)
        if self.predictor is not None:
            self.predictor.trajectory_ended(end)
            if self._refreshes:
                self._refresh.trajectory_ended(end.trajectory.uid)

    def step_ended(self, step: int, now: float) -> int:
        """A training step's batch is complete: forget trajectories of earlier steps that never ended, and their turns; returns how many."""
        lost = {key for key, life in self._lives.items() if life.identity.step < step}
        if self.predictor is not None:
            lost.update(self.predictor.abandon_before(step))  # includes expected trajectories that never began
        for opened in self.turns:
            if opened.life is not None and opened.life.identity.step < step:
                self.turn_finished(opened.withdrawn(), now)
        for key in lost:
            self._forget(key, now)
            self._placement.abandon(key)
        return len(lost)

    def metrics(self) -> dict[str, float]:
        """Metrics of the planner, as `place/...`, and of the resident sets, as `residents/...`; empty if verl's rule places."""
        result = {f"place/{name}": value for name, value in self._placement.metrics().items()} if self._placement.plans else {}
        if self.residents is not None:
            result |= {f"residents/{name}": float(count) for name, count in self.residents.metrics().items()}
        return result

    def admitted(self, now: float) -> list[tuple[str, str]]:
        """(request, replica) of held turns that may go now. Call it after every event and after `tick`."""
        if self.residents is not None:
            result = []
            for request, replica in self.residents.admitted():
                opened = self.turns.get(request)
                if opened is None or opened.replica:  # verl's rule placed it after a policy raised
                    continue
                opened.replica = replica
                if opened.life is not None:
                    opened.life.homes[opened.turn.conversation] = replica
                self._placement.acquire(opened.turn, None, replica)
                result.append((request, replica))
            return result
        if self.admission is None:
            return []
        admitted = map(self.turns.get, self.admission.admitted(now))
        return [(opened.turn.request, opened.replica) for opened in admitted if opened is not None]

    @property
    def overdue(self) -> int:
        """Turns admitted because no turn completed for `admission.hold_s`, since the start of the run."""
        if self.residents is not None:
            return self.residents.counts["overdue"]
        return 0 if self.admission is None else self.admission.overdue

    @property
    def holds(self) -> bool:
        """Whether turns are held."""
        return bool(self.admission) or (self.residents is not None and self.residents.waits)

    def tick(self, now: float) -> None:
        """Time has passed: release contexts held for longer than t*, and turns that wait for a silent fleet."""
        if self.residents is not None:
            self.residents.tick(now)

    def due_s(self, now: float) -> float:
        """When to call `tick` next if no event comes before; inf: not needed."""
        return inf if self.residents is None else self.residents.due_s()

    @property
    def refresh_due_s(self) -> float | None:
        """When to call `reprioritised` next, possibly a time in the past; None: not before another trajectory ends."""
        return self._refresh.due_s

    def reprioritised(self, now: float) -> dict[str, dict[str, int]]:
        """Requests in flight whose priority has changed by the preemption margin or more, by replica. Checks at most `SLICE` of them;
        `refresh_due_s` says when to call it again: at once while some are left, otherwise at most every `priority.refresh_s`.

        The estimate of a turn in flight changes when a sibling ends. (A new model is adopted between steps, when no turn is in flight.)
        """
        if self.predictor is None or not (turns := self._refresh.take(now, SLICE, self.predictor.__contains__)):
            return {}
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

    def _forget(self, key: str, now: float) -> None:
        self._transfers.over(key)
        if self.residents is not None:
            self.residents.trajectory_ended(key, now)
        self._lives.pop(key, None)

    def _priority(self, turn: TurnStart, life: Life | None, left: tuple[float, float] | None) -> int:
        """Priority of a turn; `left`: predicted remaining tokens and tool seconds of its trajectory (None: not predicted)."""
        if not self._orders or life is None:
            return 0
        if self._options.priority.order == "arrival":
            return VALIDATION if life.identity.validate else 0
        if left is None:
            return 0
        length = turn.generated_tokens + work_tokens(left[0], life.tool_s + left[1], self._pace.s_per_token)
        return longest_first(length, self._options.priority.quantum_tokens)
