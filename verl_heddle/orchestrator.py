"""The one object that decides, in the cluster and in the simulator alike: events in, decisions out.

A pure state machine. It owns no task, socket, clock or thread; the caller serialises its calls and passes the time. Each question has
one policy in one file (`predict`, `schedule`, `place`, later `layout` and `shape`); this file only asks them in the right order.

Invariants
- every `turn_started` is answered by exactly one `turn_finished`, completed or not; in-flight counts return to zero when all have been;
- a held turn is named by `admitted` exactly once, unless its `turn_finished` comes first;
- decisions depend on the events and the seed only: the same sequence gives the same decisions;
- with `observe`, or `priority.enable=False` and no bound on admission, the decisions are those of stock verl.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil
from random import Random

from verl_heddle.fleet import Replica
from verl_heddle.options import Options
from verl_heddle.place.sticky import StickyLeastInflight
from verl_heddle.predict.predictor import Predictor
from verl_heddle.predict.quantities import Estimate
from verl_heddle.schedule.admission import Admission
from verl_heddle.schedule.priority import Pace, longest_first, work_tokens
from verl_heddle.trajectory import Decision, ToolStart, TrajectoryEnd, TrajectoryId, TurnEnd, TurnStart


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
        self._placement = StickyLeastInflight(Random(options.seed), deterministic)
        self.predictor = Predictor(cap_tokens) if decides and options.priority.enable else None
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
            self._placement.add(replica.name)
            if self.admission is not None:
                self.admission.add(replica.name, ceil(self._options.admission.per_slot * replica.slots))

    def replicas_removed(self, names: Iterable[str]) -> None:
        """Replicas left the fleet; their conversations move at the next turn."""
        for name in names:
            self._replicas.pop(name, None)
            self._placement.remove(name)
            if self.admission is not None:
                self.admission.remove(name)

    def homes_forgotten(self) -> int:
        """Forget where conversations live (verl's `clear_sticky_cache`); returns how many there were."""
        return self._placement.forget()

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
        replica, reason = self._placement.acquire(turn.conversation)
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
        self._placement.release(turn.replica)
        if self.admission is not None:
            self.admission.left(turn.request, turn.replica)
        if turn.completed:
            self._pace.turn(turn.output_tokens, turn.engine_s)
        if self.predictor is not None:
            self.predictor.turn_finished(turn)

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
        if self.predictor is not None:
            self.predictor.trajectory_ended(end)
            self._changed.add(end.trajectory.uid)

    def admitted(self, now: float) -> list[str]:
        """Requests that were held and may go. To be asked after every event, and from time to time for those that waited too long."""
        return self.admission.admitted(now) if self.admission is not None else []

    def reprioritised(self, now: float) -> dict[str, dict[str, int]]:
        """Requests under way whose priority has changed by the preemption margin or more, by replica; at most every `priority.refresh_s`.

        The estimate of a turn under way changes when a sibling ends. (A new model comes between steps, when no turn is under way.)
        """
        refresh_s = self._options.priority.refresh_s
        if self.predictor is None or not refresh_s or not self._changed or now - self._refreshed_s < refresh_s:
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
        if estimate is None:
            return 0
        length = generated + work_tokens(estimate.median_tokens, estimate.tool_s, self._pace.s_per_token)
        return longest_first(length, self._options.priority.quantum_tokens)
