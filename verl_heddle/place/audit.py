"""Has planning paid? Asked after every step, with the true lengths, against what stock's rule would have done.

Law: stock's rule is run in the shadow on the same events. When all trajectories have ended, the drain times of both first placements are
worked out from the true lengths (`outlook`, scale near 0), and of a sample of moves what the two replicas concerned would have taken with
and without. A ratio below 1 is a loss. Where the mean log ratio over the last `WINDOW` steps (at least `LEAST`) is below 0, first turns go
by stock's rule, or moves stop, for `REST` steps; then the plan gets another chance with a clean slate.

What a single step shows is mostly luck, hence a window; what is compared is the model's own makespan, so a wrong latency model is not
caught here but by the forecast error, which is a metric.
Cost: O(trajectories * len(GRID)) per step, and O(residents) for each of `SAMPLES` moves.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from math import log
from random import Random

import numpy as np

from verl_heddle.place.cost import Floats
from verl_heddle.place.outlook import GRID, curves
from verl_heddle.place.sticky import StickyLeastInflight
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
