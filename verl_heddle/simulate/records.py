"""One row per turn, kept in flat arrays: 100,000 trajectories are over a million turns."""

from __future__ import annotations

from array import array
from typing import Any

import numpy as np
from numpy.typing import NDArray

COLUMNS: dict[str, str] = {
    "trajectory": "i",  # index into the trajectories given
    "turn": "i",
    "replica": "i",  # index into `TurnLog.replicas`
    "reason": "i",  # index into `TurnLog.reasons`
    "priority": "q",
    "predicted_remaining": "d",  # tokens; nan = none
    "start_s": "d",  # when the trajectory wanted the turn, before `turn_overhead_s`
    "end_s": "d",  # last token
    "queue_s": "d",
    "prefill_s": "d",
    "generate_s": "d",
    "tool_s": "d",
    "output_tokens": "i",
    "cached_tokens": "i",
    "recomputed_tokens": "i",
    "preemptions": "i",
}
"""Column name to array type code."""


BUFFER = 4096
"""Rows collected before they go to the arrays: transposing many at once is several times faster than 16 appends a row."""


class TurnLog:
    """Finished turns in order of their ends. `add` is on the simulator's hot path."""

    __slots__ = ("_buffer", "_columns", "_reason_numbers", "reasons", "replicas")

    def __init__(self) -> None:
        self._columns = {name: array(code) for name, code in COLUMNS.items()}
        self._buffer: list[tuple[Any, ...]] = []
        self._reason_numbers: dict[str, int] = {}
        self.reasons: list[str] = []
        self.replicas: list[str] = []

    def reason_number(self, reason: str) -> int:
        """Index of a decision's reason in `reasons`."""
        number = self._reason_numbers.get(reason)
        if number is None:
            number = self._reason_numbers[reason] = len(self.reasons)
            self.reasons.append(str(reason))
        return number

    def add(self, row: tuple[Any, ...]) -> None:
        """Append one row, values in the order of `COLUMNS`."""
        self._buffer.append(row)
        if len(self._buffer) == BUFFER:
            self._flush()

    def column(self, name: str) -> NDArray[Any]:
        """A column as an array, shape [turns]; a view, do not add rows while holding it."""
        self._flush()
        return np.asarray(self._columns[name])

    def _flush(self) -> None:
        for column, values in zip(self._columns.values(), zip(*self._buffer, strict=True), strict=False):
            column.extend(values)
        self._buffer.clear()

    def __len__(self) -> int:
        return len(self._columns["turn"]) + len(self._buffer)
