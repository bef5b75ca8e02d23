"""What the trajectories of today are like, in the mean: the numbers that `pace` needs, from the planner's own events.

Law: a turn's tokens and the growth of the context per token are means over all turns since the start of the run, weighted so that old ones
fade (`FADE`); the context is the mean over who is live; tool seconds per token are what the estimates of the live say.
Cost: O(1) per event; `habit` is asked for when `due`, because of the tables that are made from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log

from verl_heddle.place.pace import Habit
from verl_heddle.predict.quantities import Estimate

FADE = 1.0 - 1.0 / 4096
"""Per turn: a usual step has thousands, and the next step is another policy."""

RETUNE = 64
"""Events between looks, or a quarter of the trajectories where there are more than 256."""

UNSEEN = Habit()
"""Before the first turn has ended."""


class Habits:
    """See the module."""

    def __init__(self) -> None:
        self._turns = self._output = self._input = 0.0
        self._events = self._covers = 0

    def answered(self, tokens: int) -> None:
        """A turn begins with so many new tokens in its context."""
        self._input += max(0, tokens)

    def spoke(self, tokens: int) -> None:
        """A turn ended."""
        self._turns, self._output, self._input = FADE * self._turns + 1, FADE * self._output + tokens, FADE * self._input

    def due(self, live: int) -> bool:
        """An event happened; whether it is time to look again. The answer yes is remembered as done."""
        self._events += 1
        if live <= self._covers and self._events < max(RETUNE, live // 4):
            return False
        self._events, self._covers = 0, 2 * live
        return True

    def look_again(self) -> None:
        """Be due at the next event."""
        self._covers = -1

    @property
    def covers(self) -> float:
        """Most trajectories there may be before it is due again."""
        return float(max(2, self._covers))

    def habit(self, living: Living) -> Habit:
        """From the contexts and the estimates of everybody under way."""
        context = living.context / max(1, living.count)
        tool_s = living.tool_s / max(living.tokens, 1.0)
        if not self._output:
            return UNSEEN._replace(context_tokens=context, tool_s=tool_s)
        return Habit(context, 1.0 + self._input / self._output, max(1.0, self._output / self._turns), tool_s)


@dataclass(slots=True)
class Living:
    """Sums over everybody under way, kept event by event."""

    count: int = 0
    context: int = 0
    logs: float = 0.0
    """Of log median tokens left."""
    tokens: float = 0.0
    tool_s: float = 0.0

    def come(self, context: int, left: Estimate) -> None:
        """One more."""
        self.count += 1
        self.context += context
        self._add(left, 1)

    def go(self, context: int, left: Estimate) -> None:
        """One less; the sums of nobody are exactly 0."""
        self.count -= 1
        self.context -= context
        self._add(left, -1)
        if not self.count:
            self.logs = self.tokens = self.tool_s = 0.0

    def change(self, before: Estimate, left: Estimate) -> None:
        """Somebody's estimate is another."""
        self._add(before, -1)
        self._add(left, 1)

    @property
    def usual_log(self) -> float:
        """Mean log median."""
        return self.logs / max(1, self.count)

    def _add(self, left: Estimate, sign: int) -> None:
        self.logs += sign * log(max(left.median_tokens, 1.0))
        self.tokens += sign * left.median_tokens
        self.tool_s += sign * left.tool_s
