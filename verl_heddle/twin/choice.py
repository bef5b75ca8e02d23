"""Which rule runs next, resident sets or verl's own: by what the twin says of both, held against what the steps took.

Law. The gain of resident sets is the mean, over the last `WINDOW` judged steps, of the logarithm of the twin's stock_s over heddle_s; both
are of the same step, so its lengths cancel. The twin may see one rule better than it is. What a rule was measured to take over what the
twin made of it is its bias, the mean over the last `WINDOW` steps in which it ran; the difference of the two biases is added to the gain.
The margin is the standard error of that sum; of a rule that has not run, the other's bias is taken, and is the error.

Resident sets run from the start: no rule loses less where nothing is known (docs/regimes.md). They rest once their gain and `SURE` margins
are below -`WORTH`, and come back as soon as their gain is above 0, or the twin cannot judge. Each return doubles the steps that pass before
they rest again. So a wrong twin costs what resident sets gain in two steps (the one that belies it, and the one in which it is judged), at
steps 4, 12 and 28 of a run at the earliest. Source: issue 17; held against fixed rules by bench/auto.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from math import exp, inf, log, sqrt
from statistics import fmean, stdev

WINDOW = 8
"""Judged steps that a decision looks back on: policies change over tens of steps."""

ENOUGH = 3
"""Judged steps before anything is decided."""

WORTH = 0.01
"""Logarithm of the least gain that is worth a change."""

SURE = 2.0
"""Standard errors beyond which a gain is no chance."""

WAIT_STEPS = 8
"""Steps after the first return in which resident sets do not rest again."""


class Choice:
    """The rule of one run, step by step. Pure: no clock, no randomness."""

    def __init__(self) -> None:
        self.rests = False
        """Whether verl's own rule decides in place of resident sets."""
        self._rested: dict[int, bool] = {}
        """By step that is not judged yet."""
        self._gains: deque[float] = deque(maxlen=WINDOW)
        self._biases: dict[bool, deque[float]] = {rests: deque(maxlen=WINDOW) for rests in (False, True)}
        """By whether resident sets rested."""
        self._not_before, self._wait = 0, WAIT_STEPS

    def ran(self, step: int) -> None:
        """Training step `step` is over; it ran by the rule of now."""
        self._rested[step] = self.rests

    def judged(self, answer: Mapping[str, float]) -> str | None:
        """What the twin says of a step (`judge.judge`, with its `step`); returns a line for the user if the rule changes."""
        step = int(answer["step"])
        rested = self._rested.pop(step, None)
        for old in [one for one in self._rested if one < step]:
            del self._rested[old]  # will not be judged any more
        if rested is None:
            return None
        self._biases[rested].append(-log(1.0 + answer["error"]))
        if "speedup" not in answer:
            return self._back(step, "the twin cannot judge what the step took (heddle/twin/error)") if self.rests else None
        self._gains.append(log(answer["speedup"]))
        gain, margin = self.gain()
        last = f"; of step {step}, {answer['stock_s']:.0f} s without and {answer['heddle_s']:.0f} s with them"
        if self.rests and gain > 0:
            return self._back(step, f"steps are expected to be {exp(gain):.2f}x as fast with them{last}")
        if not self.rests and gain + SURE * margin < -WORTH and step >= self._not_before:
            self.rests = True
            return f"after step {step} resident sets rest: steps are expected to be {exp(-gain):.2f}x as fast by verl's own rule{last}"
        return None

    def gain(self) -> tuple[float, float]:
        """Logarithm of stock's seconds over resident sets', and its standard error; (0, inf) before `ENOUGH` steps are judged."""
        if len(self._gains) < ENOUGH:
            return 0.0, inf
        kept, rested = self._biases[False], self._biases[True]
        if kept and rested:
            between, error = fmean(rested) - fmean(kept), sqrt(_variance(kept) + _variance(rested))
        else:
            between, error = 0.0, abs(fmean(kept or rested))
        return fmean(self._gains) + between, sqrt(_variance(self._gains) + error**2)

    def metrics(self) -> dict[str, float]:
        """`rests`, 0 or 1; and, once known, `gain` (stock's seconds over resident sets') and `margin`, the factor that it may be off by."""
        gain, margin = self.gain()
        return {"rests": float(self.rests)} | ({} if margin == inf else {"gain": exp(gain), "margin": exp(margin)})

    def _back(self, step: int, why: str) -> str:
        self.rests = False
        self._not_before, self._wait = step + self._wait, 2 * self._wait
        return f"after step {step} resident sets decide again: {why}"


def _variance(values: deque[float]) -> float:
    """Of the mean; of a single value, its square: it may be all chance."""
    return stdev(values) ** 2 / len(values) if len(values) > 1 else values[0] ** 2
