"""Many recorded trajectories as columns: what workers send, and what a step's metrics are computed from.

A list of 200,000 `Turn`s takes seconds to pickle, to unpickle and to walk; the same values as one list per field take tenths of that, and
turn into arrays without a loop. Records are made from them only where somebody needs records (`records`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from verl_heddle.trajectory import Trajectory, Turn

Floats = NDArray[np.float64]

TURN_FIELDS = tuple(item.name for item in fields(Turn))
_values_of = attrgetter(*TURN_FIELDS)


class Head(NamedTuple):
    """A trajectory without its turns; `turns` is their number."""

    source: str
    workload: str
    prompt_id: str
    trial: int | str
    prompt_tokens: int | None
    reward: float | None
    model: str | None
    meta: dict[str, Any]
    turns: int


@dataclass(slots=True)
class Columns:
    """`turns`: by field of `Turn`, the values of all turns, trajectory after trajectory in the order of `heads`."""

    heads: list[Head] = field(default_factory=list)
    turns: dict[str, list[Any]] = field(default_factory=lambda: {name: [] for name in TURN_FIELDS})

    @classmethod
    def of(cls, trajectories: Iterable[Trajectory]) -> Columns:
        """Of records; their `meta` is shared, not copied."""
        heads: list[Head] = []
        turns: list[Turn] = []
        for one in trajectories:
            steps = one.steps
            heads.append(
                Head(one.source, one.workload, one.prompt_id, one.trial, one.prompt_tokens, one.reward, one.model, one.meta, len(steps))
            )
            turns += steps
        if not turns:
            return cls(heads)
        return cls(heads, {name: list(column) for name, column in zip(TURN_FIELDS, zip(*map(_values_of, turns), strict=True), strict=True)})

    def __len__(self) -> int:
        return len(self.heads)

    @property
    def metas(self) -> list[dict[str, Any]]:
        """Of every trajectory; changes are changes here."""
        return [head.meta for head in self.heads]

    def extend(self, more: Columns) -> None:
        """Take in the trajectories of another."""
        self.heads += more.heads
        for name, column in self.turns.items():
            column += more.turns[name]

    def where(self, wanted: Callable[[Head], bool]) -> Columns:
        """Those of its trajectories; itself if it is all."""
        chosen = [wanted(head) for head in self.heads]
        if all(chosen):
            return self
        return Columns.of(one for one, take in zip(self.records(), chosen, strict=True) if take)

    def records(self) -> Iterator[Trajectory]:
        """The trajectories, made anew; their `meta` is shared."""
        turns = zip(*(self.turns[name] for name in TURN_FIELDS), strict=True)
        for head in self.heads:
            steps = tuple(Turn(*next(turns)) for _ in range(head.turns))
            yield Trajectory(
                head.source, head.workload, head.prompt_id, head.trial, head.prompt_tokens, steps, head.reward, head.model, head.meta
            )

    def numbers(self, name: str) -> Floats:
        """A column of numbers, nan where a turn does not say."""
        return np.array(self.turns[name], dtype=np.float64)

    @property
    def counts(self) -> NDArray[np.int64]:
        """Turns of each trajectory."""
        return np.array([head.turns for head in self.heads], dtype=np.int64)

    def per_trajectory(self, values: Floats) -> Floats:
        """The sum over each trajectory's turns; nan counts 0."""
        owners = np.repeat(np.arange(len(self.heads)), self.counts)
        return np.bincount(owners, weights=np.nan_to_num(values), minlength=len(self.heads)).astype(np.float64)


def as_columns(trajectories: Columns | Sequence[Trajectory]) -> Columns:
    """Columns as they are, records as columns."""
    return trajectories if isinstance(trajectories, Columns) else Columns.of(trajectories)
