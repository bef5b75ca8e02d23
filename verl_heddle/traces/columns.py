"""Store many recorded trajectories as columns: the format in which workers send them and step metrics are computed.

Pickling, unpickling or walking a list of 200,000 `Turn`s takes seconds. The same values as one list per field take tenths of that and
convert to arrays without a loop. `records` converts back where records are needed.
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
    """A trajectory without its turns; `turns` is the number of turns."""

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
    """Trajectories as columns. `turns` maps each field of `Turn` to its values for all turns, concatenated in the order of `heads`."""

    heads: list[Head] = field(default_factory=list)
    turns: dict[str, list[Any]] = field(default_factory=lambda: {name: [] for name in TURN_FIELDS})

    @classmethod
    def of(cls, trajectories: Iterable[Trajectory]) -> Columns:
        """Build columns from records; `meta` is shared, not copied."""
        heads: list[Head] = []
        turns: list[Turn] = []
        for item in trajectories:
            steps = item.steps
            heads.append(
                Head(
                    item.source,
                    item.workload,
                    item.prompt_id,
                    item.trial,
                    item.prompt_tokens,
                    item.reward,
                    item.model,
                    item.meta,
                    len(steps),
                )
            )
            turns += steps
        if not turns:
            return cls(heads)
        return cls(heads, {name: list(column) for name, column in zip(TURN_FIELDS, zip(*map(_values_of, turns), strict=True), strict=True)})

    def __len__(self) -> int:
        return len(self.heads)

    @property
    def metas(self) -> list[dict[str, Any]]:
        """The `meta` of every trajectory, not copied: changes apply to these columns."""
        return [head.meta for head in self.heads]

    def extend(self, more: Columns) -> None:
        """Append the trajectories of `more`."""
        self.heads += more.heads
        for name, column in self.turns.items():
            column += more.turns[name]

    def where(self, wanted: Callable[[Head], bool]) -> Columns:
        """The trajectories for which `wanted` holds; `self` if it holds for all."""
        chosen = [wanted(head) for head in self.heads]
        if all(chosen):
            return self
        return Columns.of(item for item, take in zip(self.records(), chosen, strict=True) if take)

    def records(self) -> Iterator[Trajectory]:
        """New `Trajectory` records; `meta` is shared, not copied."""
        turns = zip(*(self.turns[name] for name in TURN_FIELDS), strict=True)
        for head in self.heads:
            steps = tuple(Turn(*next(turns)) for _ in range(head.turns))
            yield Trajectory(
                head.source, head.workload, head.prompt_id, head.trial, head.prompt_tokens, steps, head.reward, head.model, head.meta
            )

    def numbers(self, name: str) -> Floats:
        """A numeric column; NaN where a turn has no value."""
        return np.array(self.turns[name], dtype=np.float64)

    @property
    def counts(self) -> NDArray[np.int64]:
        """Number of turns of each trajectory."""
        return np.array([head.turns for head in self.heads], dtype=np.int64)

    def per_trajectory(self, values: Floats) -> Floats:
        """Sum over each trajectory's turns; NaN counts as 0."""
        owners = np.repeat(np.arange(len(self.heads)), self.counts)
        return np.bincount(owners, weights=np.nan_to_num(values), minlength=len(self.heads)).astype(np.float64)


def as_columns(trajectories: Columns | Sequence[Trajectory]) -> Columns:
    """Convert records to columns; columns are returned unchanged."""
    return trajectories if isinstance(trajectories, Columns) else Columns.of(trajectories)
