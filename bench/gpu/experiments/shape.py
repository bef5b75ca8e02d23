"""Redundant sampling: some samples more than needed, the rest of a group aborted when enough have ended, against waiting for all.

`needed`: exactly the n samples, all waited for (stock). `redundant, waiting`: n + k samples, all waited for. `redundant, abort`: n + k
samples; when n of a group have ended the others are aborted inside vLLM by cancelling their requests. Kept are the first n to end, which
are the shorter ones: this measures time, and says nothing about what such a selection does to training. Own client, vLLM's abort directly.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

from bench.gpu.engines import started
from bench.gpu.one import Run
from bench.gpu.profiles import Profile
from bench.gpu.results import Prediction
from bench.gpu.versus import Arm, Versus
from bench.gpu.versus import predict as forecast
from verl_heddle.fleet import Replica
from verl_heddle.simulate import Cancel, EngineOptions
from verl_heddle.simulate.baselines import Stock
from verl_heddle.traces import generate
from verl_heddle.trajectory import Decision, Outcome, TrajectoryEnd, TurnEnd, TurnStart

TITLE = "Redundant sampling with early abort, against waiting"
CAVEATS = ("The first to end are kept, which favours short answers: time only, no statement about training.",)


class FirstEnough:
    """verl's placement; when `needed` of a group have ended, its others are cancelled. `size`: samples of a group.

    Law: a cancel names only trajectories of the group that have begun and not ended; each at most once.
    """

    def __init__(self, needed: int, seed: int = 0) -> None:
        self._stock, self._needed = Stock(seed), needed
        self._ended: Counter[str] = Counter()
        self._open: dict[str, set[str]] = defaultdict(set)

    def replicas_added(self, replicas: Iterable[Replica]) -> None:
        """As stock."""
        self._stock.replicas_added(replicas)

    def replicas_removed(self, names: Iterable[str]) -> None:
        """As stock."""
        self._stock.replicas_removed(names)

    def turn_started(self, turn: TurnStart, now: float) -> Decision:
        """As stock."""
        self._open[turn.trajectory.uid].add(turn.trajectory.key)
        return self._stock.turn_started(turn, now)

    def turn_finished(self, turn: TurnEnd, now: float) -> None:
        """As stock."""
        self._stock.turn_finished(turn, now)

    def trajectory_ended(self, end: TrajectoryEnd, now: float) -> list[Cancel]:
        """Enough? Then the others go."""
        group = end.trajectory.uid
        self._open[group].discard(end.trajectory.key)
        if end.outcome is not Outcome.FINISHED:
            return []
        self._ended[group] += 1
        if self._ended[group] != self._needed:
            return []
        losers, self._open[group] = sorted(self._open[group]), set()
        return [Cancel(key) for key in losers]


def arms(profile: Profile) -> list[Arm]:
    """See the module."""
    place = profile.shape_
    whole = place.samples + place.spare
    engine = EngineOptions("fcfs", batch_tokens=profile.batch_tokens, block_tokens=profile.block_tokens)

    def all_(seed: int) -> list[Any]:
        return generate(place.workload, place.prompts, whole, seed)

    def some(seed: int) -> list[Any]:
        return [item for item in all_(seed) if int(item.trial) < place.samples]

    def waiting(items: Any, seed: int, fleet: Any, latency: Any, step: int) -> Stock:
        return Stock(seed)

    def abort(items: Any, seed: int, fleet: Any, latency: Any, step: int) -> FirstEnough:
        return FirstEnough(place.samples, seed)

    return [
        Arm("needed", "fcfs", some, waiting, engine),
        Arm("redundant, waiting", "fcfs", all_, waiting, engine),
        Arm("redundant, abort", "fcfs", all_, abort, engine),
    ]


def predict(profile: Profile) -> Prediction:
    """Simulated."""
    return forecast(profile, profile.shape_, arms(profile))


async def measure(run: Run) -> None:
    """All pairs there is time for."""
    place = run.profile.shape_
    async with started(run.profile, run.scratch, place.slots, place.kv_tokens) as handles:
        await Versus(run, place, arms(run.profile), handles).measure()
