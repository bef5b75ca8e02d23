"""llm-d's wave admission: a program starts where the KV that is free, less what those there will still grow by, holds its context.

Law, per replica: free = KV tokens - contexts of its programs - the growth expected of them. A program is admitted to the replica with the
most free if that is at least its context; whoever comes among the first 128, or has waited for 60 s, is admitted there without asking. Once
admitted it stays: a later turn never waits. It moves only if it does not fit, by at least as much as the context that would be read again,
and another replica has room for all of it.
- Growth expected of a program: mean + 1.5 standard deviations of what ended programs had still to grow when their context was in the same
  power of two; the mean begins with a guess that weighs as much as 15 programs.
- Group leader first: siblings wait until their group's first turn is over, so that they find its prompt, at most 120 s.
- Of several that wait the longest context goes first.

Source: llm-d-incubation/llm-d-rl, `quickstart/benchmarks/verl/.../wave_admission/admission.py` (a research harness); constants are its
defaults but for the guess. There leaders (off by default) and longest first (a window, off by default) each replace the test for room, and
followers go to other replicas than the leader's, which pays where KV is pulled between peers; here, assumed, both order those that wait.
Assumed: a guess of 8,000 tokens, the mean of this project's workloads (theirs, 100,000, is that of the harness's agents: with it everybody
beyond the first 128 waits for 60 s); a replica that keeps nothing takes anybody; waiting programs are looked at every 0.5 s together.
Cost: O(programs that wait) per check.
"""

from __future__ import annotations

from math import log2

from verl_heddle.simulate.baselines.programs import Home, Program, Programs

FIRST_WAVE = 128
"""Programs admitted without asking (`wave1_size`)."""

MAX_WAIT_S = 60.0
"""Then a program is admitted without asking (`max_wait_s`)."""

LEADER_S = 120.0
"""Siblings wait for their leader for so long at most (`stagger_timeout_s`)."""

GUESS_TOKENS, GUESS_WEIGHT = 8_000.0, 15.0
"""Growth expected before anything has ended (assumed), and the programs it counts for (`prior_weight`)."""

DEVIATIONS = 1.5
"""`reserve_z`."""


class Growth:
    """What programs had still to grow, by size; mean and deviation of running sums."""

    def __init__(self, guess_tokens: float, deviations: float = DEVIATIONS) -> None:
        self._guess, self._deviations = guess_tokens, deviations
        self._sums: dict[int, tuple[int, float, float]] = {}

    def expected(self, context: int) -> float:
        """Tokens a program of this context will still grow by, with a margin."""
        number, total, squares = self._sums.get(_size(context), (0, 0.0, 0.0))
        mean = (self._guess * GUESS_WEIGHT + total) / (GUESS_WEIGHT + number)
        spread = max(0.0, squares - total * total / number) / (number - 1) if number > 1 else 0.0
        return float(mean + self._deviations * spread**0.5)

    def observe(self, context: int, grown: int) -> None:
        """An ended program grew by so much after it had this context."""
        number, total, squares = self._sums.get(_size(context), (0, 0.0, 0.0))
        self._sums[_size(context)] = number + 1, total + grown, squares + grown * grown


def _size(context: int) -> int:
    return int(log2(max(1, context)))


class WaveAdmission(Programs):
    """See the module."""

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
        """Contexts of each live program after its turns."""
        self._leaders: dict[str, str] = {}
        self._landed: set[str] = set()
        """Groups whose leader's first turn is over."""
        self._started = 0

    def free(self, home: Home) -> float:
        """Tokens of KV that nobody is expected to need."""
        return home.capacity - home.used - home.claims

    def asked(self, program: Program, now: float) -> None:
        """The first turn asks for room, a later one goes on."""
        self._leaders.setdefault(program.group, program.key)
        if program.home is None:
            best = self._emptiest()
            if self._may(program, best, now):
                self._take(program, best, now)
            return
        short, best = -self.free(self.homes[program.home]), self._emptiest()
        moves = short >= program.context and best.name != program.home and self.free(best) >= program.context
        self._take(program, best if moves else self.homes[program.home], now)

    def returned(self, program: Program, now: float) -> None:
        """Its group has been there; who waits is looked at in the next check."""
        if self._leaders.get(program.group) == program.key:
            self._landed.add(program.group)
        self._sizes.setdefault(program.key, []).append(program.context)
        self.claim(program, self._growth.expected(program.context))

    def over(self, program: Program, now: float) -> None:
        """Learn from it."""
        for context in (sizes := self._sizes.pop(program.key, [])):
            self._growth.observe(context, sizes[-1] - context)
        if self._leaders.get(program.group) == program.key:
            self._landed.add(program.group)
        if not self.live:  # groups and the first wave are those of one step
            self._leaders, self._landed, self._started = {}, set(), 0

    def check(self, now: float) -> None:
        """Look at those that wait: leaders first, then the longest context."""
        best = self._emptiest()
        ready = [program for program in self.waiting.values() if self._may(program, best, now)]
        for program in sorted(ready, key=lambda one: (not self._leads(one), -one.context, one.number)):
            best = self._emptiest()
            if self._may(program, best, now):
                self._take(program, best, now)

    def _may(self, program: Program, best: Home, now: float) -> bool:
        waited_s = now - program.since_s
        if not (self._leads(program) or program.group in self._landed or waited_s >= LEADER_S):
            return False
        forced = self._started < self._first_wave or waited_s >= self._max_wait_s or not best.programs
        return forced or self.free(best) >= program.context

    def _leads(self, program: Program) -> bool:
        return self._leaders.get(program.group) == program.key

    def _emptiest(self) -> Home:
        return self.fewest(lambda home: (-self.free(home), home.used))

    def _take(self, program: Program, home: Home, now: float) -> None:
        self._started += program.home is None
        self.claim(program, self._growth.expected(program.context))
        self.place(program, home.name, now)
