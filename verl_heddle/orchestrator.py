"""The one object that decides, in the cluster and in the simulator alike: events in, decisions out.

A pure state machine. It owns no task, socket, clock or thread; the caller serialises its calls and passes the time. Each question has
one policy in one file (`predict`, `schedule`, `place`, later `layout` and `shape`); this file only asks them in the right order.

Invariants
- every `turn_started` is answered by exactly one `turn_finished`, completed or not; in-flight counts return to zero when all have been;
- decisions depend on the events and the seed only: the same sequence gives the same decisions;
- with `priority=False` the decisions are those of stock verl.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from random import Random

from verl_heddle.fleet import Replica
from verl_heddle.options import Options
from verl_heddle.place.sticky import StickyLeastInflight
from verl_heddle.predict.history import HistoryMean
from verl_heddle.schedule.priority import longest_first
from verl_heddle.trajectory import Decision, Outcome, TrajectoryEnd, TurnEnd, TurnStart


class Orchestrator:
    """Decides where and how urgently each turn runs. See `Options` for what can be tuned.

    Args:
        options: the user's settings; `observe` switches every policy but verl's own placement off.
        deterministic: verl's `rollout.full_determinism`: place by hash of the conversation id.
    """

    def __init__(self, options: Options, deterministic: bool = False) -> None:
        self._options = options
        self._prioritise = options.priority.enable and not options.observe
        self._placement = StickyLeastInflight(Random(options.seed), deterministic)
        self._history = HistoryMean()
        self._replicas: dict[str, Replica] = {}
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

    def replicas_removed(self, names: Iterable[str]) -> None:
        """Replicas left the fleet; their conversations move at the next turn."""
        for name in names:
            self._replicas.pop(name, None)
            self._placement.remove(name)

    def homes_forgotten(self) -> int:
        """Forget where conversations live (verl's `clear_sticky_cache`); returns how many there were."""
        return self._placement.forget()

    def turn_started(self, turn: TurnStart, now: float) -> Decision:
        """A trajectory wants to generate: where, and how urgently?

        Raises:
            RuntimeError: the fleet is empty.
        """
        predicted = self._history.remaining(turn.trajectory.prompt, turn.generated_tokens)
        priority = longest_first(predicted, self._options.priority.quantum_tokens) if self._prioritise else 0
        replica, reason = self._placement.acquire(turn.conversation)
        self.counts[reason] += 1
        return Decision(replica, priority, reason, predicted)

    def turn_finished(self, turn: TurnEnd, now: float) -> None:
        """The engine is done with the turn, whatever became of it."""
        self._placement.release(turn.replica)

    def trajectory_ended(self, end: TrajectoryEnd, now: float) -> None:
        """The episode is over; what it teaches goes into the history (validation runs under other sampling, so it teaches nothing)."""
        if end.outcome is Outcome.FINISHED and not end.trajectory.validate:
            self._history.observe(end.trajectory.prompt, end.output_tokens)
