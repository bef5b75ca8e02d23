"""ThunderAgent: every 5 s programs are paused where a replica is over its KV, and resumed where there is room.

Law, per replica: used = tokens of programs in a turn + `weight` * tokens of programs in tools + 100 per program. A new program starts at
once if nobody is paused and a replica has room for it (the one with the fewest tokens), else it is paused. A program that is not paused
goes on where it is, whatever is used. Every 5 s, first resume, then pause.
- Resume: of the paused, those whose turn waits before new ones before those still in tools, smallest first, as many as the room of all
  replicas together holds; these are placed largest first, each on the replica with the most room, if it fits there.
- Pause, while more is used than the KV holds: programs in tools, smallest first. If that is not enough, those in a turn are marked, to be
  paused when it ends: all of them, since marking frees nothing at once.
- Who has waited for 1800 s is resumed where it was, or on the replica with the fewest programs.
With `decay` tokens of programs in tools count 2^-t after t seconds, for resuming only (off by default).

Source: arXiv 2602.13692 and the public router (ThunderAgent-org/ThunderAgent, `scheduler/router.py`, `backend/state.py`), from which all
constants are. Its formula also subtracts tokens shared by programs, but nothing updates that number, so it is 0 here as there.
Assumed: tokens of a running turn are known when it ends (the router counts them on the way only for clients that stream; verl does not);
a replica that keeps nothing takes the first that waits, however large; engines are vLLM's own, first come, first served.
Cost: O(n log n) per check, n programs.
"""

from __future__ import annotations

from itertools import chain

from verl_heddle.simulate.baselines.programs import Home, Program, Programs

BUFFER_TOKENS = 100
"""Room for decoding, per program (`BUFFER_PER_PROGRAM`)."""

WAIT_S = 1800.0
"""A turn waits for so long at most (`_wait_for_resume`)."""


class ThunderAgent(Programs):
    """See the module."""

    period_s = 5.0
    """`scheduler_interval`."""

    def __init__(self, seed: int = 0, weight: float = 1.0, decay: bool = False) -> None:
        super().__init__(seed)
        self._weight, self._decay = weight, decay
        self._marked: set[str] = set()

    def room(self, home: Home) -> float:
        """Tokens that may still be added."""
        return home.capacity - home.busy_tokens - self._weight * home.idle_tokens - BUFFER_TOKENS * len(home.programs)

    def asked(self, program: Program, now: float) -> None:
        """A paused program waits for the next check."""
        if program.home is not None:
            self.place(program, program.home, now)
        elif not program.turns and not any(other.home is None for other in self.live.values() if other is not program):
            fits = [home for home in self.homes.values() if not home.programs or self.room(home) >= program.context + BUFFER_TOKENS]
            if fits:
                self.place(program, min(fits, key=lambda home: home.used).name, now)

    def returned(self, program: Program, now: float) -> None:
        """The marked are paused."""
        if program.key in self._marked:
            self._marked.discard(program.key)
            self._pause(program)

    def over(self, program: Program, now: float) -> None:
        """What it leaves is given away at the next check."""
        self._marked.discard(program.key)

    def check(self, now: float) -> None:
        """Resume, then pause."""
        self._resume(now)
        for program in [other for other in self.waiting.values() if now - other.since_s >= WAIT_S]:
            self.place(program, program.last or self.fewest(lambda home: len(home.programs)).name, now)
        for home in self.homes.values():
            if self.waiting and not home.programs:
                self.place(next(iter(self.waiting.values())), home.name, now)
            self._make_room(home)

    def _resume(self, now: float) -> None:
        paused = sorted((program for program in self.live.values() if program.home is None), key=lambda program: program.context)
        if not paused:
            return
        rooms = {name: self.room(home) + (self._faded(home, now) if self._decay else 0.0) for name, home in self.homes.items()}
        left = sum(room for room in rooms.values() if room > BUFFER_TOKENS)
        returned = [program for program in paused if program.turns and program.request is not None]
        new = [program for program in paused if not program.turns]
        chosen = []
        for program in chain(returned, new, (program for program in paused if program.turns and program.request is None)):
            if program.context + BUFFER_TOKENS <= left:
                left -= program.context + BUFFER_TOKENS
                chosen.append(program)
        for program in sorted(chosen, key=lambda program: -program.context):
            name = max(rooms, key=lambda name: (rooms[name], -self.homes[name].used))
            if program.context + BUFFER_TOKENS <= rooms[name]:
                rooms[name] -= program.context + BUFFER_TOKENS
                self.place(program, name, now)

    def _faded(self, home: Home, now: float) -> float:
        """What of the tokens of programs in tools no longer counts."""
        idle = (program for program in home.programs.values() if not program.running)
        return sum(program.context * (self._weight - 2.0 ** (program.since_s - now)) for program in idle)

    def _make_room(self, home: Home) -> None:
        by_size = sorted(home.programs.values(), key=lambda program: program.context)
        for program in by_size:
            if self.room(home) >= 0:
                return
            if not program.running:
                self._pause(program)
        if self.room(home) < 0:
            marked = {program.key for program in by_size if program.running} - self._marked
            self._marked |= marked
            self.counts["marked"] += len(marked)

    def _pause(self, program: Program) -> None:
        self.leave(program)
        self.counts["paused"] += 1
