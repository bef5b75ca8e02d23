"""Empirical-Bayes estimate of a trajectory's length, from pool, prompt history and siblings. The trees start from it.

Law, per quantity, in logs. The prompt's deviation from the pool is the weighted mean of
- the pool (0), or what the prompt's text suggests; weight `Pool.ratio` = within / between variance,
- earlier visits; weight = their samples,
- finished siblings; weight 1 each,
- running siblings: one that has generated g is a censored sample. It enters as the median of what exceeds g under the estimate without it,
  with weight F(g), the probability to have ended before g: about 0 while it is young, nearly 1 when it should have ended. Without them the
  first to finish, which are the short ones, would make the group look short.
Length is log-logistic around that estimate, variance = within * (1 + 1 / total weight). Remaining length is that distribution given that it
exceeds what was generated. Log-logistic, because its conditional quantiles have a closed form and its tail is that of real lengths (a
normal's is too light).

Pool (`Pool`): log size = pool mean + prompt effect + sample effect, the effects with variances `between` and `within`. The pool mean is a
running mean that forgets (`MEMORY`), so it follows the policy. `within` comes from the squared distances of finished siblings to their
group's mean, `between` from the total variance less `within`. A prior worth `PRIOR_COUNT` trajectories covers the start. `step_mean` gives
the level of one training step, so that a prompt's history is kept as a deviation from its step and survives the drift of the policy.

Invariants: variances stay above `MIN_VARIANCE`; the pool is a few numbers plus `STEPS` step means.
Source: Robbins / Efron-Morris shrinkage and the one-way random-effects model, with the shares of seven public traces; the censored term is
one step of expectation maximisation. Cost: O(1) per trajectory with the sums that `live` keeps; vectorised. Shapes are (QUANTITIES, n).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from math import exp, log, log1p, sqrt
from typing import NamedTuple

import numpy as np

from verl_heddle.predict.quantities import FLOOR, LOGISTIC, ODDS_UPPER, QUANTITIES, TOKENS, UPPER, Floats

PRIOR_LOG = np.log([1000.0, 4.0, 1.0])
"""Size before anything has ended: the order of magnitude of agentic trajectories. One finished trajectory outweighs it."""

PRIOR_VARIANCE = np.array([0.75, 0.4, 2.0])
"""Total variance of the logs before there is data: sigma 0.5 to 0.9 (tokens), 0.3 to 0.6 (turns) in public traces, tool times far wider."""

PRIOR_BETWEEN = 0.7
"""Share of the variance that lies between prompts: 62 to 83 % in seven public traces."""

PRIOR_COUNT = 8.0
"""Trajectories the prior variances are worth: a variance from fewer is off by half."""

MEMORY = 4096.0
"""Trajectories until the pool forgets by a factor e: some steps of a usual batch (256 to 1024), so that it follows the policy."""

STEP_COUNT = 256.0
"""Trajectories of a step that outweigh the pool in its level: with fewer prompts the draw of the prompts moves the mean more than the
policy does from one step to the next."""

STEPS = 1024
"""Step levels kept: more than an epoch has steps in common recipes."""

MIN_VARIANCE = 1e-3
"""A spread of 3 %: nothing is predicted better, and nothing is divided by zero."""


class Pool:
    """Running mean and variances of the logs of the three quantities; see the module for the law."""

    def __init__(self) -> None:
        self.count = 1.0
        self.mean: Floats = PRIOR_LOG.copy()
        self._square: Floats = PRIOR_VARIANCE * PRIOR_COUNT
        self._square_count = PRIOR_COUNT
        self._inside: Floats = PRIOR_VARIANCE * (1 - PRIOR_BETWEEN) * PRIOR_COUNT
        self._inside_count = PRIOR_COUNT
        self._steps: OrderedDict[int, tuple[int, Floats]] = OrderedDict()
        self._settle()

    def observe(self, logs: Floats, step: int, inside: Floats | None) -> None:
        """A trajectory of `step` ended with sizes exp(logs); `inside`: what it adds to its group's sum of squares, None if first."""
        keep = 1 - 1 / MEMORY
        delta = logs - self.mean
        self.count = self.count * keep + 1
        self.mean = self.mean + delta / self.count
        self._square = self._square * keep + delta * (logs - self.mean)
        self._square_count = self._square_count * keep + 1
        if inside is not None:
            self._inside = self._inside * keep + inside
            self._inside_count = self._inside_count * keep + 1
        number, total = self._steps.get(step, (0, np.zeros(QUANTITIES)))
        self._steps[step] = (number + 1, total + logs)
        if len(self._steps) > STEPS:
            self._steps.popitem(last=False)
        self._settle()

    def step_mean(self, step: int) -> Floats:
        """Mean log sizes of `step`, drawn to the pool's where it had few trajectories; the pool's if the step is not known."""
        number, total = self._steps.get(step, (0, np.zeros(QUANTITIES)))
        level: Floats = (total + STEP_COUNT * self.mean) / (number + STEP_COUNT)
        return level

    def _settle(self) -> None:
        self.within: Floats = np.maximum(self._inside / self._inside_count, MIN_VARIANCE)
        self.between: Floats = np.maximum(self._square / self._square_count - self.within, MIN_VARIANCE)
        self.ratio: Floats = self.within / self.between
        """Finished samples that weigh as much as the pool in the estimate of a prompt."""
        self.laws = tuple(zip(self.mean.tolist(), self.ratio.tolist(), self.within.tolist(), strict=True))
        """(mean, ratio, within) of each quantity as plain numbers."""

    def state(self) -> dict[str, object]:
        """JSON values from which `restore` makes the same pool."""
        return {
            "count": self.count,
            "mean": self.mean.tolist(),
            "square": self._square.tolist(),
            "square_count": self._square_count,
            "inside": self._inside.tolist(),
            "inside_count": self._inside_count,
            "steps": [[step, number, total.tolist()] for step, (number, total) in self._steps.items()],
        }

    @classmethod
    def restore(cls, state: dict) -> Pool:
        """Counterpart of `state`."""
        pool = cls()
        pool.count, pool._square_count, pool._inside_count = (float(state[name]) for name in ("count", "square_count", "inside_count"))
        pool.mean, pool._square, pool._inside = (_vector(state[name]) for name in ("mean", "square", "inside"))
        pool._steps.update((int(step), (int(number), _vector(total))) for step, number, total in state["steps"])
        pool._settle()
        return pool


def _vector(values: list[float]) -> Floats:
    vector = np.array(values, dtype=np.float64)
    if vector.shape != (QUANTITIES,) or not np.isfinite(vector).all():
        raise ValueError(f"expected {QUANTITIES} finite numbers, got {values}")
    return vector


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
