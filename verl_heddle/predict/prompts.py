"""What is known of a prompt before its trajectories run: its earlier visits, and the words of its text.

History (`Prompts`): each visit is summarised as its deviation, mean log size less the level of its step (`Pool.step_mean`). Visits are
averaged by their samples; the weight of the past is bounded by `MEMORY` samples, so that the average follows the policy. A visit is closed
when the next one begins, because the level of its step is known only then. Invariants: at most `MAX_PROMPTS` records; the least recently
seen prompts are dropped. Cost: O(1) per trajectory.

Text (`TextModel`): words and pairs of adjacent words are hashed (crc32: the same in every process) into `BUCKETS` signed buckets, scaled to
length 1. The deviation of log tokens from the pool is a linear function of them, learned by normalised least mean squares with step `RATE`.
The trees get this one number instead of thousands of columns. It is learned from ended trajectories only, so a trajectory's number was
never fitted to its own length. Source: the hashing trick (Weinberger et al. 2009). Cost: O(words), once per visit of a prompt; memory
`BUCKETS` floats.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from itertools import pairwise
from typing import NamedTuple
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from verl_heddle.predict.bayes import Pool
from verl_heddle.predict.quantities import QUANTITIES, TOKENS, Floats

MEMORY = 32.0
"""Samples after which the past stops to gain weight: two visits of 16. An older policy's lengths say less than a recent one's."""

MAX_PROMPTS = 200_000
"""About 150 MB of table; larger data sets are seen once, so that a history would never be asked for."""

UNKNOWN = np.zeros(QUANTITIES)


class History(NamedTuple):
    """A prompt as its next visit finds it. `deviation`: logs, against the level of the day; `samples` 0: never seen."""

    samples: float
    deviation: Floats
    spread: float
    """Standard deviation of log tokens inside visits."""
    last: float
    """Deviation of log tokens in the last visit."""


class _Record(NamedTuple):
    samples: float
    deviation: Floats
    square: float
    step: int
    open_count: int
    open_sum: Floats
    open_square: float


NEVER = History(0.0, UNKNOWN, 0.0, 0.0)


class Prompts:
    """Histories by prompt."""

    def __init__(self, max_prompts: int = MAX_PROMPTS) -> None:
        self._records: OrderedDict[str, _Record] = OrderedDict()
        self._max_prompts = max_prompts

    def __len__(self) -> int:
        return len(self._records)

    def look_up(self, prompt: str, pool: Pool) -> History:
        """What earlier visits say."""
        record = self._records.get(prompt)
        if record is None:
            return NEVER
        last = record.open_sum / record.open_count - pool.step_mean(record.step)
        count, deviation, square = _close(record, last)
        return History(count, deviation, float(np.sqrt(square / count)), float(last[TOKENS]))

    def observe(self, prompt: str, step: int, logs: Floats, pool: Pool) -> None:
        """A sample of `prompt`, asked for by training step `step`, ended with sizes exp(logs)."""
        record = self._records.pop(prompt, None)
        if record is None:
            record = _Record(0.0, UNKNOWN, 0.0, step, 0, UNKNOWN, 0.0)
        elif record.step != step:
            last = record.open_sum / record.open_count - pool.step_mean(record.step)
            record = _Record(*_close(record, last), step, 0, UNKNOWN, 0.0)
        square = record.open_square
        if record.open_count:
            delta = float(logs[TOKENS] - record.open_sum[TOKENS] / record.open_count)
            square += delta * delta * record.open_count / (record.open_count + 1)
        self._records[prompt] = record._replace(open_count=record.open_count + 1, open_sum=record.open_sum + logs, open_square=square)
        if len(self._records) > self._max_prompts:
            self._records.popitem(last=False)

    def state(self) -> tuple[list[str], Floats]:
        """Names and one row of numbers each, from which `restore` makes the same histories."""
        rows = [
            [r.samples, *r.deviation, r.square, r.step, r.open_count, *r.open_sum, r.open_square]
            for r in self._records.values()
        ]  # fmt: skip
        return list(self._records), np.array(rows, dtype=np.float64).reshape(-1, 5 + 2 * QUANTITIES)

    @classmethod
    def restore(cls, names: list[str], rows: Floats, max_prompts: int = MAX_PROMPTS) -> Prompts:
        """Counterpart of `state`."""
        prompts = cls(max_prompts)
        for name, row in zip(names, rows, strict=True):
            deviation, total = row[1 : 1 + QUANTITIES], row[4 + QUANTITIES : 4 + 2 * QUANTITIES]
            count, square, step, number = row[0], row[1 + QUANTITIES], row[2 + QUANTITIES], row[3 + QUANTITIES]
            prompts._records[name] = _Record(float(count), deviation, float(square), int(step), int(number), total, float(row[-1]))
        return prompts


def _close(record: _Record, last: Floats) -> tuple[float, Floats, float]:
    """Count, deviation and sum of squares with the open visit, of deviation `last`, added to the visits before."""
    past = min(record.samples, MEMORY)
    count = past + record.open_count
    square = (record.square * past / record.samples if record.samples else 0.0) + record.open_square
    return count, (record.deviation * past + last * record.open_count) / count, square


BUCKETS = 4096
"""Collisions stay rare for the few hundred different words of a prompt, and the table is 32 kB."""

RATE = 0.05
"""Share of an error that one sample corrects: a group of 16 moves its own prompt's estimate by half, noise of one sample by little."""

MAX_CHARS = 4_000
"""Only the beginning of longer prompts is read: bounds the time to about 1 ms."""

_WORD = re.compile(r"[^\W\d_]+|\d+")


class Words(NamedTuple):
    """Hashed prompt: buckets and their weights, of Euclidean length 1; empty when the text is not known."""

    buckets: NDArray[np.int64]
    weights: Floats


NOTHING = Words(np.empty(0, dtype=np.int64), np.empty(0))


def hashed(text: str | None) -> Words:
    """The words of `text` as a sparse vector."""
    words = ["#" if word.isdigit() else word for word in _WORD.findall(text[:MAX_CHARS].lower())] if text else []
    if not words:
        return NOTHING
    codes = np.array([crc32(item.encode()) for item in {*words, *map(" ".join, pairwise(words))}], dtype=np.int64)
    buckets, where = np.unique(codes % BUCKETS, return_inverse=True)
    weights = np.bincount(where, np.where(codes >> 31, 1.0, -1.0))
    return Words(buckets, weights / max(1.0, float(np.linalg.norm(weights))))


class TextModel:
    """Deviation of log tokens as a linear function of hashed words."""

    def __init__(self, weights: Floats | None = None) -> None:
        self.weights: Floats = np.zeros(BUCKETS) if weights is None else weights

    def deviation(self, words: Words) -> float:
        """What the text suggests; 0 for no text or before any was seen."""
        return float(self.weights[words.buckets] @ words.weights)

    def observe(self, words: Words, deviation: float) -> None:
        """A sample of a prompt with these words deviated so from the pool."""
        self.weights[words.buckets] += RATE * (deviation - self.deviation(words)) * words.weights
