"""The first placement of a whole batch that is known ahead: the best of three ways by the expected makespan of the fleet.

Law: candidates are an even split (a draw of what stock's rule makes of a batch), longest-first list scheduling (each, by predicted length,
to the replica that is then soonest empty), and `robust.plan` (contiguous groups, cuts at equal expected drain). Every replica first reads
the prompts of its trajectories, a prompt that siblings share once. The expected makespan (`outlook`) decides; a later candidate has to be
better than an earlier one by `CLEARLY`, since the earlier is the safer: the plan wins where isolating long ones pays, the list where
prompts are long and shared. Where the even split does, the answer is none: stock's rule itself places, choice for choice, so that a
planner who knows nothing is no other draw of luck.
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
    """Who shares a prompt."""


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
    """A draw of stock's rule, least in flight with random ties. Dealt by turns, whole prompts would share a replica where a batch comes
    sample by sample, which is dearer than what stock does."""
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
