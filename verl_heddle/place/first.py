"""Places a whole announced batch: picks the best of three placements by the expected makespan of the fleet.

Law: candidates are an even split (one draw of stock's rule), longest-first list scheduling (each trajectory, by predicted length, to the
replica that then drains first), and `robust.plan` (contiguous groups, cut at equal expected drain). Every replica first prefills the
prompts of its trajectories; siblings share one prefill. The expected makespan (`outlook`) decides. A later candidate must beat an earlier
one by `CLEARLY`, since the earlier is safer: the plan wins if isolating long trajectories pays, the list if prompts are long and shared.
If the even split wins, the answer is None and stock's rule places, choice for choice, so that an uninformed planner does not change the
outcome by luck.
Source: Graham's rule (1969) with batching taken into account; `robust`. Cost: O(n * replicas * len(GRID)) for the list, so beyond `LISTED`
trajectories it is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf
from random import Random
from typing import NamedTuple

import numpy as np

from verl_heddle.place.books import Books
from verl_heddle.place.cost import Floats
from verl_heddle.place.outlook import GRID
from verl_heddle.place.robust import plan

CLEARLY = 0.97
"""Forecasts are within a tenth of the simulation, the ratio of two of them within a few percent."""

LISTED = 2048
"""Half a second on 64 replicas."""


class Batch(NamedTuple):
    """n trajectories that are about to start."""

    medians: Floats
    """Predicted tokens, [n]."""
    rows: Floats
    """`outlook.curves` of them, [n, 2, len(GRID)]."""
    reading: Floats
    """Seconds to prefill the prompt, [n, replicas]."""
    groups: Sequence[str]
    """Prompt id; equal for trajectories that share a prompt."""


def place_batch(books: Books, batch: Batch) -> list[int] | None:
    """Number of the replica (in `books`, which are empty) for each trajectory; None: nothing is clearly better than stock's rule."""
    count, replicas = len(batch.groups), len(books.names)
    makers: list[Callable[[], list[int]]] = []
    if count <= LISTED or books.tempos() is None:
        makers.append(lambda: _listed(books, batch))
    if books.tempos() is not None:
        makers.append(lambda: _planned(books, batch))
    alike = len({one.tp for one in books.fleet.values()}) == 1
    best: list[int] | None = None
    forecast = _forecast(books, batch, _even(count, replicas)) if alike else inf
    for make in makers:
        where = make()
        seconds = _forecast(books, batch, where)
        if seconds <= CLEARLY * forecast:
            best, forecast = where, seconds
    return best


def _even(count: int, replicas: int) -> list[int]:
    """One draw of stock's rule, least in flight with random ties. Round robin would put whole prompts on one replica if a batch arrives
    sample by sample, which costs more than stock's rule."""
    rng, where = Random(0), list[int]()
    while len(where) < count:
        where += rng.sample(range(replicas), replicas)
    return where[:count]


def _listed(books: Books, batch: Batch) -> list[int]:
    replicas = len(books.names)
    sums, spent = np.zeros((replicas, 2, len(GRID))), np.zeros(replicas)
    cached = {group: np.zeros(replicas, dtype=bool) for group in batch.groups}
    where = [0] * len(batch.groups)
    for number in np.argsort(-batch.medians, kind="stable").tolist():
        known = cached[batch.groups[number]]
        reading = np.where(known, 0.0, batch.reading[number])
        chosen = where[number] = int((books.drains_of(sums + batch.rows[number]) + spent + reading).argmin())
        sums[chosen] += batch.rows[number]
        spent[chosen] += reading[chosen]
        known[chosen] = True
    return where


def _planned(books: Books, batch: Batch) -> list[int]:
    tempos = books.tempos()
    assert tempos is not None
    found = plan(batch.medians, batch.rows, tempos, layout=[books.fleet[name].tp for name in books.names])
    where = [0] * len(batch.groups)
    for replica, group in enumerate(found.groups):
        for number in group:
            where[number] = replica
    return where


def _forecast(books: Books, batch: Batch, where: Sequence[int]) -> float:
    sums, spent = np.zeros((len(books.names), 2, len(GRID))), np.zeros(len(books.names))
    np.add.at(sums, list(where), batch.rows)
    readers = {(batch.groups[number], replica): number for number, replica in enumerate(where)}
    for (_, replica), number in readers.items():
        spent[replica] += batch.reading[number, replica]
    return books.makespan_of(sums, spent)
