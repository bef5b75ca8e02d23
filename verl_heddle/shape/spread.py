"""How long a prompt's samples are and how far apart, learnt from all that was seen of them: what the budget is cut by.

Law. One visit of a prompt is all samples started for it: those that ended, and as lower bounds those that were stopped, cut or lost
(`censored.fit`). Counting only the kept ones, as the authors' code does, would teach after each step that the prompt is shorter and
narrower than it is, and so take its spare samples away. Kept per prompt, as exponential averages with weight `NEWEST` of the last visit
(DARTS: 0.3): the mean as a deviation from the pool's of that day, so that it survives the policy's drift, and the variance. Pool: running
mean, variance within prompts, variance between prompts. A prompt never seen has the pool's mean, doubted by the variance between; a known
one is doubted by what its visits leave open.

Invariants: variances stay above `MIN_VARIANCE`; the order of prompts in a step does not matter but through the pool's average; at most
`max_prompts` are kept, the least recently visited go first. Source: DARTS section 4 for the average; the rest is own.
Cost: one fit per visit.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from math import isfinite, sqrt
from typing import Any, NamedTuple

from verl_heddle.shape.censored import Law, Prior, fit

NEWEST = 0.3
"""Weight of a prompt's last visit, as in the authors' code."""

POOL_NEWEST = 1.0 / 256
"""Weight of a visit in the pool: it forgets over one or two steps of a usual batch, and so follows the policy."""

PRIOR = Prior(mean=6.9, variance=0.25, mean_weight=0.25, variance_weight=4.0)
"""Before there is data: 1,000 tokens, and a spread within prompts of 0.5, which is between the open traces' 0.3 and 0.9. Four samples
outweigh the variance, one the mean."""

PRIOR_BETWEEN = 0.5
"""Variance between prompts before there is data: 70 % of the whole, as in the open traces."""

MIN_VARIANCE = 1e-3
"""A spread of 3 %: nothing is known better, and nothing is divided by zero."""

MAX_PROMPTS = 200_000
"""About 30 MB; larger data sets are seen once, so that a history would never be asked for."""


class Record(NamedTuple):
    """A prompt's past: deviation of its mean from the pool's, variance of its logs, samples behind both (as averaged)."""

    deviation: float
    variance: float
    samples: float


class Spreads:
    """Statistics of all prompts; see the module."""

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
        """A visit is over: (tokens, censored) of every sample that was started. Samples that never generated say nothing."""
        seen = [(tokens, censored) for tokens, censored in samples if tokens > 0]
        if not seen:
            return
        weight = self._within / self._between if self._visits else PRIOR.mean_weight  # samples that the belief in its mean is worth
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
        """What the prompt's next samples will be like."""
        record = self._records.get(prompt)
        if record is None:
            return Law(self._mean, sqrt(self._within), sqrt(self._between))
        left = 1.0 / (record.samples / record.variance + 1.0 / self._between)
        return Law(self._mean + record.deviation, sqrt(record.variance), sqrt(left))

    @property
    def visits(self) -> float:
        """Visits seen so far, as far as the pool remembers them."""
        return self._visits

    def state(self) -> dict[str, Any]:
        """JSON values from which `restore` makes the same statistics."""
        rows = [[name, *record] for name, record in self._records.items()]
        return {"visits": self._visits, "pool": [self._mean, self._within, self._between], "prompts": rows}

    @classmethod
    def restore(cls, state: dict[str, Any], max_prompts: int = MAX_PROMPTS) -> Spreads:
        """Counterpart of `state`.

        Raises:
            ValueError: not such a state.
        """
        made = cls(max_prompts)
        try:
            made._visits = float(state["visits"])
            made._mean, made._within, made._between = _numbers(state["pool"], 3)
            for name, *numbers in state["prompts"][-max_prompts:]:
                deviation, variance, samples = _numbers(numbers, 3)
                made._records[str(name)] = Record(deviation, max(variance, MIN_VARIANCE), max(samples, 0.0))
        except (KeyError, TypeError) as error:
            raise ValueError(f"not the state of length statistics ({type(error).__name__}: {error})") from error
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
        between = max(step * step - self._within / count, 0.0)  # less what the samples' own spread explains
        slow = 1 / (self._visits + PRIOR.variance_weight)
        self._between = max(self._between + slow * (between - self._between), MIN_VARIANCE)


def _numbers(values: Sequence[Any], count: int) -> list[float]:
    numbers = [float(value) for value in values]
    if len(numbers) != count or not all(map(isfinite, numbers)):
        raise ValueError(f"expected {count} finite numbers, got {values}")
    return numbers
