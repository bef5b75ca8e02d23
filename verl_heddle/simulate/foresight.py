"""A predictor of controlled quality, to measure what a planner gains from predictions. It has the methods of `predict.predictor.Predictor`.

Law: z is the log of a trajectory's true length, standardised over the step. The signal is u = q z + sqrt(1 - q^2) e with e standard normal,
so q is the correlation of signal and truth. The prediction is the conditional mean of z given u, with the conditional spread, so it is
calibrated. During a trajectory it learns only that the trajectory has not ended: it conditions the log-logistic on exceeding the generated
tokens. Quality 1 is an oracle; quality 0 knows only the distribution of the step. `claims` miscalibrates the prediction: mean and spread
are computed as if the quality were `claims`. Predicted tool time is proportional to tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, log, log1p, sqrt

import numpy as np

from verl_heddle.predict.quantities import LOGISTIC, UPPER, Estimate
from verl_heddle.trajectory import Trajectory, TrajectoryEnd, TurnEnd, TurnStart

LEAST_SCALE = 0.01
"""Smallest scale of the log-logistic, so that an oracle's prediction is still a distribution."""


class Foresight:
    """Predicts the remaining tokens of `trajectories` with a given quality.

    Args:
        trajectories: the simulated trajectories, with distinct (prompt, trial).
        quality, claims: correlations from 0 to 1; `claims` None: equal to `quality`, hence calibrated.
        sure: return the median as the upper quantile too, so that the planner works with point predictions.
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
        medians = np.exp(mean + claims * spread * signal).tolist()
        self._median = {(item.prompt_id, item.trial): median for item, median in zip(trajectories, medians, strict=True)}
        self._scale = max(LEAST_SCALE, spread * sqrt(1 - claims**2) * LOGISTIC)
        self._sure = sure
        self._tool_s = sum(item.tool_s for item in trajectories) / sum(item.output_tokens for item in trajectories)
        self._turn = sum(item.output_tokens for item in trajectories) / max(1, sum(len(item.steps) for item in trajectories))
        self._live: dict[str, list[float]] = {}

    def turn_started(self, turn: TurnStart) -> None:
        """Look up the trajectory's median, and record its generated tokens."""
        identity = turn.trajectory
        self._live[identity.key] = [self._median[identity.prompt, identity.sample], turn.generated_tokens]

    def turn_finished(self, turn: TurnEnd) -> None:
        """Add the turn's output tokens."""
        self._live[turn.trajectory.key][1] += turn.output_tokens

    def trajectory_ended(self, end: TrajectoryEnd) -> None:
        """Forget the trajectory."""
        self._live.pop(end.trajectory.key, None)

    def predict(self, key: str) -> Estimate:
        """Remaining tokens, turns and tool seconds of a live trajectory."""
        median, done = self._live[key]
        past = exp(min(40.0, max(-40.0, (log(max(done, 1e-6)) - log(median)) / self._scale)))
        left = max(1.0, median * exp(self._scale * log1p(2 * past)) - done)
        upper = median * exp(self._scale * log((UPPER + past) / (1 - UPPER))) - done
        return Estimate(left, left if self._sure else max(upper, left), max(1.0, left / self._turn), left * self._tool_s)
