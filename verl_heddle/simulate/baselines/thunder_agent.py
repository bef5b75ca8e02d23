"""ThunderAgent: every 5 s, pause programs on replicas that exceed their KV, and resume programs where there is room.

Law, per replica: used = tokens of programs in a turn + `weight` * tokens of programs in tools + 100 per program. A new program starts at
once if no program is paused and a replica has room for it (the one with the fewest tokens); otherwise it is paused. A program that is not
paused continues on its replica regardless of `used`. Every 5 s, first resume, then pause.
- Resume: order the paused programs by class (turn waiting, then new, then in a tool), smallest first within a class, and take as many as
  fit the total room of all replicas. Place these largest first, each on the replica with the most room, if it fits there.
- Pause, while used exceeds the KV: programs in tools, smallest first. If that is not enough, mark programs in a turn, to be paused when it
  ends. All of them are marked, because marking frees nothing at once.
- A program that has waited for 1800 s is resumed on its previous replica, or on the one with the fewest programs.
With `decay`, tokens of programs in tools count 2^-t after t seconds, for resuming only (off by default).

Source: arXiv 2602.13692, and for all constants the public router (ThunderAgent-org/ThunderAgent, `scheduler/router.py`,
`backend/state.py`). Its formula also subtracts tokens shared by programs, but its code never updates that number, so it is 0 here too.
Assumed: tokens of a running turn are known when it ends (the router counts them earlier only for streaming clients, and verl does not
stream); an empty replica takes the first waiting program of any size; engines are vLLM's own, first come, first served.
Cost: O(n log n) per check, n programs.
"""

from __future__ import annotations

from itertools import chain

from verl_heddle.simulate.baselines.programs import Home, Program, Programs

BUFFER_TOKENS = 100
"""Tokens reserved for decoding, per program (`BUFFER_PER_PROGRAM`)."""

WAIT_S = 1800.0
"""Longest wait of a turn (`_wait_for_resume`)."""


class ThunderAgent(Programs):
    """ThunderAgent; a paused program is one without a home."""

    period_s = 5.0
    """`scheduler_interval`."""

    def __init__(self, seed: int = 0, weight: float = 1.0, decay: bool = False) -> None:
        super().__init__(seed)
        self._weight, self._decay = weight, decay
        self._marked: set[str] = set()

    def room(self, home: Home) -> float:
        """KV capacity less `used`, tokens; negative if the replica is over."""
        return home.capacity - home.busy_tokens - self._weight * home.idle_tokens - BUFFER_TOKENS * len(home.programs)

    def asked(self, program: Program, now: float) -> None:
        """Continue on the program's replica; start a new program if it fits; otherwise wait for the next check."""
        if program.home is not None:
            self.place(program, program.home, now)
        elif not program.turns and not any(other.home is None for other in self.live.values() if other is not program):
            fits = [home for home in self.homes.values() if not home.programs or self.room(home) >= program.context + BUFFER_TOKENS]
            if fits:
                self.place(program, min(fits, key=lambda home: home.used).name, now)

    def returned(self, program: Program, now: float) -> None:
        """Pause the program if it is marked."""
        if program.key in self._marked:
            self._marked.discard(program.key)
            self._pause(program)

    def over(self, program: Program, now: float) -> None:
        """Remove its mark; the next check reuses its room."""
        self._marked.discard(program.key)

    def check(self, now: float) -> None:
        """Resume what fits, resume programs that waited too long, then pause what exceeds the KV."""
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
        rooms = {name: self.room(home) + (self._decayed(home, now) if self._decay else 0.0) for name, home in self.homes.items()}
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

    def _decayed(self, home: Home, now: float) -> float:
        """Decayed tokens of programs in tools, which no longer count."""
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
