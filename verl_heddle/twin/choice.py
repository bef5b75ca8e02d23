"""Chooses the rule of the next steps, resident sets or verl's own, from the twin's results for both and the measured steps.

Law
- Gain: the mean of log(stock_s / heddle_s) over the last `WINDOW` judged steps. Both times are of the same step, so its lengths cancel.
- Bias: the twin may favour a rule. A rule's bias is the mean of log(measured / simulated makespan) over the last `WINDOW` steps in which
  it ran; the difference of the two biases is added to the gain.
- Margin: the standard error of that sum. A rule that has not run takes the bias of the other, and that bias is its error.
- Resident sets run from the start: no rule loses less while nothing is known (docs/regimes.md). They rest once gain + `SURE` margins is
  below -`WORTH`, and resume when the gain is above 0 or the twin cannot judge. Each return doubles the steps before they may rest again.

A wrong twin thus costs what resident sets gain in two steps (the one that disproves it, and the one in which it is judged), at steps 4, 12
and 28 of a run at the earliest. Source: issue 17; compared with fixed rules by bench/auto.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from math import exp, inf, log, sqrt
from statistics import fmean, stdev

WINDOW = 8
"""Judged steps that a decision uses: policies change over tens of steps."""

ENOUGH = 3
"""Judged steps before the first decision."""

WORTH = 0.01
"""Least gain worth a change, as a logarithm."""

SURE = 2.0
"""Standard errors by which a gain must exceed chance."""

WAIT_STEPS = 8
"""Steps after the first return during which resident sets may not rest again."""


class Choice:
    """The rule of one run, step by step. Pure: no clock, no randomness."""

    def __init__(self) -> None:
        self.rests = False
        """Whether resident sets rest and verl's own rule decides."""
        self._rested: dict[int, bool] = {}
        """`rests` of steps that are not judged yet."""
        self._gains: deque[float] = deque(maxlen=WINDOW)
        self._biases: dict[bool, deque[float]] = {rests: deque(maxlen=WINDOW) for rests in (False, True)}
        """By `rests`."""
        self._not_before, self._wait = 0, WAIT_STEPS

    def ran(self, step: int) -> None:
        """Training step `step` ran under the current rule."""
        self._rested[step] = self.rests

    def judged(self, answer: Mapping[str, float]) -> str | None:
        """Take the twin's answer for a step (`judge.judge`, and its `step`); returns a log line if the rule changes."""
        step = int(answer["step"])
        rested = self._rested.pop(step, None)
        for old in [other for other in self._rested if other < step]:
            del self._rested[old]  # the twin has skipped it
        if rested is None:
            return None
        self._biases[rested].append(-log(1.0 + answer["error"]))
        if "speedup" not in answer:
            return self._resume(step, "the twin cannot judge the step (heddle/twin/error)") if self.rests else None
        self._gains.append(log(answer["speedup"]))
        gain, margin = self.gain()
        last = f"; step {step}: {answer['stock_s']:.0f} s without, {answer['heddle_s']:.0f} s with them"
        if self.rests and gain > 0:
            return self._resume(step, f"steps are expected to be {exp(gain):.2f}x as fast with them{last}")
        if not self.rests and gain + SURE * margin < -WORTH and step >= self._not_before:
            self.rests = True
            return f"after step {step} resident sets rest: steps are expected to be {exp(-gain):.2f}x as fast under verl's own rule{last}"
        return None

    def gain(self) -> tuple[float, float]:
        """Corrected gain and its margin; (0, inf) before `ENOUGH` steps are judged."""
        if len(self._gains) < ENOUGH:
            return 0.0, inf
        kept, rested = self._biases[False], self._biases[True]
        if kept and rested:
            between, error = fmean(rested) - fmean(kept), sqrt(_variance(kept) + _variance(rested))
        else:
            between, error = 0.0, abs(fmean(kept or rested))
        return fmean(self._gains) + between, sqrt(_variance(self._gains) + error**2)

    def metrics(self) -> dict[str, float]:
        """`rests`, 0 or 1; and, once known, `gain` (stock's seconds over resident sets') and `margin`, its possible error as a factor."""
        gain, margin = self.gain()
        return {"rests": float(self.rests)} | ({} if margin == inf else {"gain": exp(gain), "margin": exp(margin)})

    def _resume(self, step: int, why: str) -> str:
        self.rests = False
        self._not_before, self._wait = step + self._wait, 2 * self._wait
        return f"after step {step} resident sets decide again: {why}"


def _variance(values: deque[float]) -> float:
    """Variance of the mean; for a single value its square, since it may be all chance."""
    return stdev(values) ** 2 / len(values) if len(values) > 1 else values[0] ** 2
