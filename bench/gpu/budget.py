"""Run experiments in order of value inside a budget of seconds.

Law: an experiment begins when, after what is kept for those that are always run last, at least its `least_s` are left; it may take
min(`most_s`, what is left). So a late one never takes the time of one that matters more, and the whole ends in time however long single
ones take: each is stopped at its deadline by `GRACE_S` at the latest, which is subtracted beforehand. One that fails costs only itself.
Pure: clock and start are arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

GRACE_S = 25.0
"""From an experiment's own deadline, at which it stops measuring, to its end by force: shutting engines down takes seconds."""

ROUNDING_S = 1e-6
"""Differences of clock readings: what was kept to the last bit must not be lost by it."""


@dataclass(frozen=True, slots=True)
class Slot:
    """`least_s`: below it nothing comes of it, engine start included; `most_s`: beyond it, it is stuck. `kept`: its least is kept free."""

    name: str
    least_s: float
    most_s: float
    kept: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.least_s <= self.most_s:
            raise ValueError(f"{self.name}: 0 < least_s <= most_s, got {self.least_s} and {self.most_s}")


@dataclass(frozen=True, slots=True)
class Outcome:
    """`status` as the experiment's file says, or `no time` and `there` (measured before) where it was not begun."""

    name: str
    status: str
    took_s: float = 0.0


def deadline_s(slot: Slot, left_s: float, later: Sequence[Slot]) -> float | None:
    """Seconds that an experiment may measure for, when `left_s` are left in all; None: not worth beginning."""
    free = left_s - GRACE_S - sum(one.least_s + GRACE_S for one in later if one.kept)
    return min(slot.most_s, free) if free >= slot.least_s - ROUNDING_S else None


def drive(
    slots: Sequence[Slot],
    budget_s: float,
    clock: Callable[[], float],
    start: Callable[[str, float], str],
    is_there: Callable[[str], bool] = lambda name: False,
) -> list[Outcome]:
    """Run what fits; `start(name, deadline_s)` returns the status. An exception of it is that experiment's failure."""
    begun, outcomes = clock(), []
    for index, slot in enumerate(slots):
        if is_there(slot.name):
            outcomes.append(Outcome(slot.name, "there"))
            continue
        at = clock()
        seconds = deadline_s(slot, budget_s - (at - begun), slots[index + 1 :])
        if seconds is None:
            outcomes.append(Outcome(slot.name, "no time"))
            continue
        try:
            status = start(slot.name, seconds)
        except Exception as error:
            status = f"failed: {type(error).__name__}: {error}"
        outcomes.append(Outcome(slot.name, status, clock() - at))
    return outcomes
