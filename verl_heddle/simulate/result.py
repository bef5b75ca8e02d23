"""The result of a simulation: times by trajectory, turn and replica, and conversion to trace records.

All times are simulated seconds.
- `queue_s`: waiting for a slot, including after a preemption.
- `prefill_s`: from taking a slot to the step that generates the first token, less that step's decode.
- `generate_s`: decoding, including the prefill of other requests in the same steps.
- `tool_s`: tools. `other_s`: the per-turn overhead.
A trajectory's five times add up to `finish_s - start_s` to float precision.

Turns are rows in flat arrays, because 100,000 trajectories have over a million turns.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from verl_heddle.fleet import Replica
from verl_heddle.trajectory import Trajectory, Turn

COLUMNS: dict[str, str] = {
    "trajectory": "i",  # index into the simulated trajectories
    "turn": "i",
    "replica": "i",  # index into `TurnLog.replicas`
    "reason": "i",  # index into `TurnLog.reasons`
    "priority": "q",
    "predicted_remaining": "d",  # tokens; nan = none
    "start_s": "d",  # when the trajectory requested the turn, before `turn_overhead_s`
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
"""Rows buffered before they are copied to the arrays: transposing many at once is several times faster than 16 appends per row."""


class TurnLog:
    """Finished turns in the order in which they ended. `add` is on the simulator's hot path."""

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
        """A column as an array, shape [turns]. It is a view: do not add rows while holding it."""
        self._flush()
        return np.asarray(self._columns[name])

    def _flush(self) -> None:
        for column, values in zip(self._columns.values(), zip(*self._buffer, strict=True), strict=False):
            column.extend(values)
        self._buffer.clear()

    def __len__(self) -> int:
        return len(self._columns["turn"]) + len(self._buffer)


Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class ReplicaResult:
    """Busy times and token counts of one replica in the step."""

    replica: Replica
    busy: tuple[tuple[float, float], ...]
    """Intervals with work, seconds."""
    preemptions: int
    prefilled_tokens: int
    recomputed_tokens: int
    """Prefilled tokens that some replica had computed before: the cost of migrations, evictions and preemptions."""
    restored_tokens: int = 0
    """Tokens read back from the host tier instead."""

    @property
    def busy_s(self) -> float:
        """Total seconds with work."""
        return sum(end - start for start, end in self.busy)


@dataclass(frozen=True, slots=True)
class Result:
    """A simulated step. Arrays have shape [trajectories], in the order passed to `simulate`."""

    start_s: Floats
    finish_s: Floats
    queue_s: Floats
    prefill_s: Floats
    generate_s: Floats
    tool_s: Floats
    other_s: Floats
    output_tokens: NDArray[np.int64]
    """Generated tokens; fewer than the trace has only for cancelled trajectories."""
    outcomes: tuple[str, ...]
    replicas: tuple[ReplicaResult, ...]
    migrations: int
    """Turns that ran on a different replica than their trajectory's previous turn."""
    turns: TurnLog = field(repr=False)
    source: Sequence[Trajectory] = field(repr=False)
    step: int = 0

    @property
    def makespan_s(self) -> float:
        """From the first submit to the last end."""
        return float(self.finish_s.max() - self.start_s.min())

    @property
    def tokens(self) -> int:
        """Tokens generated, including those of cancelled trajectories."""
        return int(self.output_tokens.sum())

    @property
    def throughput_tok_s(self) -> float:
        """Generated tokens per second of makespan."""
        return self.tokens / self.makespan_s if self.makespan_s > 0 else float("inf")

    @property
    def preemptions(self) -> int:
        """Preemptions by KV pressure, by requests with a better priority, and by outages that drop the cache."""
        return sum(item.preemptions for item in self.replicas)

    @property
    def recomputed_tokens(self) -> int:
        """Prefilled tokens that some replica had computed before."""
        return sum(item.recomputed_tokens for item in self.replicas)

    @property
    def last(self) -> int:
        """Index of the trajectory that ended last."""
        return int(self.finish_s.argmax())

    def split(self, index: int | None = None) -> dict[str, float]:
        """The five times of one trajectory, seconds; default: the trajectory that ended last, which explains the makespan."""
        which = self.last if index is None else index
        return {name: float(getattr(self, name)[which]) for name in ("queue_s", "prefill_s", "generate_s", "tool_s", "other_s")}

    def summary(self) -> dict[str, Any]:
        """The numbers of one table row, ready for JSON."""
        makespan = max(self.makespan_s, 1e-12)
        return {
            "makespan_s": self.makespan_s,
            "throughput_tok_s": self.throughput_tok_s,
            "tokens": self.tokens,
            "trajectories": len(self.finish_s),
            "turns": len(self.turns),
            "migrations": self.migrations,
            "preemptions": self.preemptions,
            "prefilled_tokens": sum(item.prefilled_tokens for item in self.replicas),
            "recomputed_tokens": self.recomputed_tokens,
            "restored_tokens": sum(item.restored_tokens for item in self.replicas),
            "idle_share": 1.0 - sum(item.busy_s for item in self.replicas) / (makespan * len(self.replicas)),
            "last": self.split(),
        }

    def trajectories(self) -> list[Trajectory]:
        """The step as trace records, in the form that the recorder of a live run writes and `verl_heddle.report.attribution` reads.

        `gen_s` is prefill plus decoding, as in a live run; `meta` has `prefill_s`, and times start at 0.
        """
        log = self.turns
        columns = {name: log.column(name).tolist() for name in COLUMNS}
        steps: list[list[Turn]] = [[] for _ in self.source]
        for row in range(len(log)):
            index = columns["trajectory"][row]
            turn = columns["turn"][row]
            begin, end = columns["start_s"][row], columns["end_s"][row]
            queue, work = columns["queue_s"][row], columns["prefill_s"][row] + columns["generate_s"][row]
            predicted = columns["predicted_remaining"][row]
            steps[index].append(
                replace(
                    self.source[index].steps[turn],
                    output_tokens=columns["output_tokens"][row],
                    tool_latency_s=columns["tool_s"][row],
                    gen_s=work,
                    route_s=0.0,
                    queue_s=queue,
                    transport_s=max(0.0, end - begin - queue - work),
                    between_s=0.0,
                    replica=log.replicas[columns["replica"][row]],
                    priority=columns["priority"][row],
                    reason=log.reasons[columns["reason"][row]],
                    predicted_remaining=None if predicted != predicted else predicted,
                    preemptions=columns["preemptions"][row],
                    cached_tokens=columns["cached_tokens"][row],
                    start_s=begin - float(self.start_s[index]),
                )
            )
        return [replace(item, steps=tuple(steps[index]), meta={**item.meta, **self._meta(index)}) for index, item in enumerate(self.source)]

    def _meta(self, index: int) -> dict[str, Any]:
        return {
            "uid": f"{self.step}:{self.source[index].prompt_id}",
            "step": self.step,
            "validate": False,
            "outcome": self.outcomes[index],
            "start_s": float(self.start_s[index]),
            "end_s": float(self.finish_s[index]),
            "setup_s": 0.0,
            "score_s": 0.0,
            "prefill_s": float(self.prefill_s[index]),
            "simulated": True,
        }
