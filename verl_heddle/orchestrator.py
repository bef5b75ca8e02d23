"""The one object that decides, in the cluster and in the simulator alike: events in, decisions out.

A pure state machine. It owns no task, socket, clock or thread; the caller serialises its calls and passes the time. Each question has
one policy in one file (`predict`, `schedule`, `place`, later `layout` and `shape`); this file only asks them in the right order.

Invariants
- every `turn_started` is answered by exactly one `turn_finished`, completed or not; in-flight counts return to zero when all have been;
- a held turn is named by `admitted` exactly once, unless its `turn_finished` comes first;
- a pre-warm is ordered by `prewarms` at most once per move, and is over with the trajectory's next `turn_started`;
- decisions depend on the events and the seed only: the same sequence gives the same decisions;
- with `observe`, or `priority.enable=False`, `place.enable=False` and no bound on admission, the decisions are those of stock verl; so is
  the placement until there are step times to plan with (`step_times_known`).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil
from random import Random

from verl_heddle.fleet import Replica
from verl_heddle.options import Options
from verl_heddle.place.decisions import Expected
from verl_heddle.place.pace import Latency
from verl_heddle.place.replan import Replanner
from verl_heddle.place.transfers import LAST_PRIORITY, Transfer, Transfers
from verl_heddle.predict.predictor import Predictor
from verl_heddle.predict.quantities import Estimate
from verl_heddle.schedule.admission import Admission
from verl_heddle.schedule.priority import Pace, longest_first, work_tokens
from verl_heddle.trajectory import Decision, Prewarm, ToolStart, TrajectoryEnd, TrajectoryId, TurnEnd, TurnStart


@dataclass(slots=True)
class _Open:
    """A turn between its start and its end."""

    trajectory: TrajectoryId
    replica: str
    generated: int
    priority: int


class Orchestrator:
    """Decides where and how urgently each turn runs. See `Options` for what can be tuned.

    Args:
        options: the user's settings; `observe` switches every policy but verl's own placement off.
        deterministic: verl's `rollout.full_determinism`: place by hash of the conversation id.
        cap_tokens: most tokens a trajectory may generate (verl's `rollout.response_length`); None: no cap known.
    """

    def __init__(self, options: Options, deterministic: bool = False, cap_tokens: int | None = None) -> None:
        self._options = options
        decides = not options.observe
        self._plans = decides and options.place.enable
        self._placement = Replanner(None, Random(options.seed), deterministic, cap_tokens, moves=options.place.moves)
        self._transfers = Transfers()
        self.predictor = Predictor(cap_tokens) if decides and (options.priority.enable or self._plans) else None
        """What is known of lengths; None when nobody asks for it."""
        self.admission = Admission(options.admission.hold_s) if decides and options.admission.per_slot else None
        self._pace = Pace()
        self._replicas: dict[str, Replica] = {}
        self._open: dict[str, _Open] = {}
        self._of_group: dict[str, set[str]] = defaultdict(set)
        """Open requests by `uid`."""
        self._changed: set[str] = set()
        """Groups of which a trajectory has ended since the last refresh."""
        self._refreshed_s = float("-inf")
        self.counts: Counter[str] = Counter()
        """Decisions by reason since the start of the run."""

    @property
    def inflight(self) -> dict[str, int]:
        """Requests in flight by replica name."""
        return dict(self._placement.inflight)

    def replicas_added(self, replicas: Iterable[Replica]) -> None:
        """Replicas joined the fleet, empty."""
        for replica in replicas:
            self._replicas[replica.name] = replica
            self._placement.add(replica)
            if self.admission is not None:
                self.admission.add(replica.name, ceil(self._options.admission.per_slot * replica.slots))

    def replicas_removed(self, names: Iterable[str]) -> None:
        """Replicas left the fleet; their conversations move at the next turn."""
        for name in names:
            self._replicas.pop(name, None)
            self._placement.remove(name)
            self._transfers.removed(name)
            if self.admission is not None:
                self.admission.remove(name)

    def homes_forgotten(self) -> int:
        """Forget where conversations live (verl's `clear_sticky_cache`); returns how many there were."""
        return self._placement.forget()

    def step_times_known(self, latency: Latency | None) -> None:
        """The times of the model on these replicas have been learnt, or learnt anew: placement is planned with them from now on. None: they
        are not known any more."""
        if self._plans:
            self._placement.learn(latency)

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
        """A trajectory wants to generate: where, and how urgently?

        Raises:
            RuntimeError: the fleet is empty.
        """
        estimate = None
        if self.predictor is not None and turn.trajectory.prompt:  # a request of nobody's has no prompt, and never ends
            self.predictor.turn_started(turn)
            estimate = self.predictor.predict(turn.trajectory.key)
        priority = self._priority(turn.generated_tokens, estimate)
        self._transfers.over(turn.trajectory.key)
        replica, reason = self._placement.acquire(turn, estimate)
        self.counts[reason] += 1
        self._open[turn.request] = _Open(turn.trajectory, replica, turn.generated_tokens, priority)
        self._of_group[turn.trajectory.uid].add(turn.request)
        held = self.admission is not None and not self.admission.ask(turn.request, replica, priority, now)
        if estimate is None:
            return Decision(replica, priority, reason, held=held)
        return Decision(replica, priority, reason, estimate.median_tokens, estimate.upper_tokens, held)

    def turn_finished(self, turn: TurnEnd, now: float) -> None:
        """The engine is done with the turn, or it gave up waiting."""
        self._open.pop(turn.request, None)
        group = self._of_group[turn.trajectory.uid]
        group.discard(turn.request)
        if not group:
            del self._of_group[turn.trajectory.uid]
        if self.admission is not None:
            self.admission.left(turn.request, turn.replica)
        if turn.completed:
            self._pace.turn(turn.output_tokens, turn.engine_s)
        estimate = None
        if self.predictor is not None:
            self.predictor.turn_finished(turn)
            if self._placement.plans and turn.completed:
                estimate = self.predictor.predict(turn.trajectory.key)
        move = self._placement.release(turn, estimate)
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

    def replica_of(self, turn: TurnStart) -> str | None:
        """Where an open turn was placed; None if it is not open."""
        opened = self._open.get(turn.request)
        return None if opened is None else opened.replica

    def tool_started(self, start: ToolStart, now: float) -> None:
        """A tool runs; the trajectory's estimate takes its name in."""
        if self.predictor is not None:
            self.predictor.tool_started(start)

    def trajectory_ended(self, end: TrajectoryEnd, now: float) -> None:
        """The episode is over; what it teaches goes into the history (validation runs under other sampling, so it teaches nothing)."""
        self._transfers.over(end.trajectory.key)
        self._placement.ended(end)
        if self.predictor is not None:
            self.predictor.trajectory_ended(end)
            self._changed.add(end.trajectory.uid)

    def step_ended(self, step: int) -> int:
        """The batch of a training step is complete: forget trajectories of earlier steps that never ended; returns how many there were."""
        lost = [] if self.predictor is None else self.predictor.abandon_before(step)
        for key in lost:
            self._placement.abandon(key)
            self._transfers.over(key)
        return len(lost)

    def metrics(self) -> dict[str, float]:
        """What the planner thinks of itself; empty while verl's rule places."""
        return self._placement.metrics() if self._placement.plans else {}

    def admitted(self, now: float) -> list[str]:
        """Requests that were held and may go. To be asked after every event, and from time to time for those that waited too long."""
        return self.admission.admitted(now) if self.admission is not None else []

    def reprioritised(self, now: float) -> dict[str, dict[str, int]]:
        """Requests under way whose priority has changed by the preemption margin or more, by replica; at most every `priority.refresh_s`.

        The estimate of a turn under way changes when a sibling ends. (A new model comes between steps, when no turn is under way.)
        """
        refresh_s = self._options.priority.refresh_s
        if (
            self.predictor is None
            or not self._options.priority.enable
            or not refresh_s
            or not self._changed
            or now - self._refreshed_s < refresh_s
        ):
            return {}
        self._refreshed_s = now
        changed: dict[str, dict[str, int]] = defaultdict(dict)
        for group in self._changed:
            for request in self._of_group.get(group, ()):
                turn = self._open[request]
                priority = self._priority(turn.generated, self.predictor.predict(turn.trajectory.key))
                if abs(priority - turn.priority) >= self._options.preempt.margin:
                    turn.priority = changed[turn.replica][request] = priority
        self._changed.clear()
        if self.admission is not None:
            for table in changed.values():
                self.admission.reprioritise(table)
        return dict(changed)

    def _priority(self, generated: int, estimate: Estimate | None) -> int:
        if estimate is None or not self._options.priority.enable:
            return 0
        length = generated + work_tokens(estimate.median_tokens, estimate.tool_s, self._pace.s_per_token)
        return longest_first(length, self._options.priority.quantum_tokens)
