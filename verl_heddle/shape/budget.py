"""How many samples each prompt of a step gets.

Law. Per prompt p and m samples, c_p(m) is a cost that falls with m. The allocation of a budget minimises sum_p c_p(m_p) with n <= m_p <=
bound: give one sample after the other to the prompt whose cost it lowers most. For convex c_p this greedy is optimal (an exchange
argument; the test compares with brute force), and every prefix of its path is optimal for its own total, so one path serves all budgets.
Two costs:

    tail     c_p(m) = E[(X_p - t)+], X_p the tokens with which p has its n-th sample of m, t where one group is expected to go on with the
             largest budget. For any t, t + sum_p E[(X_p - t)+] >= E[max_p X_p]: what the step waits for is bounded by what is minimised.
    spread   c_p(m) = v_p / m, v_p the standard deviation of the prompt's tokens: DARTS section 4, algorithm 2 (without its
             normalisation, which moves all v_p so that the least is near 0 and so depends on which prompts share a step)

tail is convex only where groups mostly are over, so it is replaced by its greatest convex minorant, which it equals wherever greedy stops.

Total. Along the path with M samples, R replicas, B_M(x) the samples expected to live at x tokens, P_M(x) the chance that any group lives:

    F(M) = integral of P_M * tau(B_M / (R P_M))                    forecast of the step, the staircase of `place.outlook`
    E(M) = integral of (P_n - P_M) * tau(B_n / (R P_n))            seconds by which groups end sooner, at stock's load
    T(M) = F(M) - F(n) + E(M)                                      seconds that the extra load costs
    U(M) = E(M) - lambda * T(M)

E and T are both in seconds of the same staircase, so lambda has a meaning: at 1, U is the forecast saving F(n) - F(M); above, work is
dearer than its time (shared GPUs, energy, forecasts not trusted). The budget is the least M with `ENOUGH` of the largest U; where none is
above `LEAST_GAIN` of the step, nothing is added. So redundancy is bought only with capacity that the tail leaves idle: a full fleet makes
T large at once. DARTS gives U = E - lambda T with T the staircase, and neither E nor lambda; this E is what its variance stands for.
Cost: O(prompts * bound * log).
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from heapq import heapify, heapreplace
from math import ceil, expm1
from typing import NamedTuple

import numpy as np

from verl_heddle.place.cost import Floats, Ints
from verl_heddle.place.outlook import SURE, WEIGHTS, drain_s
from verl_heddle.place.pace import Tempo
from verl_heddle.shape.censored import Law
from verl_heddle.shape.outlook import deadline, tails

LOOKS = 24
"""Budgets looked at, from none to the bound, closer at the small ones, which go to the prompts that matter."""

ENOUGH = 0.9
"""Of the largest U: the least budget that reaches it is taken. U is flat around its maximum, and what is on the far side of the knee buys
a forecast percent with a tenth more tokens and a stronger selection."""

LEAST_GAIN = 0.05
"""Of the step. Forecasts are good to a tenth, and every spare sample costs energy."""


class Objective(StrEnum):
    """What the allocation makes small; see the module."""

    TAIL = "tail"
    SPREAD = "spread"


class Fleet(NamedTuple):
    """Who decodes: seconds per token of a replica, and how many there are, by kind."""

    tempos: Sequence[Tempo]
    counts: Sequence[int]


class Budget(NamedTuple):
    """`spare[p]`: samples beyond n; `saved_s`, `cost_s`: E and T; `step_s`: F of the budget; `stock_s`: F without spares."""

    spare: Ints
    saved_s: float
    cost_s: float
    step_s: float
    stock_s: float


def costs(laws: Sequence[Law], rows: Floats, size: int, objective: Objective) -> Floats:
    """c_p(m), m = n ... bound, convex: [prompts, levels]. `rows`: `outlook.live` with patience 0."""
    if objective is Objective.SPREAD:
        samples = size + np.arange(rows.shape[1])
        spread = np.array([np.exp(law.mean + law.spread**2 / 2) * expm1(min(law.spread**2, 50.0)) ** 0.5 for law in laws])
        made: Floats = spread[:, None] / samples
        return made
    over = rows[:, :, 1]
    return np.array([convex(row) for row in tails(over, deadline(over[:, -1]))])


def convex(values: Floats) -> Floats:
    """Greatest convex function not above `values`, a sequence: its lower hull (Andrew's monotone chain)."""
    hull: list[int] = []
    for at, value in enumerate(values):
        while len(hull) > 1 and (values[hull[-1]] - values[hull[-2]]) * (at - hull[-2]) >= (value - values[hull[-2]]) * (
            hull[-1] - hull[-2]
        ):
            hull.pop()
        hull.append(at)
    made: Floats = np.interp(np.arange(len(values)), hull, np.asarray(values)[hull])
    return made


def path(table: Floats) -> list[int]:
    """Prompts in the order in which greedy gives them their spare samples, until all have all; ties to the lowest number.

    Args:
        table: convex costs, [prompts, levels].
    """
    gains = (table[:, :-1] - table[:, 1:]).tolist()
    if not gains or not gains[0]:
        return []
    heap = [(-row[0], prompt, 0) for prompt, row in enumerate(gains)]
    heapify(heap)
    order = []
    last = len(gains[0]) - 1
    for _ in range(len(gains) * len(gains[0])):
        _, prompt, level = heap[0]
        order.append(prompt)
        heapreplace(heap, (-gains[prompt][level + 1], prompt, level + 1) if level < last else (float("inf"), prompt, last))
    return order


def allocate(table: Floats, spare: int) -> Ints:
    """Spare samples per prompt that minimise the summed cost, [prompts]; `spare` in all, at most what the table has levels for."""
    found: Ints = np.bincount(path(table)[: max(0, spare)], minlength=len(table)).astype(np.intp)
    return found


def forecast_s(rows: Floats, fleet: Fleet) -> float:
    """F: expected seconds of a step whose groups have these rows, summed over prompts, [2, len(GRID)]; even split over the replicas."""
    replicas = sum(fleet.counts)
    share = np.stack([rows[0] / replicas, rows[1]])
    return float(np.average([float(drain_s(share, tempo)) for tempo in fleet.tempos], weights=fleet.counts))


def total(table: Floats, rows: Floats, fleet: Fleet, price: float = 1.0, most: int | None = None) -> Budget:
    """The budget and its allocation. `rows`: `outlook.live` with patience 0; `price`: lambda; `most`: spare samples in all, None: no bound.

    Raises:
        ValueError: lambda is below 0, or the fleet is empty.
    """
    if not price >= 0 or not fleet.tempos or len(fleet.tempos) != len(fleet.counts):
        raise ValueError(f"need a price from 0 and a fleet, got {price} and {len(fleet.tempos)} kinds of replicas")
    prompts = len(rows)
    order = path(table)[:most]
    plain = rows[:, 0].sum(axis=0)
    stock_s = forecast_s(plain, fleet)
    found = [(0.0, Budget(np.zeros(prompts, dtype=np.intp), 0.0, 0.0, stock_s, stock_s))]
    for look in range(1, LOOKS + 1):
        spare = np.bincount(order[: ceil((look / LOOKS) ** 2 * len(order))], minlength=prompts).astype(np.intp)
        chosen = rows[np.arange(prompts), spare].sum(axis=0)
        step_s = forecast_s(chosen, fleet)
        saved_s = _sooner_s(plain, chosen, fleet)
        cost_s = step_s - stock_s + saved_s
        found.append((saved_s - price * cost_s, Budget(spare, saved_s, cost_s, step_s, stock_s)))
    best = max(value for value, _ in found)
    if best < LEAST_GAIN * stock_s:
        return found[0][1]
    return next(budget for value, budget in found if value >= ENOUGH * best)


def _sooner_s(plain: Floats, chosen: Floats, fleet: Fleet) -> float:
    """E."""
    before, after = (-np.expm1(np.minimum(rows[1], 0.0)) for rows in (plain, chosen))
    together = plain[0] / sum(fleet.counts) / np.maximum(before, SURE)
    tau = np.average([tempo.at(together) for tempo in fleet.tempos], axis=0, weights=fleet.counts)
    return float(((before - after) * tau) @ WEIGHTS)
