"""NeMo-RL's longest-first scheduling (pull request #4007): first a probe of each group, then groups by their longest finished sample.

Law: turns wait in one queue for all replicas. While a replica has a free slot, the first turn goes to the replica with the fewest in flight
(ties round-robin). The order of groups is:
1. Groups with no admitted sample; each sends one sample, the probe. By arrival.
2. Groups whose probe has not ended, which are assumed to be as long as a generation can be. Fewest admitted samples first.
3. Known groups, longest finished sample first, then by arrival.
No turn is preempted, and KV is ignored. The probe gives the first length of a group; every later sample that ends may raise it.

Source: NVIDIA-NeMo/RL pull request #4007 (open), `nemo_rl/models/generation/vllm/lfs/scheduler.py`, mode `lfs`. Its only constant is
`max_num_seqs`; its lookahead and fairness interval are 0 by default and not implemented here. Engines: vLLM's, first come, first served.
Assumed, because it was written for single turns: the length of a sample is that of its whole trajectory, known when it ends; a later turn
waits with its group for a slot of the replica that has its context (`sticky`; the pull request chooses a replica for each turn).
Cost: O(waiting groups * replicas) per admission.
"""

from __future__ import annotations

from math import inf

from verl_heddle.simulate.baselines.programs import Home, Program, Programs


class Lfs(Programs):
    """NeMo-RL's `lfs` mode; `sticky`: later turns wait for the replica that has their context."""

    def __init__(self, seed: int = 0, sticky: bool = True) -> None:
        super().__init__(seed)
        self._sticky = sticky
        self._queues: dict[tuple[str, str], dict[str, Program]] = {}
        """Waiting programs by group and required replica ("": any), in order of arrival."""
        self._queue_of: dict[str, tuple[str, str]] = {}
        """Queue of each waiting program."""
        self._samples: dict[str, int] = {}
        """Admitted samples by group."""
        self._probes: dict[str, str] = {}
        """The probe of each group."""
        self._longest: dict[str, int] = {}
        """Tokens of the longest finished sample of each known group."""
        self._next_index = 0

    def asked(self, program: Program, now: float) -> None:
        """Queue the turn with its group, and fill free slots."""
        key = self._queue_of[program.key] = program.group, (program.home or "") if self._sticky else ""
        self._queues.setdefault(key, {})[program.key] = program
        self.admit(now)

    def returned(self, program: Program, now: float) -> None:
        """A slot is free. Fill it in `check`, at the end of this instant: if the trajectory ends here, its length counts by then."""
        self._dequeue(program)
        self.check_at(now)

    def over(self, program: Program, now: float) -> None:
        """Update the length of the program's group."""
        self._dequeue(program)
        if program.group in self._longest or self._probes.get(program.group) == program.key:
            self._longest[program.group] = max(program.served, self._longest.get(program.group, 0))
        if not self.live:  # groups are those of one step
            self._samples, self._probes, self._longest = {}, {}, {}

    def check(self, now: float) -> None:
        """Fill the slots that became free at this instant."""
        self.admit(now)

    def rank(self, group: str) -> tuple[int, float, int]:
        """Sort key of the group; lowest first."""
        if group not in self._samples:
            return 0, 0.0, 0
        known = self._longest.get(group)
        return (1, -inf, self._samples[group]) if known is None else (1, -float(known), 0)

    def admit(self, now: float) -> None:
        """Fill free slots with the waiting turns in order."""
        while free := [home for home in self.homes.values() if home.busy < home.replica.slots]:
            names = {home.name for home in free}
            queues = (queue for (_, name), queue in self._queues.items() if name in names or name not in self.homes)
            program = min((next(iter(queue.values())) for queue in queues), key=self._order, default=None)
            if program is None:
                return
            if not program.turns:
                self._probes.setdefault(program.group, program.key)
                self._samples[program.group] = self._samples.get(program.group, 0) + 1
            _, name = self._queue_of[program.key]
            self.place(program, name if name in names else self._next_home(free).name, now)
            self._dequeue(program)

    def _order(self, program: Program) -> tuple[tuple[int, float, int], float, int]:
        return self.rank(program.group), program.since_s, program.number

    def _next_home(self, free: list[Home]) -> Home:
        """The replica with the fewest turns in flight; among equals, the next in fleet order after the last choice."""
        names = list(self.homes)
        best = min(free, key=lambda home: (home.busy, (names.index(home.name) - self._next_index) % len(names)))
        self._next_index = (names.index(best.name) + 1) % len(names)
        return best

    def _dequeue(self, program: Program) -> None:
        key = self._queue_of.pop(program.key, None)
        if key is not None:
            del self._queues[key][program.key]
            if not self._queues[key]:
                del self._queues[key]
