"""Empirical Bayes: how long a trajectory is, from pool, prompt history and siblings, before any tree is asked.

Law, per quantity, in logs. The prompt's deviation from the pool is the weighted mean of
- the pool (0) or what the prompt's text suggests, weight `Pool.ratio` = within / between variance,
- earlier visits, weight = their samples,
- finished siblings, weight 1 each,
- running siblings: one that generated g so far is a censored sample. It enters as the median of what exceeds g under the estimate without
  it, with weight F(g), the probability to have ended before g: nothing while everybody is young, nearly 1 when it should be over. Without
  them the first to finish, who are the short ones, would make the group look short.
The size itself is log-logistic around that estimate, variance = within * (1 + 1 / total weight), and what remains is the distribution
given that it exceeds what was generated: log-logistic because its conditional quantiles have a closed form, and its tail is that of
real lengths (a normal's is too light).

Source: Robbins / Efron-Morris shrinkage; the censored term is one step of expectation maximisation. Cost: O(1) per trajectory with the
sums that `live` keeps; vectorised. Everything is (QUANTITIES, n).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, log, log1p, sqrt
from typing import NamedTuple

import numpy as np

from verl_heddle.predict.pool import Pool
from verl_heddle.predict.quantities import FLOOR, LOGISTIC, ODDS_UPPER, TOKENS, UPPER, Floats

FAR = 40.0
"""Scales beyond which the logistic tail is an exponential to the last digit; keeps exp inside floats."""

_FLOOR = FLOOR[:, None]
FLOORS = tuple(FLOOR.tolist())


class Evidence(NamedTuple):
    """What is known about a prompt; arrays of shape (QUANTITIES, n) or (n,). Sums are of logs."""

    text: Floats
    """(n,) deviation of log tokens that the text suggests; used for tokens only."""
    history_count: Floats
    history: Floats
    finished_count: Floats
    finished_sum: Floats
    running_count: Floats
    """Running siblings, the trajectory itself not counted."""
    running_sum: Floats


class Belief(NamedTuple):
    """Log-logistic sizes: log median and scale, (QUANTITIES, n); `weight` (QUANTITIES, n): samples behind it, the pool not counted."""

    middle: Floats
    scale: Floats
    weight: Floats


def believe(pool: Pool, evidence: Evidence) -> Belief:
    """Distribution of the whole size of the trajectories, before looking at what they did themselves."""
    mean, ratio, within = pool.mean[:, None], pool.ratio[:, None], pool.within[:, None]
    weight = evidence.history_count + evidence.finished_count + np.zeros((len(FLOOR), 1))
    total = evidence.history_count * evidence.history + evidence.finished_sum - evidence.finished_count * mean
    total[TOKENS] += ratio[TOKENS] * evidence.text
    middle = mean + total / (ratio + weight)
    if evidence.running_count.any():
        scale = _scale(within, ratio + weight)
        usual = evidence.running_sum / np.maximum(evidence.running_count, 1)
        past = np.exp(np.clip((usual - middle) / scale, -FAR, FAR))
        share = evidence.running_count * past / (1 + past)
        total += share * (middle + scale * np.log1p(2 * past) - mean)
        weight = weight + share
        middle = mean + total / (ratio + weight)
    return Belief(middle, _scale(within, ratio + weight), weight)


def remaining(belief: Belief, done: Floats) -> tuple[Floats, Floats]:
    """Log of the median remaining, and log of upper quantile over median, given `done` (QUANTITIES, n) in plain units.

    The second is at least that of a scale of 0.1: nothing is known to 10 %.
    """
    middle, scale, _ = belief
    done = np.maximum(done, 1e-6)
    here = np.log(done)
    past = np.exp(np.clip((here - middle) / scale, -FAR, FAR))
    # (1 + past) / (1 - p) - 1, written so that nothing cancels
    median = middle + scale * np.log1p(2 * past)
    upper = middle + scale * np.log((UPPER + past) / (1 - UPPER))
    left = np.log(np.maximum(np.exp(median) - done, _FLOOR))
    upper = np.log(np.maximum(np.exp(upper) - done, _FLOOR))
    return left, np.maximum(upper - left, 0.1 * ODDS_UPPER)


class One(NamedTuple):
    """`believe` and `remaining` of one trajectory: three logs each, and numbers about the tokens."""

    left: tuple[float, float, float]
    middle: tuple[float, float, float]
    weight: float
    spread: float


def one(
    pool: Pool,
    text: float,
    history: tuple[float, Sequence[float]],
    finished: tuple[float, Sequence[float]],
    running: tuple[float, Sequence[float]],
    done: Sequence[float],
) -> One:
    """The same law for a single trajectory in plain floats: a tenth of the time, as numpy's cost for small arrays is the calls.

    Args:
        history, finished, running: a count and three logs, as in `Evidence`.
        done: three amounts in plain units.
    """
    lefts, middles = [], []
    weight_of_tokens = spread = 0.0
    for quantity, (mean, ratio, within) in enumerate(pool.laws):
        weight = history[0] + finished[0]
        total = history[0] * history[1][quantity] + finished[1][quantity] - finished[0] * mean
        if quantity == TOKENS:
            total += ratio * text
        middle = mean + total / (ratio + weight)
        if running[0]:
            scale = LOGISTIC * sqrt(within * (1 + 1 / (ratio + weight)))
            past = exp(min(FAR, max(-FAR, (running[1][quantity] / running[0] - middle) / scale)))
            share = running[0] * past / (1 + past)
            total += share * (middle + scale * log1p(2 * past) - mean)
            weight += share
            middle = mean + total / (ratio + weight)
        scale = LOGISTIC * sqrt(within * (1 + 1 / (ratio + weight)))
        gone = max(done[quantity], 1e-6)
        past = exp(min(FAR, max(-FAR, (log(gone) - middle) / scale)))
        floor = FLOORS[quantity]
        left = log(max(exp(middle + scale * log1p(2 * past)) - gone, floor))
        if quantity == TOKENS:
            upper = log(max(exp(middle + scale * log((UPPER + past) / (1 - UPPER))) - gone, floor))
            spread, weight_of_tokens = max(upper - left, 0.1 * ODDS_UPPER), weight
        lefts.append(left)
        middles.append(middle)
    return One((lefts[0], lefts[1], lefts[2]), (middles[0], middles[1], middles[2]), weight_of_tokens, spread)


def _scale(within: Floats, weight: Floats) -> Floats:
    scale: Floats = LOGISTIC * np.sqrt(within * (1 + 1 / weight))
    return scale
