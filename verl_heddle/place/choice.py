"""Which replicas would be empty soonest with one more trajectory: exact, and without asking those that cannot be.

Law: one more trajectory makes no drain time shorter (the expected staircase of `outlook` grows with every chance added, for any tau that
does not fall). So a replica's drain time without it, plus the reading of its context there, bounds from below what it would have with it;
who is above the bound of another is not looked at. Ties go to the replica that joined first.
Cost: O(len(GRID)) for every replica that is looked at: all when they are equal, few when they are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

import numpy as np

from verl_heddle.place.books import Books
from verl_heddle.place.cost import Floats, Ints
from verl_heddle.place.pace import Latency


def reading_s(books: Books, latency: Latency, tokens: int, cached: Sequence[int] = ()) -> Floats:
    """Seconds to prefill so many tokens on each replica, [replicas]; none on those with these numbers."""
    seconds = np.empty(len(books.names))
    for tp, rows in books.degrees:
        seconds[rows] = latency.prefill_s(tp, tokens)
    seconds[list(cached)] = 0.0
    return seconds


def soonest(books: Books, rows: Floats, reading: Floats) -> int:
    """Number of the replica that is soonest empty with these curves as well, after `reading`, [replicas]."""
    least = books.drains() + reading
    first = int(least.argmin())
    bound = max(least[first], books.drains_with(rows, [first])[0] + reading[first])  # equal but for rounding where next to nothing is added
    could: Ints = np.flatnonzero(least <= bound)
    if len(could) == 1:
        return int(could[0])
    return int(could[(books.drains_with(rows, could.tolist()) + reading[could]).argmin()])


def soon(books: Books, rows: Floats, reading: Floats, home: int, within_s: float) -> Ints:
    """Numbers of the replicas but `home` that would be empty within so many seconds, the soonest first."""
    least = books.drains() + reading
    least[home] = inf
    could: Ints = np.flatnonzero(least <= within_s)
    if not len(could):
        return could
    after = books.drains_with(rows, could.tolist()) + reading[could]
    order = np.argsort(after, kind="stable")
    best: Ints = could[order[after[order] <= within_s]]
    return best
