"""The planner's moves and announced trajectories, and the queue that schedules context transfers.

Law: active transfers form a matching. When an endpoint becomes free, queued transfers start in order of predicted length, longest first,
each once all its endpoints are free (greedy: no queued transfer has all its endpoints free). A pre-warm has one endpoint, its target,
since the context is prefilled again there; a connector that copies KV blocks has two.
Invariants: an endpoint is in at most one active transfer; a trajectory has at most one transfer, the last one requested.
Source: Heddle's endpoint-exclusive migration (arXiv 2603.28101, section 6). Cost: O(waiting) per event, and few wait.
"""

from __future__ import annotations

from typing import NamedTuple

from verl_heddle.predict.quantities import Estimate
from verl_heddle.trajectory import TrajectoryId


class Move(NamedTuple):
    """The trajectory's next turn goes to `replica`: pre-warm it now. Seconds: what it is expected to gain, and to cost there."""

    trajectory: str
    replica: str
    gain_s: float
    cost_s: float


class Expected(NamedTuple):
    """A trajectory that a step is about to start."""

    trajectory: TrajectoryId
    prompt_tokens: int
    estimate: Estimate | None


LAST_PRIORITY = 2**31 - 1
"""vLLM priority of a pre-warm: it must not delay other requests."""


class Transfer(NamedTuple):
    """Brings the context of trajectory `key` to `target`. `ends`: replicas it occupies; `tokens`: remaining tokens of the trajectory."""

    key: str
    target: str
    ends: tuple[str, ...]
    tokens: float


class Transfers:
    """See the module."""

    def __init__(self) -> None:
        self._waiting: dict[str, Transfer] = {}
        self._under_way: dict[str, Transfer] = {}
        self._busy: set[str] = set()

    def __contains__(self, key: str) -> bool:
        """Whether the trajectory has a transfer, queued or active."""
        return key in self._waiting or key in self._under_way

    def ask(self, transfer: Transfer) -> None:
        """Queue a transfer; it replaces any earlier one of the same trajectory."""
        self.over(transfer.key)
        self._waiting[transfer.key] = transfer

    def over(self, key: str) -> bool:
        """The trajectory's transfer is done or cancelled; returns whether there was one."""
        done = self._under_way.pop(key, None)
        if done is not None:
            self._busy.difference_update(done.ends)
        return self._waiting.pop(key, None) is not None or done is not None

    def removed(self, replica: str) -> list[str]:
        """Drop the transfers of a replica that left; returns their trajectories."""
        lost = [one.key for one in (*self._waiting.values(), *self._under_way.values()) if replica in (one.target, *one.ends)]
        for key in lost:
            self.over(key)
        return lost

    def start(self) -> list[Transfer]:
        """Start the transfers that can run now, and return them; call after every event."""
        begun: list[Transfer] = []
        for one in sorted(self._waiting.values(), key=lambda one: -one.tokens):
            if self._busy.isdisjoint(one.ends):
                self._busy.update(one.ends)
                self._under_way[one.key] = self._waiting.pop(one.key)
                begun.append(one)
        return begun
