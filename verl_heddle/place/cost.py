"""Computes the cost of a group on a replica, and how far along the sorted trajectories a replica gets within a makespan.

A replica of degree tp that decodes k trajectories together takes `tau_tp(k)` seconds per token of each, non-decreasing in k. Two costs
of a group with tokens N_1 >= N_2 >= ... and tool seconds t_i:

    longest     max_i (N_i * tau(|g|) + t_i)                  the batch stays full: Heddle, eq. (2); tools are not slowed by neighbours
    staircase   max_i (D_i + t_i),  D_i = N_i * tau(i) + sum over k > i of N_k * (tau(k) - tau(k - 1))
                                                              the batch shrinks as short trajectories end; without tools it is
                                                              sum_k N_k * (tau(k) - tau(k - 1)), the exact drain time of the replica

Removing a trajectory from a group never raises either cost. Order of the trajectories: by tokens, most first; under `longest` with tools by
the seconds per token that the makespan T leaves them, (T - t_i) / N_i, least first, which is the order an exchange argument allows there.
Source: Heddle (arXiv 2603.28101) section 5; the staircase as in DARTS (arXiv 2605.30859).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from math import inf

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.intp]
Reach = Callable[[int], int]
"""First rank not covered by a group that begins at a rank."""

TINY = 1e-9
"""Tokens; stands for a length of 0 in divisions, so that the quotient is beyond every table and still a number."""

FIRST_LOOK = 32
"""Trajectories priced first when building a staircase; doubled until the makespan is exceeded."""


class Cost(StrEnum):
    """Cost function of a group; see the module."""

    LONGEST = "longest"
    STAIRCASE = "staircase"


@dataclass(frozen=True, slots=True)
class Degree:
    """Replicas of one tensor-parallel degree. `tau[k - 1]`: seconds per token with k trajectories together; its length is the slots.

    Raises:
        ValueError: no slots, or times that are negative, not finite or decreasing.
    """

    tp: int
    tau: Floats
    kv_tokens: float = inf
    """KV tokens that all trajectories of a group may need together."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "tau", np.ascontiguousarray(self.tau, dtype=np.float64))
        if self.tp < 1 or self.tau.ndim != 1 or not len(self.tau) or not self.kv_tokens > 0:
            raise ValueError(f"tp={self.tp}: a degree needs tp and KV tokens above 0 and times for at least one slot")
        if not np.all(np.isfinite(self.tau)) or self.tau[0] < 0 or np.any(np.diff(self.tau) < 0):
            raise ValueError(f"tp={self.tp}: seconds per token must be finite, not negative and not decreasing with the batch")


@dataclass(frozen=True, slots=True)
class Work:
    """The trajectories, arrays [n]: tokens to generate, seconds in tools, KV tokens each will hold. Make it with `work`."""

    tokens: Floats
    tool_s: Floats
    kv_tokens: Floats

    def __len__(self) -> int:
        return len(self.tokens)


def work(tokens: ArrayLike, tool_s: ArrayLike = 0.0, kv_tokens: ArrayLike = 0.0) -> Work:
    """`tool_s` and `kv_tokens` broadcast.

    Raises:
        ValueError: a number is negative or not finite, or shapes do not match.
    """
    arrays = [np.asarray(part, dtype=np.float64) for part in (tokens, tool_s, kv_tokens)]
    if arrays[0].ndim != 1 or any(part.ndim > 1 or (part.ndim and part.shape != arrays[0].shape) for part in arrays[1:]):
        raise ValueError(f"tokens, tool_s and kv_tokens need one number per trajectory, got shapes {[part.shape for part in arrays]}")
    if any(not np.all(np.isfinite(part)) or np.any(part < 0) for part in arrays):
        raise ValueError("tokens, tool_s and kv_tokens must be finite and not negative")
    return Work(*(np.broadcast_to(part, arrays[0].shape) for part in arrays))


def price(items: Work, members: Ints | Sequence[int], degree: Degree, cost: Cost = Cost.STAIRCASE) -> float:
    """Seconds that these trajectories cost on one replica; inf if they exceed its slots or KV tokens, 0 for none."""
    picked = np.asarray(members, dtype=np.intp)
    if not len(picked):
        return 0.0
    if len(picked) > len(degree.tau) or items.kv_tokens[picked].sum() > degree.kv_tokens:
        return inf
    tokens, tool_s = items.tokens[picked], items.tool_s[picked]
    if cost is Cost.LONGEST:
        return float((tokens * degree.tau[len(picked) - 1] + tool_s).max())
    falling = np.argsort(-tokens, kind="stable")
    return float(_stairs(tokens[falling], tool_s[falling], degree.tau, _steps(degree.tau))[-1])


class Ranks:
    """The trajectories in the order in which groups are cut from them, and the reach of each degree within a makespan."""

    def __init__(self, items: Work, degrees: Sequence[Degree], cost: Cost) -> None:
        self._items, self._degrees, self._cost = items, degrees, cost
        self._tables = [degree.tau.tolist() for degree in degrees]
        self._steps = [_steps(degree.tau) for degree in degrees]
        self._limited = any(degree.kv_tokens < inf for degree in degrees)
        self._shifting = cost is Cost.LONGEST and bool(items.tool_s.any())
        self._order = np.argsort(-items.tokens, kind="stable")
        self._left: Floats | None = None
        self._tokens, self._tool_s = items.tokens[self._order], items.tool_s[self._order]
        self._floats = np.maximum(self._tokens, TINY).tolist()
        self._hold(self._order)

    @property
    def order(self) -> Ints:
        """Trajectory at each rank, as of the last `within`."""
        return self._order if self._left is None else np.argsort(self._left, kind="stable")

    @property
    def floor_s(self) -> float:
        """Lower bound of any placement: the longest trajectory alone on its best replica."""
        best = np.min([degree.tau[0] for degree in self._degrees])
        return float((self._items.tokens * best + self._items.tool_s).max())

    def within(self, makespan_s: float) -> list[Reach]:
        """One function per degree."""
        if self._shifting:
            self._left = (makespan_s - self._items.tool_s) / np.maximum(self._items.tokens, TINY)
            pace = np.sort(self._left)
            if self._limited:
                self._hold(self.order)
        made: list[Reach] = []
        for number in range(len(self._degrees)):
            if self._cost is Cost.STAIRCASE:
                reach = self._staircase(number, makespan_s)
            elif self._shifting:
                reach = _paced(self._tables[number], pace)
            else:
                reach = _longest(self._tables[number], self._floats, makespan_s)
            made.append(self._capped(reach, self._degrees[number].kv_tokens))
        return made

    def _hold(self, order: Ints) -> None:
        self._held = [0.0, *np.cumsum(self._items.kv_tokens[order]).tolist()] if self._limited else []

    def _capped(self, reach: Reach, kv_tokens: float) -> Reach:
        if kv_tokens == inf:
            return reach
        held = self._held

        def capped(start: int) -> int:
            return max(start, min(reach(start), bisect_right(held, held[start] + kv_tokens) - 1))

        return capped

    def _staircase(self, number: int, makespan_s: float) -> Reach:
        tau, steps = self._degrees[number].tau, self._steps[number]
        tokens, tool_s, count = self._tokens, self._tool_s, len(self._items)
        seen = [FIRST_LOOK]

        def staircase(start: int) -> int:
            most = min(count - start, len(tau))
            look = min(most, seen[0])
            while True:
                stairs = _stairs(tokens[start : start + look], tool_s[start : start + look], tau, steps)
                size = int(stairs.searchsorted(makespan_s, "right"))
                if size < look or look == most:
                    seen[0] = max(FIRST_LOOK, size + size // 2)
                    return start + size
                look = min(most, 2 * look)

        return staircase


def _longest(tau: list[float], tokens: list[float], makespan_s: float) -> Reach:
    count = len(tokens)

    def longest(start: int) -> int:
        end = start + bisect_right(tau, makespan_s / tokens[start])
        return end if end < count else count

    return longest


def _paced(tau: list[float], pace: Floats) -> Reach:
    count, at = len(pace), pace.item

    def paced(start: int) -> int:
        end = start + bisect_right(tau, at(start))
        return end if end < count else count

    return paced


def _steps(tau: Floats) -> Floats:
    """Increase of seconds per token with each further trajectory."""
    return np.diff(tau, prepend=0.0)


def _stairs(tokens: Floats, tool_s: Floats, tau: Floats, steps: Floats) -> Floats:
    """Staircase cost of the first 1, 2, ... of these trajectories, given by tokens, most first; non-decreasing."""
    drained = np.cumsum(tokens * steps[: len(tokens)])
    if not tool_s.any():
        return drained
    late = np.maximum.accumulate(tokens * tau[: len(tokens)] + tool_s - drained)
    return np.maximum(late + drained, drained)
