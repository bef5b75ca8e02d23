"""Keeps the training rows: the state at one moment, and the remaining amounts after it, exact or as lower bounds.

Law: a ring of the `ROWS` newest rows. A finished trajectory gives exact amounts; a censored one (aborted, failed, truncated, still
running) gives only lower bounds, with an upper bound of infinity. Snapshots are taken after the turns of `looked_at`, ever sparser, so
that a long trajectory does not outvote many short ones. A row holds the state, not the features built from it: those depend on the pool.
All rows must use one pool (`fit`), or the trees would learn how wrong the pool was early in the run. Cost: O(rows of the trajectory);
memory `ROWS` rows of float32, 9 MB.
"""

from __future__ import annotations

from dataclasses import dataclass
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from verl_heddle.predict.live import GROUP_COLUMNS, OWN_COLUMNS, Snapshot
from verl_heddle.predict.quantities import FLOOR, QUANTITIES, TOKENS

ROWS = 50_000
"""About 6,000 trajectories of 8 rows, 6 to 20 steps of a usual batch: enough for the trees, recent enough for the policy."""

DENSE_TURNS = 6
"""Every turn up to this one gives a row, since most decisions fall there; then two per doubling."""

Rows = NDArray[np.float32]


def looked_at(turn: int) -> bool:
    """Whether the end of turn number `turn` (from 1; 0 is the start) makes a training row: 0 to 6, 8, 12, 16, 24, 32, ..."""
    if turn <= DENSE_TURNS:
        return True
    odd = turn // (turn & -turn)
    return odd in (1, 3)


@dataclass(frozen=True, slots=True)
class Batch:
    """Training rows: state (n, columns of `Lives`), bounds (n, QUANTITIES) in plain units, and the crc32 of each row's prompt."""

    state: Rows
    lower: Rows
    upper: Rows
    prompt: NDArray[np.uint32]

    def __len__(self) -> int:
        return len(self.state)


def rows_of(prompt: str, snapshots: list[Snapshot], total: tuple[float, float, float], censored: bool) -> Batch:
    """The training rows of one trajectory that reached `total` (tokens, turns, tool seconds).

    Snapshots with nothing after them are dropped: finished trajectories are not predicted, and a censored lower bound of zero teaches
    nothing.
    """
    used = [shot for shot in snapshots if total[TOKENS] - shot.done[TOKENS] >= FLOOR[TOKENS]]
    if not used:
        return EMPTY
    left = np.maximum(np.array(total) - np.array([shot.done for shot in used]), FLOOR).astype(np.float32)
    upper = np.full_like(left, np.inf) if censored else left
    state = np.array([shot.state for shot in used], dtype=np.float32)
    return Batch(state, left, upper, np.full(len(used), crc32(prompt.encode()), dtype=np.uint32))


EMPTY = Batch(
    np.empty((0, OWN_COLUMNS + GROUP_COLUMNS), dtype=np.float32),
    np.empty((0, QUANTITIES), dtype=np.float32),
    np.empty((0, QUANTITIES), dtype=np.float32),
    np.empty(0, dtype=np.uint32),
)


class Window:
    """Ring of the newest training rows."""

    def __init__(self, rows: int = ROWS) -> None:
        self._size = rows
        self._batches: list[Batch] = []
        self._number = 0

    def __len__(self) -> int:
        return min(self._number, self._size)

    def add(self, batch: Batch) -> None:
        """Append the newest rows; the oldest beyond the window are dropped."""
        if len(batch):
            self._batches.append(batch)
            self._number += len(batch)
            if self._number > 2 * self._size or len(self._batches) > self._size:
                self._batches = [self.copy()]
                self._number = len(self._batches[0])

    def copy(self, *more: Batch) -> Batch:
        """The rows of the window, oldest first, followed by `more`."""
        merged = _merge(self._batches)
        kept = Batch(*(getattr(merged, name)[-self._size :] for name in Batch.__slots__))
        return _merge([kept, *more])


def _merge(batches: list[Batch]) -> Batch:
    batches = batches or [EMPTY]
    return Batch(*(np.concatenate([getattr(batch, name) for batch in batches]) for name in Batch.__slots__))
