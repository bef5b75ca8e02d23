"""Sample budgets: how many samples each prompt of a step gets, and the length statistics (`Spreads`) that the budget is based on.

Allocation. Per prompt p and m samples, c_p(m) is a cost that falls with m. Allocating a budget minimises sum_p c_p(m_p) with n <= m_p <=
bound: samples go one at a time to the prompt whose cost falls most. For convex c_p this greedy is optimal (an exchange argument; the test
compares with brute force), and every prefix of its path is optimal for its own total, so one path serves all budgets. Two costs:

    tail     c_p(m) = E[(X_p - t)+], X_p the tokens at which p has its n-th of m samples, t those at which one group is expected to be live
             with the largest budget. For any t, t + sum_p E[(X_p - t)+] >= E[max_p X_p]: the minimised sum bounds the step's wait.
    spread   c_p(m) = v_p / m, v_p the standard deviation of the prompt's tokens: DARTS section 4, algorithm 2 (without its
             normalisation, which shifts all v_p so that the least is near 0 and so depends on which prompts share a step)

tail is convex only where groups mostly are over, so it is replaced by its greatest convex minorant, which equals it wherever greedy stops.

Total. Along the path with M samples and R replicas, let B_M(x) be the expected live samples at x tokens and P_M(x) the chance that any
group is live:

    F(M) = integral of P_M * tau(B_M / (R P_M))                    forecast of the step, the staircase of `place.outlook`
    E(M) = integral of (P_n - P_M) * tau(B_n / (R P_n))            seconds by which groups end sooner, at stock's load
    T(M) = F(M) - F(n) + E(M)                                      seconds that the extra load costs
    U(M) = E(M) - lambda * T(M)

E and T are both seconds of the same staircase, so lambda has a meaning: at 1, U is the forecast saving F(n) - F(M); above 1, work costs
more than its time (shared GPUs, energy, distrusted forecasts). The budget is the smallest M with `ENOUGH` of the largest U; if no U exceeds
`LEAST_GAIN` of the step, nothing is added. So redundancy uses only capacity that the tail leaves idle: a full fleet makes T large at once.
DARTS gives U = E - lambda T with T the staircase, but neither E nor lambda; this E is what its variance stands for.

Statistics. A visit of a prompt consists of all samples started for it: those that ended, and, as lower bounds, those that were stopped, cut
or lost (`censored.fit`). Counting only the kept ones, as the authors' code does, would underestimate the prompt's length and spread after
every step and so take its spare samples away. Stored per prompt, as exponential averages with weight `NEWEST` on the last visit (DARTS:
0.3): the mean as a deviation from the pool's mean at the time, so that it survives the policy's drift, and the variance. Stored for the
pool: running mean, variance within prompts, variance between prompts. An unseen prompt gets the pool's mean with the between-variance as
its uncertainty; a known one gets the uncertainty that its visits leave.

Invariants: variances stay above `MIN_VARIANCE`; the order of prompts in a step matters only through the pool's average; at most
`max_prompts` are kept, and the least recently visited are evicted first.
Source: DARTS section 4 for allocation and average; the rest is ours.
Cost: allocation O(prompts * bound * log); statistics one fit per visit.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from enum import StrEnum
from heapq import heapify, heapreplace
from math import ceil, expm1, isfinite, sqrt
from typing import Any, NamedTuple

import numpy as np

from verl_heddle.place.cost import Floats, Ints
from verl_heddle.place.outlook import SURE, WEIGHTS, drain_s
from verl_heddle.place.pace import Tempo
from verl_heddle.shape.censored import Law, Prior, fit
from verl_heddle.shape.outlook import deadline, tails

NEWEST = 0.3
"""Weight of a prompt's latest visit, as in the authors' code."""

POOL_NEWEST = 1.0 / 256
"""Weight of a visit in the pool. The pool forgets within one or two steps of a usual batch, so it follows the policy."""

PRIOR = Prior(mean=6.9, variance=0.25, mean_weight=0.25, variance_weight=4.0)
"""Before any data: 1,000 tokens, and a spread within prompts of 0.5, between the open traces' 0.3 and 0.9. Four samples outweigh the
variance, one the mean."""

PRIOR_BETWEEN = 0.5
"""Variance between prompts before any data: 70 % of the total, as in the open traces."""

MIN_VARIANCE = 1e-3
"""A spread of 3 %: lengths are never known more precisely, and no division by zero occurs."""

MAX_PROMPTS = 200_000
"""About 30 MB. Larger data sets are seen only once, so their history would never be used."""


class Record(NamedTuple):
    """A prompt's history: deviation of its mean from the pool's, variance of its logs, averaged number of samples behind both."""

    deviation: float
    variance: float
    samples: float


class Spreads:
    """Length statistics of all prompts (see the module)."""

    def __init__(self, max_prompts: int = MAX_PROMPTS) -> None:
        self._records: OrderedDict[str, Record] = OrderedDict()
        self._max_prompts = max_prompts
        self._visits = 0.0
        self._mean, self._within, self._between = PRIOR.mean, PRIOR.variance, PRIOR_BETWEEN

    def __len__(self) -> int:
        return len(self._records)

    def __contains__(self, prompt: str) -> bool:
        """Whether the prompt was visited before."""
        return prompt in self._records

    def observe(self, prompt: str, samples: Iterable[tuple[int, bool]]) -> None:
        """Add a visit: (tokens, censored) of every sample started. Samples without tokens are ignored."""
        seen = [(tokens, censored) for tokens, censored in samples if tokens > 0]
        if not seen:
            return
        weight = self._within / self._between if self._visits else PRIOR.mean_weight  # weight of the prior mean, in samples
        mean, variance = fit(seen, Prior(self.law(prompt).mean, self._within, weight, PRIOR.variance_weight))
        self._pool(mean, variance, len(seen))
        before = self._records.pop(prompt, None)
        now = Record(mean - self._mean, max(variance, MIN_VARIANCE), float(len(seen)))
        if before is not None:
            now = Record(*(NEWEST * new + (1 - NEWEST) * old for new, old in zip(now, before, strict=True)))
        self._records[prompt] = now
        if len(self._records) > self._max_prompts:
            self._records.popitem(last=False)

    def law(self, prompt: str) -> Law:
        """Predicted law of the prompt's next samples."""
        record = self._records.get(prompt)
        if record is None:
            return Law(self._mean, sqrt(self._within), sqrt(self._between))
        left = 1.0 / (record.samples / record.variance + 1.0 / self._between)
        return Law(self._mean + record.deviation, sqrt(record.variance), sqrt(left))

    @property
    def visits(self) -> float:
        """Visits seen so far, capped at the pool's memory."""
        return self._visits

    def state(self) -> dict[str, Any]:
        """JSON values from which `restore` rebuilds the statistics."""
        rows = [[name, *record] for name, record in self._records.items()]
        return {"visits": self._visits, "pool": [self._mean, self._within, self._between], "prompts": rows}

    @classmethod
    def restore(cls, state: dict[str, Any], max_prompts: int = MAX_PROMPTS) -> Spreads:
        """Rebuild statistics from a `state`; at most the last `max_prompts` prompts are kept.

        Raises:
            ValueError: malformed state.
        """
        made = cls(max_prompts)
        try:
            made._visits = float(state["visits"])
            made._mean, made._within, made._between = _numbers(state["pool"], 3)
            for name, *numbers in state["prompts"][-max_prompts:]:
                deviation, variance, samples = _numbers(numbers, 3)
                made._records[str(name)] = Record(deviation, max(variance, MIN_VARIANCE), max(samples, 0.0))
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a length statistics state ({type(error).__name__}: {error})") from error
        made._within, made._between = max(made._within, MIN_VARIANCE), max(made._between, MIN_VARIANCE)
        return made

    def _pool(self, mean: float, variance: float, count: int) -> None:
        self._visits = min(self._visits + 1, 1 / POOL_NEWEST)
        if self._visits == 1:
            self._mean, self._within = mean, max(0.5 * (variance + PRIOR.variance), MIN_VARIANCE)
            return
        share, step = 1 / self._visits, mean - self._mean
        self._mean += share * step
        self._within = max(self._within + share * (variance - self._within), MIN_VARIANCE)
        between = max(step * step - self._within / count, 0.0)  # minus the part explained by the samples' own spread
        slow = 1 / (self._visits + PRIOR.variance_weight)
        self._between = max(self._between + slow * (between - self._between), MIN_VARIANCE)


def _numbers(values: Sequence[Any], count: int) -> list[float]:
    numbers = [float(value) for value in values]
    if len(numbers) != count or not all(map(isfinite, numbers)):
        raise ValueError(f"expected {count} finite numbers, got {values}")
    return numbers


LOOKS = 24
"""Budgets evaluated, from none to the bound, denser among small ones, which go to the prompts that matter."""

ENOUGH = 0.9
"""Share of the largest U; the smallest budget that reaches it is chosen. U is flat around its maximum: beyond the knee, one percent of
forecast costs a tenth more tokens and stronger selection."""

LEAST_GAIN = 0.05
"""Share of the step that U must reach. Forecasts are accurate to a tenth, and every spare sample costs energy."""


class Objective(StrEnum):
    """Cost that the allocation minimises (see the module)."""

    TAIL = "tail"
    SPREAD = "spread"


class Fleet(NamedTuple):
    """The replicas: seconds per token and count, by kind."""

    tempos: Sequence[Tempo]
    counts: Sequence[int]


class Budget(NamedTuple):
    """`spare[p]`: samples beyond n of prompt p; `saved_s`, `cost_s`: E and T; `step_s`: F of the budget; `stock_s`: F without spares."""

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
    """Greatest convex minorant of the sequence `values`: its lower hull (Andrew's monotone chain)."""
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
    """Prompts in the order in which greedy gives them spare samples, up to the bound of every prompt; ties go to the lowest number.

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
    """Spare samples per prompt, [prompts], that minimise the summed cost; they total `spare`, capped by the table's levels."""
    found: Ints = np.bincount(path(table)[: max(0, spare)], minlength=len(table)).astype(np.intp)
    return found


def forecast_s(rows: Floats, fleet: Fleet) -> float:
    """F: expected seconds of a step, split evenly over the replicas. `rows`: summed over prompts, [2, len(GRID)]."""
    replicas = sum(fleet.counts)
    share = np.stack([rows[0] / replicas, rows[1]])
    return float(np.average([float(drain_s(share, tempo)) for tempo in fleet.tempos], weights=fleet.counts))


def total(table: Floats, rows: Floats, fleet: Fleet, price: float = 1.0, most: int | None = None) -> Budget:
    """The budget and its allocation. `rows`: `outlook.live` with patience 0; `price`: lambda; `most`: bound on all spare samples.

    Raises:
        ValueError: lambda is negative, or the fleet is empty.
    """
    if not price >= 0 or not fleet.tempos or len(fleet.tempos) != len(fleet.counts):
        raise ValueError(f"need a non-negative price and a non-empty fleet, got {price} and {len(fleet.tempos)} kinds of replicas")
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
    """E: seconds by which groups end sooner, at stock's load."""
    before, after = (-np.expm1(np.minimum(rows[1], 0.0)) for rows in (plain, chosen))
    together = plain[0] / sum(fleet.counts) / np.maximum(before, SURE)
    tau = np.average([tempo.at(together) for tempo in fleet.tempos], axis=0, weights=fleet.counts)
    return float(((before - after) * tau) @ WEIGHTS)
