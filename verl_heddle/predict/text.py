"""What the words of a prompt say about the length of the answer, learnt as the run goes.

Law: words and pairs of neighbouring words are hashed (crc32: the same in every process) into `BUCKETS` signed buckets, scaled to length
1; the deviation of log tokens from the pool is a linear function of them, learnt by normalised least mean squares with step `RATE`. The
prediction is one number: the trees get that instead of thousands of columns, and since it is learnt from ended trajectories only, the
number a trajectory carries was never fitted to its own length. Source: the hashing trick (Weinberger et al. 2009). Cost: O(words), once
per visit of a prompt; memory `BUCKETS` floats.
"""

from __future__ import annotations

import re
from itertools import pairwise
from typing import NamedTuple
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from verl_heddle.predict.quantities import Floats

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
