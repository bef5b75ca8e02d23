"""What the simulator asks of a policy and of a latency model, and what a policy may order besides placing turns.

`verl_heddle.orchestrator.Orchestrator` is a `Policy`, and `verl_heddle.latency.LatencyModel` is a `Latency`; neither knows of the
simulator.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from verl_heddle.fleet import Replica
from verl_heddle.trajectory import Decision, Prewarm, TrajectoryEnd, TurnEnd, TurnStart


@dataclass(frozen=True, slots=True)
class Cancel:
    """Early stop: the trajectory with this `TrajectoryId.key` is not needed any more.

    A waiting turn leaves at once, a running one at the end of the decode step, a tool call is not waited for. Unknown and ended
    trajectories are ignored.
    """

    trajectory: str


@dataclass(frozen=True, slots=True)
class StopAt:
    """Early stop later: cancel the trajectory as soon as it has generated so many tokens over all its turns and would go on.

    Of several counts the least holds. Until then it costs no event: it is a limit that the engine keeps.
    """

    trajectory: str
    tokens: int


Action = Cancel | Prewarm | StopAt
"""A `Prewarm` takes effect only when returned by `turn_finished`, `trajectory_ended` or `prewarms` while that trajectory is in a tool.
It needs a slot like any request (`priority` orders it among the waiting), and is cancelled when the trajectory's next turn starts; what it
has prefilled by then stays cached. Source: a pre-warm of `max_tokens=1` on real vLLM engines left every full block cached, the new blocks
included."""


class Policy(Protocol):
    """Decides where and how urgently turns run. Times are simulated seconds.

    Every `turn_started` is followed by exactly one `turn_finished`, then perhaps by another `turn_started` of the same
    trajectory, and every trajectory by exactly one `trajectory_ended`.

    A policy may have more methods, with the meaning they have in `Orchestrator`:
    `latency_known(latency)`, told what steps and reading take before anything starts, as measured on idle engines;
    `batch_expected(batch, now)`, told all first turns before anything starts; `tool_started(start, now)`, told when a tool begins;
    `admitted(now)`, asked after every event whether turns it held may go: names of turns, or (name, replica) of those that were held
    without a replica; `released(now)`, asked at the same moments for (trajectory, replica) whose cached context is to be dropped first;
    `tick(now)`, called at `due_s(now)`, seconds, inf for never; `reprioritised(now)`, asked after a trajectory ended, and again while
    `refresh_due_s` is not later than now; `prewarms(now)`, asked after turns and trajectories end, and `transferred(key, now)`, told when
    a pre-warm is done.
    """

    def replicas_added(self, replicas: Iterable[Replica]) -> None:
        """Replicas joined the fleet, empty; called once with the whole fleet before anything else."""

    def replicas_removed(self, names: Iterable[str]) -> None:
        """Replicas left the fleet; their turns are finished as not completed, then started anew."""

    def turn_started(self, turn: TurnStart, now: float) -> Decision:
        """A trajectory wants to generate: where, and how urgently?"""

    def turn_finished(self, turn: TurnEnd, now: float) -> Iterable[Action] | None:
        """The engine is done with the turn; its tool call, if any, begins now."""

    def trajectory_ended(self, end: TrajectoryEnd, now: float) -> Iterable[Action] | None:
        """The episode is over."""


class Latency(Protocol):
    """How long a replica takes, in seconds; both times non-decreasing in all but `tp`.

    `decode_s` and `prefill_s` take numbers, and `decode_s` also numpy arrays that broadcast (`bound.py` asks so).
    """

    def decode_s(self, tp: int, batch: Any, context_tokens: Any, /) -> Any:
        """One decode step of `batch` sequences with `context_tokens` each on average."""

    def prefill_s(self, tp: int, new_tokens: Any, context_tokens: Any = 0, /) -> Any:
        """Reading `new_tokens` after `context_tokens` that are cached, alone on the replica."""

    def kv_tokens(self, tp: int, /) -> int | None:
        """Tokens the KV cache of a replica holds; None: not limiting."""

    def kv_bytes(self, tp: int, /) -> int | None:
        """Bytes of a token's KV cache on each GPU of a replica; None: not known. Asked for a host tier only."""

    def fits(self, tp: int, /) -> bool:
        """Whether a replica of this degree holds the model at all."""
