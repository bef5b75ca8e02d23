"""The interfaces of a policy and of a latency model, and the actions a policy may return.

`verl_heddle.orchestrator.Orchestrator` is a `Policy`, and `verl_heddle.latency.LatencyModel` is a `Latency`; neither depends on the
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
    """Early stop: the trajectory with this `TrajectoryId.key` is no longer needed.

    A waiting turn leaves at once, a running one at the end of its decode step; a tool call is abandoned. Unknown and ended trajectories
    are ignored.
    """

    trajectory: str


@dataclass(frozen=True, slots=True)
class StopAt:
    """Early stop later: cancel the trajectory once it has generated `tokens` tokens over all its turns, if it would continue.

    Of several limits the smallest applies. The engine enforces the limit, so it costs no event until it is reached.
    """

    trajectory: str
    tokens: int


Action = Cancel | Prewarm | StopAt
"""A `Prewarm` takes effect only if `turn_finished`, `trajectory_ended` or `prewarms` returns it while that trajectory is in a tool.
It needs a slot like any request (`priority` orders it in the waiting queue). It is cancelled when the trajectory's next turn starts; the
tokens prefilled by then stay cached. Source: a pre-warm of `max_tokens=1` on real vLLM engines left every full block cached, including the
new ones."""


class Policy(Protocol):
    """Decides where turns run and in which order. Times are simulated seconds.

    Every `turn_started` is followed by exactly one `turn_finished`, before the next `turn_started` of that trajectory. Every trajectory
    gets exactly one `trajectory_ended`.

    Optional methods, with the same meaning as in `Orchestrator`:
    - `latency_known(latency)`: called before anything starts, with step and prefill times as measured on idle engines.
    - `batch_expected(batch, now)`: called before anything starts, with all first turns.
    - `tool_started(start, now)`: called when a tool begins.
    - `admitted(now)`: called after every event; returns the held turns to submit: names, or (name, replica) if held without a replica.
    - `released(now)`: called at the same moments; returns the (trajectory, replica) pairs whose cached context is evicted first.
    - `tick(now)`: called at `due_s(now)`, seconds; inf: never.
    - `reprioritised(now)`: called after a trajectory ends, and again while `refresh_due_s` <= now; returns changed priorities.
    - `prewarms(now)`: called after turns and trajectories end; `transferred(key, now)`: called when a pre-warm is done.
    """

    def replicas_added(self, replicas: Iterable[Replica]) -> None:
        """Replicas joined the fleet, empty. The first call has the whole fleet and precedes every other event."""

    def replicas_removed(self, names: Iterable[str]) -> None:
        """Replicas left the fleet. Their turns finish as not completed and are then started again."""

    def turn_started(self, turn: TurnStart, now: float) -> Decision:
        """A trajectory requests a turn; returns its replica and priority, or holds it."""

    def turn_finished(self, turn: TurnEnd, now: float) -> Iterable[Action] | None:
        """The engine is done with the turn; its tool call, if any, begins now."""

    def trajectory_ended(self, end: TrajectoryEnd, now: float) -> Iterable[Action] | None:
        """The trajectory finished, failed or was cancelled."""


class Latency(Protocol):
    """Step and prefill times of a replica, in seconds; both are non-decreasing in all arguments but `tp`.

    `decode_s` and `prefill_s` take numbers; `decode_s` also takes numpy arrays that broadcast, which `bound.py` needs.
    """

    def decode_s(self, tp: int, batch: Any, context_tokens: Any, /) -> Any:
        """One decode step of `batch` sequences with a mean context of `context_tokens`."""

    def prefill_s(self, tp: int, new_tokens: Any, context_tokens: Any = 0, /) -> Any:
        """Prefill of `new_tokens` after `context_tokens` cached ones, alone on the replica."""

    def kv_tokens(self, tp: int, /) -> int | None:
        """KV capacity of a replica, tokens; None: unlimited."""

    def kv_bytes(self, tp: int, /) -> int | None:
        """KV bytes of a token on each GPU of a replica; None: unknown. Needed for a host tier only."""

    def fits(self, tp: int, /) -> bool:
        """Whether the model fits on a replica of this degree."""
