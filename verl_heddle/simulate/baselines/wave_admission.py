"""llm-d's wave admission: admit a program if its context fits the free KV of a replica, after the expected growth of the programs there.

Law, per replica: free = KV tokens - contexts of its programs - their expected growth. A program is admitted to the replica with the most
free if that is at least its context. The first 128 programs, and programs that have waited for 60 s, are admitted there unconditionally.
An admitted program stays, and its later turns never wait. It moves only if the replica is short by at least the context that would be
recomputed, and another replica has room for the whole context.
- Expected growth of a program: mean + 1.5 standard deviations of the remaining growth of ended programs, measured when their context was in
  the same power of two; the mean starts from a prior that weighs as much as 15 programs.
- Group leader first: siblings wait until their leader's first turn is over, so that its prompt is cached, but at most 120 s.
- Among waiting programs, the longest context goes first.

Source: llm-d-incubation/llm-d-rl, `quickstart/benchmarks/verl/.../wave_admission/admission.py` (a research harness); all constants but the
prior are its defaults. There, leaders (off by default) and longest first (a window, off by default) each replace the test for room, and
followers go to replicas other than the leader's, which pays if KV is pulled between peers. Here both only order waiting programs (assumed).
Assumed: a prior of 8,000 tokens, the mean of this project's workloads (the harness uses 100,000, the mean of its agents, with which every
program after the first 128 waits for 60 s); an empty replica admits any program; waiting programs are checked together every 0.5 s.
Cost: O(waiting programs) per check.
"""

from __future__ import annotations

from math import log2

from verl_heddle.simulate.baselines.programs import Home, Program, Programs

FIRST_WAVE = 128
"""Programs admitted unconditionally at the start of a step (`wave1_size`)."""

MAX_WAIT_S = 60.0
"""Wait after which a program is admitted unconditionally (`max_wait_s`)."""

LEADER_S = 120.0
"""Longest wait of siblings for their leader (`stagger_timeout_s`)."""

GUESS_TOKENS, GUESS_WEIGHT = 8_000.0, 15.0
"""Prior of the growth (assumed), and the number of programs it counts as (`prior_weight`)."""

DEVIATIONS = 1.5
"""`reserve_z`."""


class Growth:
    """Remaining growth of programs by context size: mean and deviation from running sums."""

    def __init__(self, guess_tokens: float, deviations: float = DEVIATIONS) -> None:
        self._guess, self._deviations = guess_tokens, deviations
        self._sums: dict[int, tuple[int, float, float]] = {}

    def expected(self, context: int) -> float:
        """Expected remaining growth of a program with this context, tokens, including the margin."""
        number, total, squares = self._sums.get(_size(context), (0, 0.0, 0.0))
        mean = (self._guess * GUESS_WEIGHT + total) / (GUESS_WEIGHT + number)
        spread = max(0.0, squares - total * total / number) / (number - 1) if number > 1 else 0.0
        return float(mean + self._deviations * spread**0.5)

    def observe(self, context: int, grown: int) -> None:
        """Record that an ended program grew by `grown` tokens after it had this context."""
        number, total, squares = self._sums.get(_size(context), (0, 0.0, 0.0))
        self._sums[_size(context)] = number + 1, total + grown, squares + grown * grown


def _size(context: int) -> int:
    return int(log2(max(1, context)))


class WaveAdmission(Programs):
    """llm-d's wave admission, by default with the harness's constants and this project's prior."""

    period_s = 0.5
    """`poll_interval_s`."""

    def __init__(
        self,
        seed: int = 0,
        guess_tokens: float = GUESS_TOKENS,
        deviations: float = DEVIATIONS,
        max_wait_s: float = MAX_WAIT_S,
        first_wave: int = FIRST_WAVE,
    ) -> None:
        super().__init__(seed)
        self._growth = Growth(guess_tokens, deviations)
        self._max_wait_s, self._first_wave = max_wait_s, first_wave
        self._sizes: dict[str, list[int]] = {}
        """Contexts of each live program after each of its turns."""
        self._leaders: dict[str, str] = {}
        self._leader_done: set[str] = set()
        """Groups whose leader's first turn is over."""
        self._started = 0

    def free(self, home: Home) -> float:
        """KV tokens that no program of the replica is expected to need; may be negative."""
        return home.capacity - home.used - home.claims

    def asked(self, program: Program, now: float) -> None:
        """Admit the first turn if it may start; a later turn continues or moves."""
        self._leaders.setdefault(program.group, program.key)
        if program.home is None:
            best = self._emptiest()
            if self._may_start(program, best, now):
                self._admit(program, best, now)
            return
        short, best = -self.free(self.homes[program.home]), self._emptiest()
        moves = short >= program.context and best.name != program.home and self.free(best) >= program.context
        self._admit(program, best if moves else self.homes[program.home], now)

    def returned(self, program: Program, now: float) -> None:
        """Mark the group if this is its leader, and update the expected growth. The next check admits waiting programs."""
        if self._leaders.get(program.group) == program.key:
            self._leader_done.add(program.group)
        self._sizes.setdefault(program.key, []).append(program.context)
        self.claim(program, self._growth.expected(program.context))

    def over(self, program: Program, now: float) -> None:
        """Record the growth of the ended program."""
        for context in (sizes := self._sizes.pop(program.key, [])):
            self._growth.observe(context, sizes[-1] - context)
        if self._leaders.get(program.group) == program.key:
            self._leader_done.add(program.group)
        if not self.live:  # groups and the first wave are those of one step
            self._leaders, self._leader_done, self._started = {}, set(), 0

    def check(self, now: float) -> None:
        """Admit waiting programs: leaders first, then the longest context."""
        best = self._emptiest()
        ready = [program for program in self.waiting.values() if self._may_start(program, best, now)]
        for program in sorted(ready, key=lambda waiting: (not self._leads(waiting), -waiting.context, waiting.number)):
            best = self._emptiest()
            if self._may_start(program, best, now):
                self._admit(program, best, now)

    def _may_start(self, program: Program, best: Home, now: float) -> bool:
        waited_s = now - program.since_s
        if not (self._leads(program) or program.group in self._leader_done or waited_s >= LEADER_S):
            return False
        forced = self._started < self._first_wave or waited_s >= self._max_wait_s or not best.programs
        return forced or self.free(best) >= program.context

    def _leads(self, program: Program) -> bool:
        return self._leaders.get(program.group) == program.key

    def _emptiest(self) -> Home:
        return self.fewest(lambda home: (-self.free(home), home.used))

    def _admit(self, program: Program, home: Home, now: float) -> None:
        self._started += program.home is None
        self.claim(program, self._growth.expected(program.context))
        self.place(program, home.name, now)
