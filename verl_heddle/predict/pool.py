"""What all trajectories have in common: usual size, how much prompts differ, how much the samples of a prompt differ.

Law: log size = pool mean + prompt effect + sample effect, the effects with variances `between` and `within`. The pool mean is a running
mean that forgets (`MEMORY`), so it follows the policy; `within` comes from the squared distances of finished siblings to their group's
mean, `between` from the total variance less `within`. Before there is data, a prior worth `PRIOR_COUNT` trajectories speaks. `step_mean`
gives the level of one training step, so that a prompt's history is kept as a deviation from the level of its day and survives the
drift of the policy.

Invariants: variances stay above `MIN_VARIANCE`; memory is a few numbers plus `STEPS` step means. Cost: O(1) per trajectory.
Source: the usual one-way random-effects model; the shares are those of seven public traces.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np

from verl_heddle.predict.quantities import QUANTITIES, Floats

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
