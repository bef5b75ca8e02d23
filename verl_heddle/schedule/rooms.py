"""Which homes have room, where there are many: as `Residents` would find by going through them, but all at once.

While somebody waits the question is asked after every event. A row per home; the caller says which home has changed. Cost: O(1) per change,
one pass over arrays per question: 20 us with 1,000 homes, where going through them takes 400.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from verl_heddle.schedule.resident import Home

USED, RUNNING, RESIDENTS = range(3)


class Rooms:
    """Of these homes, in their order, until one joins or leaves. `admit`: share of its KV cache up to which a home has room."""

    def __init__(self, homes: Iterable[Home], admit: float) -> None:
        self._homes = list(homes)
        self._row = {home.replica.name: row for row, home in enumerate(self._homes)}
        self._room = np.array([home.capacity * admit for home in self._homes])
        self._most = np.array([home.most for home in self._homes])
        self._table = np.zeros((3, len(self._homes)))
        self._sharers: dict[str, dict[int, None]] = {}
        """Rows of the homes that a prompt is counted at."""
        for row, home in enumerate(self._homes):
            self.changed(home)
            for prompt in home.prompts:
                self._sharers.setdefault(prompt, {})[row] = None

    def changed(self, home: Home, prompt: str | None = None) -> None:
        """Its tokens, turns or residents are others; `prompt`: that is counted there from now on, or no more."""
        row, table = self._row[home.replica.name], self._table
        table[USED, row], table[RUNNING, row], table[RESIDENTS, row] = home.used, home.running, len(home.residents)
        if prompt is None:
            return
        sharers = self._sharers.setdefault(prompt, {})
        if prompt in home.prompts:
            sharers[row] = None
        else:
            sharers.pop(row, None)
            if not sharers:
                del self._sharers[prompt]

    def find(self, own: float, prompt: str, prompt_tokens: int, closed: Iterable[str], first: str | None) -> list[Home]:
        """Homes with room for a trajectory of so many tokens beside its prompt: `first`, if it has, or those with the fewest turns. Not the
        `closed`."""
        used, running, residents = self._table
        need = np.full(len(used), float(own + prompt_tokens))
        sharers = self._sharers.get(prompt)
        if sharers:
            need[list(sharers)] = own
        room = (used + need <= self._room) & (residents < self._most) | (residents == 0)
        for name in closed:
            if name in self._row:
                room[self._row[name]] = False
        row = None if first is None else self._row.get(first)
        if row is not None and room[row]:
            return [self._homes[row]]
        found = room.nonzero()[0]
        if not len(found):
            return []
        turns = running[found]
        return [self._homes[row] for row in found[turns == turns.min()]]
