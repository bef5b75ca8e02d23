"""Checks after every step whether planning has paid, and how far predictions may be trusted.

Law of `Audit`: verl's rule runs in the shadow on the same events. When all trajectories have ended, the drain times of both first
placements are computed from the true lengths (`outlook`, scale near 0); for a sample of moves, the times of the two replicas with and
without the move. A ratio below 1 is a loss. If the mean log ratio over the last `WINDOW` steps (at least `LEAST`) is below 0, first turns
go by verl's rule, or moves stop, for `REST` steps; then planning is tried again with a clean slate. A single step shows mostly luck, hence
the window. The model's own makespans are compared, so a wrong latency model shows up not here but in the forecast error, which is a metric.

Law of `Trust`: for every finished trajectory, x = log tokens predicted at its first turn, y = log tokens it had. Over the last `MEMORY`:
    slope    = least-squares slope of y on x, within 0 and 1: 0 for predictions that are noise, 1 for unbiased ones;
    widen    = residual scale / mean claimed scale, within 1 and `MOST`: corrects overconfidence.
An estimate is used with its log median shrunk towards the mean of all live trajectories by the slope, and its scale times `widen`. With a
worthless predictor all trajectories look alike, and the plan is an even split. Trajectories that finish first are short, so pairs count
only when all have ended (`close`). Before `FEWEST` pairs, predictions are used as they are.

Invariant: the scale never shrinks. Source: regression to the mean, as a check on the optimizer's curse.
Cost: O(trajectories * len(GRID)) per step, O(residents) for each of `SAMPLES` moves, O(1) per trajectory for `Trust`.
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
"""Steps with stock's rule before planning is tried again."""

SAMPLES = 32
"""Moves looked at per step."""


class Verdict:
    """Whether one kind of decision has paid."""

    def __init__(self) -> None:
        self._gains: deque[float] = deque(maxlen=WINDOW)
        self._resting = 0
        self.last = 1.0
        """Ratio of the last step that was judged."""

    @property
    def pays(self) -> bool:
        """False while resting."""
        return self._resting == 0

    def judge(self, ratio: float | None) -> None:
        """A step is over; `ratio`: without over with the decisions, None if there were none."""
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
"""Residents of the source and the target before a move, with the tokens they had generated, and who moves."""


class Audit:
    """See the module. `placing` and `moving` are the verdicts."""

    def __init__(self, rng: Random) -> None:
        self.placing, self.moving = Verdict(), Verdict()
        self._stock = StickyLeastInflight(rng)
        self._shadow: dict[str, str] = {}
        """Replica by stock's rule of each turn under way, by request."""
        self._first: dict[str, tuple[str, str]] = {}
        self._tokens: dict[str, int] = {}
        self._moves: list[tuple[str, str, Snapshot]] = []
        self._planned = False

    def add(self, replica: str) -> None:
        """A replica joins."""
        self._stock.add(replica)

    def remove(self, replica: str) -> None:
        """A replica leaves; a step in which that happens is not judged."""
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
        """The turn ended; unknown ones are passed over."""
        if request in self._shadow:
            self._stock.release(self._shadow.pop(request))

    def moved(self, source: str, target: str, before: Snapshot) -> None:
        """A move was ordered."""
        if len(self._moves) < SAMPLES:
            self._moves.append((source, target, before))

    def wants_moves(self) -> bool:
        """Whether another snapshot is of use."""
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
        for source, target, (here, there, who) in self._moves:
            if source not in at or target not in at:
                continue
            sums = np.zeros((len(names), 2, len(GRID)))
            sums[at[source]], sums[at[target]] = self._left(here), self._left(there)
            without += float(drains(sums).max())
            mover = self._left({who: here[who]})
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
"""Trajectories; a few steps of a usual batch, so that a predictor that improves is believed soon."""

FEWEST = 64
"""Below it the slope's own error is above 0.1."""

MOST = 4.0
"""A predictor that errs more than so many times what it claims is caught by the slope."""


class Trust:
    """See the module."""

    def __init__(self) -> None:
        self.slope = 1.0
        self.widen = 1.0
        self.quality: float | None = None
        """Correlation of log predicted and log true length over the pairs that count; None before there are enough."""
        self._told: dict[str, tuple[float, float]] = {}
        self._fresh: list[tuple[float, float, float]] = []
        self._pairs: deque[tuple[float, float, float]] = deque(maxlen=MEMORY)

    def told(self, key: str, estimate: Estimate) -> None:
        """The predictor's word at a trajectory's first turn."""
        self._told[key] = (log(max(estimate.median_tokens, 1.0)), estimate.scale)

    def ended(self, key: str, tokens: int | None) -> None:
        """The trajectory had so many tokens; None: cut short or not to be learnt from."""
        said = self._told.pop(key, None)
        if said is not None and tokens:
            self._fresh.append((said[0], log(tokens), said[1]))

    def close(self) -> None:
        """Everybody has ended: what was collected counts."""
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
        """The estimate as it may be used; `usual_log`: mean log median of what runs."""
        if self.slope == 1.0 and self.widen == 1.0:
            return estimate
        median = exp(usual_log + self.slope * (log(max(estimate.median_tokens, 1.0)) - usual_log))
        upper = median * exp(min(50.0, estimate.scale * self.widen * ODDS_UPPER))
        return estimate._replace(median_tokens=median, upper_tokens=upper)
