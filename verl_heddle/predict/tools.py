"""Learns from tool names: how long a call takes, and whether trajectories that make it run longer than expected.

Law: two running means per name: log seconds of its calls, and surprise, the log of what remained after the call less the log of the
empirical-Bayes estimate. Both are shrunk towards the mean of all tools with the weight of `PRIOR_CALLS` calls; surprise is returned as the
difference from that mean. Parallel calls (names joined by `+`) count for each of their tools. Only ended calls and trajectories are
learned from, so a trajectory never sees its own future ("ordered target statistics", Prokhorenkova et al. 2018). Invariant: at most
`MAX_TOOLS` names; later ones share one entry. Cost: O(1) per call.
"""

from __future__ import annotations

from typing import NamedTuple

PRIOR_CALLS = 10.0
"""Calls at which a name's mean weighs as much as that of all tools."""

MEMORY = 2000.0
"""Calls after which a name's past stops gaining weight: tools and policies change during a run."""

MAX_TOOLS = 4096
"""Names tracked individually; agents with generated tool names must not fill memory."""

MAX_PARALLEL = 8
"""Calls counted per turn: bounds the work."""

OTHER = ""


class _Mean(NamedTuple):
    calls: float = 0.0
    mean: float = 0.0

    def add(self, value: float) -> _Mean:
        calls = min(self.calls, MEMORY) + 1
        return _Mean(calls, self.mean + (value - self.mean) / calls)

    def drawn_to(self, prior: float) -> float:
        return (self.calls * self.mean + PRIOR_CALLS * prior) / (self.calls + PRIOR_CALLS)


_NEW = (_Mean(), _Mean())


def names(tool: str | None) -> tuple[str, ...]:
    """The tools of one turn: `a+b` names two; None gives an empty tuple."""
    return () if tool is None else tuple(tool.split("+", MAX_PARALLEL)[:MAX_PARALLEL])


class Tools:
    """Running means by tool name; see the module for the law."""

    def __init__(self, prior_log_s: float) -> None:
        self._known: dict[str, tuple[_Mean, _Mean]] = {}
        self._all = (_Mean(1.0, prior_log_s), _Mean(1.0, 0.0))

    def __len__(self) -> int:
        return len(self._known)

    def says(self, called: tuple[str, ...]) -> tuple[float, float]:
        """(log seconds, surprise) expected of these calls: the longest time, the mean surprise."""
        seconds, usual = self._all
        if not called:
            return seconds.mean, 0.0
        entries = [self._known.get(name) or self._known.get(OTHER, _NEW) for name in called]
        return max(entry[0].drawn_to(seconds.mean) for entry in entries), sum(
            entry[1].drawn_to(usual.mean) - usual.mean for entry in entries
        ) / len(entries)

    def took(self, called: tuple[str, ...], log_s: float) -> None:
        """The calls were answered after exp(log_s) seconds."""
        self._add(called, 0, log_s)

    def led_to(self, called: tuple[str, ...], surprise: float) -> None:
        """After these calls a trajectory ran exp(surprise) times as long as estimated."""
        self._add(called, 1, surprise)

    def _add(self, called: tuple[str, ...], which: int, value: float) -> None:
        for name in called:
            if name not in self._known and len(self._known) >= MAX_TOOLS:
                name = OTHER
            self._known[name] = _with(self._known.get(name, _NEW), which, value)
            self._all = _with(self._all, which, value)

    def state(self) -> list[list]:
        """JSON values from which `restore` makes the same means."""
        return [[name, *seconds, *surprise] for name, (seconds, surprise) in [(None, self._all), *self._known.items()]]

    @classmethod
    def restore(cls, state: list[list]) -> Tools:
        """Counterpart of `state`."""
        tools = cls(0.0)
        (_, *pooled), *rest = state
        tools._all = (_Mean(*map(float, pooled[:2])), _Mean(*map(float, pooled[2:])))
        tools._known = {str(name): (_Mean(float(a), float(b)), _Mean(float(c), float(d))) for name, a, b, c, d in rest}
        return tools


def _with(entry: tuple[_Mean, _Mean], which: int, value: float) -> tuple[_Mean, _Mean]:
    return (entry[0].add(value), entry[1]) if which == 0 else (entry[0], entry[1].add(value))
