"""Checks planning against the true lengths: whether first placements and moves paid, and how far predictions can be trusted.

Law of the verdicts (`Audit`): stock's rule runs as a shadow on the same events. When all trajectories have ended, the drain times of both
first placements are computed from the true lengths (`outlook`, scale near 0), and so is, for a sample of moves, what the two replicas
would have taken with and without the move. A ratio below 1 is a loss. If the mean log ratio over the last `WINDOW` steps (at least
`LEAST`) is below 0, stock's rule places first turns, or moves stop, for `REST` steps; then planning is retried with a clean slate.
A single step shows mostly luck, hence the window. The model's own makespans are compared, so a wrong latency model is not caught here but
by the forecast error, which is a metric.

Law of trust (`Trust`): for every finished trajectory, x = log tokens predicted at its first turn, y = log tokens generated. Over the last
`MEMORY` of them
    slope    = least-squares slope of y on x, clipped to 0 and 1: 0 for noise, 1 for calibrated predictions;
    widen    = residual scale / mean scale claimed, clipped to 1 and `MOST`: corrects overconfident predictors.
An estimate is used with its log median shrunk towards the mean of all live trajectories by the slope, and its scale times `widen`. A
worthless predictor thus makes all trajectories alike, and the plan for equal trajectories is an even split.
The first to finish are short, so pairs count only once all have ended (`close`). Below `FEWEST` pairs, predictions are used unchanged.

Invariant: scale never shrinks. Source: regression to the mean, as a check on the optimizer's curse.
Cost: O(trajectories * len(GRID)) per step, O(residents) for each of `SAMPLES` moves, O(1) per trajectory for trust.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from math import exp, log, sqrt
from random import Random

import numpy as np

from verl_heddle.place.cost import Floats
from verl_heddle.place.outlook import GRID, curves
from verl_heddle.place.sticky import StickyLeastInflight
from verl_heddle.predict.quantities import LOGISTIC, ODDS_UPPER, Estimate
from verl_heddle.trajectory import TurnStart

WINDOW, LEAST = 8, 3
"""Steps."""

REST = 16
"""Steps on stock's rule before planning is retried."""

SAMPLES = 32
"""Moves judged per step."""


class Verdict:
    """Whether one kind of decision has paid."""

    def __init__(self) -> None:
        self._gains: deque[float] = deque(maxlen=WINDOW)
        self._resting = 0
        self.last = 1.0
        """Ratio of the last judged step."""

    @property
    def pays(self) -> bool:
        """False while resting."""
        return self._resting == 0

    def judge(self, ratio: float | None) -> None:
        """A step is over; `ratio`: makespan without the decisions over makespan with them; None if there were none."""
        if self._resting:
            self._resting -= 1
            return
        if ratio is None or not ratio > 0:
            return
        self.last = ratio
        self._gains.append(log(ratio))
        if len(self._gains) >= LEAST and sum(self._gains) < 0:
            self._gains.clear()
            self._resting = REST


Drains = Callable[[Floats], Floats]

Snapshot = tuple[dict[str, int], dict[str, int], str]
"""Residents of the source and the target before a move, with the tokens they had generated, and the key that moves."""


class Audit:
    """See the module. `placing` and `moving` are the verdicts."""

    def __init__(self, rng: Random) -> None:
        self.placing, self.moving = Verdict(), Verdict()
        self._stock = StickyLeastInflight(rng)
        self._shadow: dict[str, str] = {}
        """Shadow replica of each turn in flight, by request."""
        self._first: dict[str, tuple[str, str]] = {}
        self._tokens: dict[str, int] = {}
        self._moves: list[tuple[str, str, Snapshot]] = []
        self._planned = False

    def add(self, replica: str) -> None:
        """A replica joins."""
        self._stock.add(replica)

    def remove(self, replica: str) -> None:
        """A replica leaves; the current step is not judged."""
        self._stock.remove(replica)
        self._first.clear()
        self._moves.clear()

    def started(self, turn: TurnStart, replica: str | None) -> None:
        """A turn started; `replica`: where the plan put it, if it is a trajectory's first."""
        self._shadow[turn.request], _ = self._stock.acquire(turn.conversation)
        if replica is not None:
            self._first[turn.trajectory.key] = (replica, self._shadow[turn.request])
            self._planned = True

    def finished(self, request: str) -> None:
        """The turn ended; unknown requests are ignored."""
        if request in self._shadow:
            self._stock.release(self._shadow.pop(request))

    def moved(self, source: str, target: str, before: Snapshot) -> None:
        """A move was ordered."""
        if len(self._moves) < SAMPLES:
            self._moves.append((source, target, before))

    def wants_moves(self) -> bool:
        """Whether more snapshots are needed this step."""
        return len(self._moves) < SAMPLES

    def ended(self, key: str, tokens: int) -> None:
        """A trajectory is over."""
        self._tokens[key] = tokens

    def close(self, names: Sequence[str], drains: Drains) -> None:
        """Judge the step. `drains(sums)`: drain times of replicas in the order of `names`, from the sums of their curves."""
        self.placing.judge(self._placing(names, drains) if self._planned else None)
        self.moving.judge(self._moving(names, drains) if self._moves else None)
        self._first.clear()
        self._tokens.clear()
        self._moves.clear()
        self._planned = False

    def _placing(self, names: Sequence[str], drains: Drains) -> float | None:
        known = [(key, homes) for key, homes in self._first.items() if key in self._tokens and set(homes) <= set(names)]
        if len(known) < 2:
            return None
        rows = curves([max(1, self._tokens[key]) for key, _ in known], 0.0)
        at = {name: number for number, name in enumerate(names)}
        ours, stock = np.zeros((len(names), 2, len(GRID))), np.zeros((len(names), 2, len(GRID)))
        np.add.at(ours, [at[homes[0]] for _, homes in known], rows)
        np.add.at(stock, [at[homes[1]] for _, homes in known], rows)
        return _ratio(drains(stock).max(), drains(ours).max())

    def _moving(self, names: Sequence[str], drains: Drains) -> float | None:
        at = {name: number for number, name in enumerate(names)}
        without = with_them = 0.0
        for source, target, (here, there, key) in self._moves:
            if source not in at or target not in at:
                continue
            sums = np.zeros((len(names), 2, len(GRID)))
            sums[at[source]], sums[at[target]] = self._left(here), self._left(there)
            without += float(drains(sums).max())
            mover = self._left({key: here[key]})
            sums[at[source]] -= mover
            sums[at[target]] += mover
            with_them += float(drains(sums).max())
        return _ratio(without, with_them)

    def _left(self, residents: Mapping[str, int]) -> Floats:
        left = [self._tokens[key] - done for key, done in residents.items() if self._tokens.get(key, 0) > done]
        total: Floats = curves(left, 0.0).sum(axis=0) if left else np.zeros((2, len(GRID)))
        return total


def _ratio(without: float, with_it: float) -> float | None:
    return float(without / with_it) if with_it > 0 else None


MEMORY = 2048
"""Trajectories; a few steps of a usual batch, so that an improving predictor is soon trusted."""

FEWEST = 64
"""Below it the slope's own error is above 0.1."""

MOST = 4.0
"""Larger errors, relative to the claimed scale, are caught by the slope."""


class Trust:
    """See the module."""

    def __init__(self) -> None:
        self.slope = 1.0
        self.widen = 1.0
        self.quality: float | None = None
        """Correlation of log predicted and log true length over the pairs that count; None before there are enough."""
        self._predicted: dict[str, tuple[float, float]] = {}
        self._fresh: list[tuple[float, float, float]] = []
        self._pairs: deque[tuple[float, float, float]] = deque(maxlen=MEMORY)

    def told(self, key: str, estimate: Estimate) -> None:
        """Record the prediction at a trajectory's first turn."""
        self._predicted[key] = (log(max(estimate.median_tokens, 1.0)), estimate.scale)

    def ended(self, key: str, tokens: int | None) -> None:
        """The trajectory ended with `tokens`; None: censored or excluded from learning."""
        predicted = self._predicted.pop(key, None)
        if predicted is not None and tokens:
            self._fresh.append((predicted[0], log(tokens), predicted[1]))

    def close(self) -> None:
        """All trajectories have ended: count the collected pairs and refit."""
        self._pairs.extend(self._fresh)
        self._fresh.clear()
        if len(self._pairs) < FEWEST:
            return
        x, y, claimed = np.array(self._pairs).T
        spread, both = float(np.var(x)), float(np.cov(x, y, bias=True)[0, 1])
        self.slope = min(1.0, max(0.0, both / spread)) if spread > 1e-9 else 1.0
        self.quality = both / sqrt(spread * float(np.var(y))) if spread > 1e-9 and np.var(y) > 1e-9 else 0.0
        residual = LOGISTIC * float(np.std(y - self.slope * x))
        self.widen = min(MOST, max(1.0, residual / max(float(np.mean(claimed)), 1e-6)))

    def believed(self, estimate: Estimate, usual_log: float) -> Estimate:
        """The estimate corrected by `slope` and `widen`; `usual_log`: mean log median of live trajectories."""
        if self.slope == 1.0 and self.widen == 1.0:
            return estimate
        median = exp(usual_log + self.slope * (log(max(estimate.median_tokens, 1.0)) - usual_log))
        upper = median * exp(min(50.0, estimate.scale * self.widen * ODDS_UPPER))
        return estimate._replace(median_tokens=median, upper_tokens=upper)
