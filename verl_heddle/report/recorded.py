"""A recorded step as something that can be asked: on which engines it ran, how fast they were, and what other decisions would have given.

The latency model is calibrated from the run itself (`verl_heddle.latency.calibrate`), or taken from the shipped table where model and GPU
are named. Calibrated, only the recorded tensor-parallel degree is known. What the simulator makes of the step *as it was*, with each turn's
recorded replica and priority, against what was measured, says how far its other answers can be trusted (`Machine.replayed`).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from verl_heddle.fleet import Replica
from verl_heddle.latency import LatencyModel, calibrate
from verl_heddle.simulate import DEFAULT_SLOTS, Bound, EngineOptions, Policy, Result, lower_bound, simulate
from verl_heddle.traces import replayable
from verl_heddle.trajectory import Decision, Reason, Trajectory, TrajectoryEnd, TurnEnd, TurnStart

CALIBRATION_TURNS = 20_000
"""Turns a calibration is made from at most, in whole steps: 1,000 times what it needs, and two seconds of work."""


@dataclass(frozen=True, slots=True)
class Engines:
    """What a run's replicas were. `assumed` names what neither the trace nor the user said."""

    tp: int
    slots: int
    replicas: int
    order: str
    assumed: tuple[str, ...] = ()

    @property
    def gpus(self) -> int:
        """Of all replicas."""
        return self.tp * self.replicas


def engines_of(trajectories: Sequence[Trajectory], tp: int | None = None, slots: int | None = None) -> Engines:
    """The engines of a recorded run; `tp` and `slots` go before what the trace says."""
    meta = trajectories[0].meta
    seen = {turn.replica for item in trajectories for turn in item.steps if turn.replica is not None}
    assumed = [name for name, given in (("tp", tp), ("slots", slots)) if given is None and name not in meta]
    ordered = any(turn.priority for item in trajectories for turn in item.steps)
    return Engines(
        tp=tp or int(meta.get("tp", 1)),
        slots=slots or int(meta.get("slots", DEFAULT_SLOTS)),
        replicas=max(int(meta.get("replicas", 0)), len(seen), 1),
        order=str(meta.get("order", "priority" if ordered else "fcfs")),
        assumed=tuple(assumed),
    )


def ready(step: Sequence[Trajectory], without: Trajectory | None = None) -> list[Trajectory]:
    """The step's trajectories as the simulator takes them: those of known length, trials told apart where a prompt was visited twice.

    `without` leaves out one of `step`; the others keep the names that they have in the whole step.
    """
    known = [item for item in step if any(turn.output_tokens is not None for turn in item.steps)]
    twice = {key for key, times in Counter((item.prompt_id, str(item.trial)) for item in known).items() if times > 1}
    return [
        replace(replayable(item), trial=f"{item.trial} of {item.meta.get('uid', '')}, {number}")
        if (item.prompt_id, str(item.trial)) in twice
        else replayable(item)
        for number, item in enumerate(known)
        if item is not without
    ]


def calibrated(steps: Iterable[Sequence[Trajectory]], tp: int) -> LatencyModel:
    """The latency model that explains some steps best, from as many of them as `CALIBRATION_TURNS` takes.

    Raises:
        ValueError: too few turns with the times that are needed.
    """
    records: list[Trajectory] = []
    turns = 0
    for step in steps:
        if turns >= CALIBRATION_TURNS:
            break
        records += step
        turns += sum(len(item.steps) for item in step)
    return calibrate(records, tp)


def overhead_s(step: Sequence[Trajectory]) -> float:
    """Mean seconds of a turn that neither engine nor tool explains: routing, transport, parsing; and the reward, spread over the turns."""
    turns = sum(len(item.steps) for item in step)
    lost = sum((turn.route_s or 0.0) + (turn.transport_s or 0.0) + (turn.between_s or 0.0) for item in step for turn in item.steps)
    return (lost + sum(item.meta.get("score_s", 0.0) for item in step)) / max(1, turns)


@dataclass(frozen=True, slots=True)
class Machine:
    """Engines with their speed. `tps`: degrees whose times are known, for the bound and for asking about others."""

    engines: Engines
    latency: LatencyModel
    tps: tuple[int, ...]

    @property
    def source(self) -> str:
        """Where the times come from, and how well they explain the run."""
        fit = self.latency.engines[self.engines.tp].fit
        told = f"; half of the turns are explained within {100 * fit.median_error:.0f} %" if fit else ""
        return f"{self.latency.source}{told}"

    def fleet(self, tp: int | None = None, slots: int | None = None, replicas: int | None = None) -> list[Replica]:
        """Replicas as recorded but for what is given."""
        degree = tp or self.engines.tp
        held = self.latency.kv_tokens(degree)
        return [
            Replica(f"r{number}", degree, slots or self.engines.slots, held)
            for number in range(replicas or self.engines.gpus // degree)
        ]  # fmt: skip

    def bound(self, step: Sequence[Trajectory]) -> Bound:
        """What no schedule on these GPUs could beat, with no time lost between turns; over all `tps`."""
        return lower_bound(ready(step), self.engines.gpus, self.latency, self.tps, slots=self.engines.slots)

    def run(
        self,
        step: Sequence[Trajectory],
        policy: Policy,
        *,
        order: str = "fcfs",
        fleet: Sequence[Replica] | None = None,
        overhead: float = 0.0,
    ) -> Result:
        """Simulate trajectories (from `ready`) as they arrived."""
        starts = [item.meta["start_s"] for item in step]
        engine = EngineOptions("priority" if order == "priority" else "fcfs", turn_overhead_s=overhead)
        arrivals = [start - min(starts) for start in starts]
        return simulate(step, self.fleet() if fleet is None else fleet, self.latency, policy, engine=engine, arrivals_s=arrivals)

    def replayed(self, step: Sequence[Trajectory]) -> Result:
        """The step again, with every turn's recorded replica and priority."""
        return self.run(ready(step), AsRecorded(step, self.fleet()), order=self.engines.order, overhead=overhead_s(step))


def machine(steps: Iterable[Sequence[Trajectory]], engines: Engines, table: LatencyModel | None = None) -> Machine:
    """The machine of a run, from its own times or from a `table`.

    Raises:
        ValueError: the run does not suffice, or the table does not know the degree.
    """
    if table is None:
        return Machine(engines, calibrated(steps, engines.tp), (engines.tp,))
    if engines.tp not in table.tps:
        raise ValueError(f"{table.name} knows tensor-parallel degrees {', '.join(map(str, table.tps))}, the run has {engines.tp}")
    return Machine(engines, table, tuple(tp for tp in table.tps if tp <= engines.gpus and table.fits(tp)))


class AsRecorded:
    """Policy: every turn goes where it went, with the priority it had, or with `remaining` the true tokens still to come, most first."""

    def __init__(self, step: Sequence[Trajectory], fleet: Sequence[Replica], remaining: bool = False) -> None:
        names = sorted({turn.replica for item in step for turn in item.steps if turn.replica is not None})
        place = {name: fleet[number % len(fleet)].name for number, name in enumerate(names)}
        self._turns: dict[tuple[str, str], list[tuple[str, int]]] = {}
        for item, source in zip(
            ready(step), [one for one in step if any(turn.output_tokens is not None for turn in one.steps)], strict=True
        ):
            left = item.output_tokens
            rows = []
            for turn, told in zip(item.steps, source.steps, strict=True):
                rows.append((place.get(told.replica or "", fleet[0].name), -left if remaining else told.priority or 0))
                left -= turn.output_tokens or 0
            self._turns[item.prompt_id, str(item.trial)] = rows

    def replicas_added(self, replicas: Iterable[Replica]) -> None:
        """The fleet is known already."""

    def replicas_removed(self, names: Iterable[str]) -> None:
        """Does not happen."""

    def turn_started(self, turn: TurnStart, now: float) -> Decision:
        """As it was."""
        replica, priority = self._turns[turn.trajectory.prompt, str(turn.trajectory.sample)][turn.turn]
        return Decision(replica, priority, Reason.STICKY)

    def turn_finished(self, turn: TurnEnd, now: float) -> None:
        """Nothing to learn."""

    def trajectory_ended(self, end: TrajectoryEnd, now: float) -> None:
        """Nothing to learn."""


def prediction(step: Sequence[Trajectory]) -> list[tuple[int, float, float, float | None]]:
    """(turn, predicted, true, predicted upper quantile) tokens still to come, of predicted turns of whole lives."""
    rows = []
    for item in step:
        if item.meta.get("outcome") != "finished" or any(turn.output_tokens is None for turn in item.steps):
            continue
        left = item.output_tokens
        for number, turn in enumerate(item.steps):
            if turn.predicted_remaining is not None and left > 0:
                rows.append((number, float(turn.predicted_remaining), float(left), getattr(turn, "predicted_upper", None)))
            left -= turn.output_tokens or 0
    return rows


def decisions(step: Sequence[Trajectory]) -> Mapping[str, int]:
    """How often each reason decided a turn."""
    found: dict[str, int] = defaultdict(int)
    for item in step:
        for turn in item.steps:
            if turn.reason:
                found[turn.reason] += 1
    return dict(found)
