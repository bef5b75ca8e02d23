"""For how long a context is held through a tool call while somebody waits for its room.

Law. Holding is renting (ski rental): holding c tokens through a tool call of t seconds costs c * t token-seconds of KV cache; evicting them
costs c / r seconds of an engine with C tokens of KV, which is c * C / r. They are equal at t* = C / r, whatever c is: the time in which the
engine reads its whole KV cache. A context is held for t*, which costs at most twice the best without knowing t; not at all, where by the
last `GAPS` tool calls holding costs `CLEARLY` more than reading again each time.

Source: Karlin et al. 1988 (ski rental); Continuum (arXiv 2511.02230) for a time to live of KV cache. Cost: O(`GAPS`) every few tool calls.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection

GAPS, FEW = 256, 32
"""Tool calls that are looked back on, and how many there must be."""

CLEARLY = 1.5
"""A held trajectory goes on without waiting, which no price of KV tells: at 1.0, tools about as long as t* lose 1 to 3 %."""


class Rent:
    """What recent tool calls say about holding."""

    def __init__(self) -> None:
        self._gaps: deque[float] = deque(maxlen=GAPS)
        self._measured = 0
        self._futile: dict[float, bool] = {}
        """By t*, asked and not outdated."""

    def measured(self, gap_s: float) -> None:
        """A tool call has taken so long, from the end of a turn to the start of the next."""
        self._gaps.append(gap_s)
        self._measured += 1
        if self._measured % (FEW // 2) == 0:
            self._futile.clear()

    def hold_s(self, rent_s: float) -> float:
        """How long to hold a context whose t* is `rent_s`."""
        if rent_s not in self._futile:
            self._futile[rent_s] = self._measured >= FEW and futile(self._gaps, rent_s)
        return 0.0 if self._futile[rent_s] else rent_s


def futile(gaps: Collection[float], hold_s: float) -> bool:
    """Whether, through tool calls of these lengths, to hold for t* costs clearly more than it saves: per token and call min(t, t*), against
    t* where the tool returns in time."""
    cost = sum(min(gap, hold_s) for gap in gaps)
    return cost > CLEARLY * hold_s * sum(gap <= hold_s for gap in gaps)
