"""LPT (longest processing time first) with true lengths: what perfect prediction would give the plain longest-first rule.

Law: before the step, assign trajectories in order of total output, longest first, each to the replica with the smallest planned load, where
load = tokens / tp; a trajectory stays there. Inside the replica, the priority is the true length, longest first. Source: Graham's LPT rule
(SIAM J. Appl. Math. 17, 1969), at most 4/3 - 1/(3m) times the optimum on m equal machines *without* interference. With batching it is a
baseline, not an optimum. Needs `EngineOptions(order="priority")`. Cost: O(n log n + n replicas) once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from heapq import heapify, heapreplace

from verl_heddle.fleet import Replica
from verl_heddle.schedule.priority import longest_first
from verl_heddle.simulate.baselines.base import Peer, PeerReason
from verl_heddle.trajectory import Reason, Trajectory, TurnStart

Key = tuple[str, int | str]


class LptOracle(Peer):
    """LPT over `trajectories`, the simulated ones; others go to the least loaded replica, without priority."""

    def __init__(self, trajectories: Sequence[Trajectory], seed: int = 0) -> None:
        super().__init__(seed)
        self._tokens: dict[Key, int] = {(item.prompt_id, item.trial): item.output_tokens for item in trajectories}
        self._plan: dict[Key, str] = {}
        self._fleet: dict[str, Replica] = {}

    def replicas_added(self, replicas: Iterable[Replica]) -> None:
        """Plan again on the new fleet."""
        replicas = list(replicas)
        super().replicas_added(replicas)
        self._fleet.update((replica.name, replica) for replica in replicas)
        self._replan()

    def replicas_removed(self, names: Iterable[str]) -> None:
        """Plan again on the remaining fleet."""
        names = list(names)
        super().replicas_removed(names)
        for name in names:
            self._fleet.pop(name, None)
        self._replan()

    def _replan(self) -> None:
        loads = [(0.0, number, replica) for number, replica in enumerate(self._fleet.values())]
        heapify(loads)
        self._plan.clear()
        for key, tokens in sorted(self._tokens.items(), key=lambda item: -item[1]) if loads else ():
            load, number, replica = loads[0]
            self._plan[key] = replica.name
            heapreplace(loads, (load + tokens / replica.tp, number, replica))

    def place(self, turn: TurnStart) -> tuple[str, Reason | PeerReason]:
        """The planned replica; if there is no plan, the trajectory's last replica or the least loaded one."""
        planned = self._plan.get((turn.trajectory.prompt, turn.trajectory.sample))
        if planned is not None:
            return planned, PeerReason.ORACLE
        return self.home_of(turn) or self.least_loaded(), Reason.LEAST_INFLIGHT

    def priority(self, turn: TurnStart) -> int:
        """Longest first."""
        return longest_first(self._tokens.get((turn.trajectory.prompt, turn.trajectory.sample)), 1)
