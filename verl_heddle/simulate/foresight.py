"""A predictor of controlled quality, for asking what a planner is worth with it. It has the methods of `predict.predictor.Predictor`.

Law: the log of a trajectory's true length, standardised over the step, is z. The signal is u = q z + sqrt(1 - q^2) e, e standard normal,
so q is the correlation of signal and truth. The prediction is the conditional mean of z given u, with the conditional spread: as honest as
can be. Later in a trajectory it knows in addition only that it has not ended: the log-logistic given that it exceeds what was generated.
Quality 1 is an oracle, 0 knows the distribution of the step. `claims` makes it a liar: it speaks as if its quality were that. Tool time is
in proportion to tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, log, log1p, sqrt

import numpy as np

from verl_heddle.predict.quantities import LOGISTIC, UPPER, Estimate
from verl_heddle.trajectory import Trajectory, TrajectoryEnd, TurnEnd, TurnStart

LEAST_SCALE = 0.01
"""Of an oracle's log-logistic: keeps it a distribution."""


class Foresight:
    """See the module.

    Args:
        trajectories: those that will be simulated, with distinct (prompt, trial).
        quality, claims: correlations in 0 to 1; `claims` None: honest.
        sure: tell the median as if it were certain, which is planning on point predictions.
    """

    def __init__(
        self, trajectories: Sequence[Trajectory], quality: float, seed: int = 0, claims: float | None = None, sure: bool = False
    ) -> None:
        if not 0 <= quality <= 1 or not 0 <= (claims or 0.0) <= 1:
            raise ValueError(f"quality and claims must lie in 0 to 1, got {quality} and {claims}")
        claims = quality if claims is None else claims
        tokens = np.log([max(1, item.output_tokens) for item in trajectories])
        mean, spread = float(tokens.mean()), max(float(tokens.std()), 1e-6)
        signal = quality * (tokens - mean) / spread + sqrt(1 - quality**2) * np.random.default_rng(seed).normal(size=len(tokens))
        says = np.exp(mean + claims * spread * signal).tolist()
        self._median = {(item.prompt_id, item.trial): one for item, one in zip(trajectories, says, strict=True)}
        self._scale = max(LEAST_SCALE, spread * sqrt(1 - claims**2) * LOGISTIC)
        self._sure = sure
        self._tool_s = sum(item.tool_s for item in trajectories) / sum(item.output_tokens for item in trajectories)
        self._turn = sum(item.output_tokens for item in trajectories) / max(1, sum(len(item.steps) for item in trajectories))
        self._live: dict[str, list[float]] = {}

    def turn_started(self, turn: TurnStart) -> None:
        """Who it is, and what it has generated."""
        identity = turn.trajectory
        self._live[identity.key] = [self._median[identity.prompt, identity.sample], turn.generated_tokens]

    def turn_finished(self, turn: TurnEnd) -> None:
        """It has generated more."""
        self._live[turn.trajectory.key][1] += turn.output_tokens

    def trajectory_ended(self, end: TrajectoryEnd) -> None:
        """Forget it."""
        self._live.pop(end.trajectory.key, None)

    def predict(self, key: str) -> Estimate:
        """What is left."""
        median, done = self._live[key]
        past = exp(min(40.0, max(-40.0, (log(max(done, 1e-6)) - log(median)) / self._scale)))
        left = max(1.0, median * exp(self._scale * log1p(2 * past)) - done)
        upper = median * exp(self._scale * log((UPPER + past) / (1 - UPPER))) - done
        return Estimate(left, left if self._sure else max(upper, left), max(1.0, left / self._turn), left * self._tool_s)
