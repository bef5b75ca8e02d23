"""Rows of numbers by key, in one growing array: what many trajectories share a vectorised prediction with.

Invariants: a key keeps its row for life; rows of removed keys are used again; the array only grows, to the largest number of keys alive at
once. Cost: O(1) per key, amortised.
"""

from __future__ import annotations

import numpy as np

from verl_heddle.predict.quantities import Floats


class Table:
    """`columns` float64 numbers per row; a new row is all zeros."""

    def __init__(self, columns: int) -> None:
        self.rows: Floats = np.zeros((64, columns))
        self._free: list[int] = []
        self._used = 0

    def take(self) -> int:
        """Number of a fresh row."""
        if self._free:
            row = self._free.pop()
            self.rows[row] = 0.0
            return row
        if self._used == len(self.rows):
            self.rows = np.concatenate([self.rows, np.zeros_like(self.rows)])
        self._used += 1
        return self._used - 1

    def give(self, row: int) -> None:
        """The row is not needed any more."""
        self._free.append(row)
