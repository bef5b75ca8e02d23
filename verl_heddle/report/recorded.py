"""Replay a recorded step: on which engines it ran, how fast they were, and what different decisions would have given.

The latency model is calibrated from the run itself (`verl_heddle.latency.calibrate`), or taken from the shipped table if model and GPU are
given. A calibration covers only the recorded tensor-parallel degree. Simulating the step *as recorded*, with each turn's recorded replica
and priority, and comparing it with the measured makespan shows how far other simulations can be trusted (`Machine.replayed`).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

from verl_heddle.fleet import Replica
from verl_heddle.latency import HOST_STEP_S, LatencyModel, calibrate, calibrate_host
from verl_heddle.options import Options, Residents
from verl_heddle.orchestrator import Orchestrator
from verl_heddle.report.setting import UTILIZATION
from verl_heddle.schedule.admission import Admission
from verl_heddle.schedule.preempt import Rule
from verl_heddle.schedule.priority import longest_first
from verl_heddle.simulate import DEFAULT_SLOTS, Bound, EngineOptions, HostTier, Policy, Result, lower_bound, simulate
from verl_heddle.traces import replayable
from verl_heddle.trajectory import Decision, Reason, Trajectory, TrajectoryEnd, TurnEnd, TurnStart

CALIBRATION_TURNS = 20_000
"""Turns after which a calibration takes no further step: 1,000 times what it needs, and two seconds of work."""


@dataclass(frozen=True, slots=True)
class Engines:
    """The replicas of a run. `assumed` names the fields that neither the trace nor the user gave."""

    tp: int
    slots: int
    replicas: int
    order: str
    assumed: tuple[str, ...] = ()
    kv_tokens: int | None = None
    """KV tokens of a replica, as its engine reported; None: unknown."""
    utilization: float | None = None
    """vLLM's `gpu_memory_utilization`; None: unknown."""
    preempt: Rule | None = None
    """Preemption on arrival, if the run had it."""
    per_slot: float = 0.0
    """The run's bound on turns in flight per slot (`heddle.admission.per_slot`); 0: none."""
    residents: str = ""
    """Order of the run's resident sets (`heddle.residents.order`); empty: it had none."""
    as_released: bool = False
    """The trace does not record heddle's settings, so the defaults are assumed."""

    @property
    def gpus(self) -> int:
        """GPUs of all replicas."""
        return self.tp * self.replicas


def engines_of(
    trajectories: Sequence[Trajectory], tp: int | None = None, slots: int | None = None, utilization: float | None = None
) -> Engines:
    """The engines of a recorded run; `tp`, `slots` and `utilization` override the trace.

    Raises:
        ValueError: the trace records invalid preemption settings.
    """
    meta = trajectories[0].meta
    seen = {turn.replica for item in trajectories for turn in item.steps if turn.replica is not None}
    assumed = [name for name, given in (("tp", tp), ("slots", slots)) if given is None and name not in meta]
    ordered = any(turn.priority for item in trajectories for turn in item.steps)
    by_heddle = ordered or any(turn.reason == Reason.ADMITTED for item in trajectories for turn in item.steps)
    unrecorded = by_heddle and "preempt" not in meta and meta.get("order") != "fcfs"
    settings = Options().decisions() if unrecorded else meta
    preempt = settings.get("preempt") or {}
    return Engines(
        tp=tp or int(meta.get("tp", 1)),
        slots=slots or int(meta.get("slots", DEFAULT_SLOTS)),
        replicas=max(int(meta.get("replicas", 0)), len(seen), 1),
        order=str(meta.get("order", "priority" if ordered else "fcfs")),
        assumed=tuple(assumed),
        kv_tokens=meta.get("kv_tokens") if tp in (None, meta.get("tp")) and utilization is None else None,
        utilization=utilization or meta.get("utilization"),
        preempt=Rule.of(preempt) if preempt else None,
        per_slot=float(settings.get("per_slot") or 0.0),
        residents=str(settings.get("residents") or ""),
        as_released=unrecorded,
    )


def ready(step: Sequence[Trajectory], without: Trajectory | None = None) -> list[Trajectory]:
    """The step's trajectories as simulator input: those of known length, with distinct trials if a prompt was visited twice.

    `without` leaves out one trajectory of `step`; the others keep the names they have in the whole step.
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
    """The latency model that fits the given steps best, using steps until `CALIBRATION_TURNS` is reached.

    Raises:
        ValueError: too few turns have the required times.
    """
    return calibrate(enough(steps), tp)


def enough(steps: Iterable[Sequence[Trajectory]]) -> list[Trajectory]:
    """Trajectories of the first steps, until they have `CALIBRATION_TURNS` turns."""
    records: list[Trajectory] = []
    turns = 0
    for step in steps:
        if turns >= CALIBRATION_TURNS:
            break
        records += step
        turns += sum(len(item.steps) for item in step)
    return records


def overhead_s(step: Sequence[Trajectory]) -> float:
    """Mean seconds of a turn outside engine and tool: routing, transport, parsing, and the reward spread over the turns."""
    turns = sum(len(item.steps) for item in step)
    overhead = sum((turn.route_s or 0.0) + (turn.transport_s or 0.0) + (turn.between_s or 0.0) for item in step for turn in item.steps)
    return (overhead + sum(item.meta.get("score_s", 0.0) for item in step)) / max(1, turns)


@dataclass(frozen=True, slots=True)
class Machine:
    """Engines with their step times. `tps`: degrees with known step times, for the bound and for what-ifs."""

    engines: Engines
    latency: LatencyModel
    tps: tuple[int, ...]

    @property
    def source(self) -> str:
        """Where the step times come from, and how well they fit the run."""
        fit = self.latency.engines[self.engines.tp].fit
        error = f"; median error per turn {100 * fit.median_error:.0f} %" if fit else ""
        return f"{self.latency.source}{error}"

    def held(self, tp: int) -> int | None:
        """KV tokens of a replica of that degree: as its engine reported, else from the table at the run's `gpu_memory_utilization` (if
        unknown: verl's default); None: not limiting."""
        if tp == self.engines.tp and self.engines.kv_tokens is not None:
            return self.engines.kv_tokens
        return self.latency.kv_tokens(tp, self.engines.utilization or UTILIZATION)

    def fleet(self, tp: int | None = None, slots: int | None = None, replicas: int | None = None) -> list[Replica]:
        """Replicas as recorded, except for the given arguments."""
        degree = tp or self.engines.tp
        held = self.held(degree)
        return [
            Replica(f"r{number}", degree, slots or self.engines.slots, held)
            for number in range(replicas or self.engines.gpus // degree)
        ]  # fmt: skip

    def bound(self, step: Sequence[Trajectory]) -> Bound:
        """Lower bound on the makespan of any schedule on these GPUs, over all `tps`, with no time lost between turns."""
        held = {tp: self.held(tp) for tp in self.tps}
        return lower_bound(ready(step), self.engines.gpus, self.latency, self.tps, slots=self.engines.slots, kv_tokens=held)

    def run(
        self,
        step: Sequence[Trajectory],
        policy: Policy,
        *,
        order: str = "fcfs",
        fleet: Sequence[Replica] | None = None,
        overhead: float = 0.0,
        tier: HostTier | None = None,
        preempt: Rule | None = None,
    ) -> Result:
        """Simulate trajectories (from `ready`) with their recorded arrival times."""
        starts = [item.meta["start_s"] for item in step]
        engine = EngineOptions("priority" if order == "priority" else "fcfs", turn_overhead_s=overhead, tier=tier, preempt=preempt)
        arrivals = [start - min(starts) for start in starts]
        return simulate(step, self.fleet() if fleet is None else fleet, self.latency, policy, engine=engine, arrivals_s=arrivals)

    def replayed(self, step: Sequence[Trajectory]) -> Result:
        """Simulate the step with every turn's recorded replica and priority and the run's settings. A run with resident sets is decided
        again by their law, which assigns a trajectory to a replica when there is room."""
        return self.again(step, ready(step), overhead=overhead_s(step))

    def admitting(self, order: str, seed: int = 0) -> Orchestrator:
        """Heddle with resident sets on this machine; `seed` breaks random ties."""
        policy = Orchestrator(Options(residents=Residents(order=order), seed=seed))
        policy.step_times_known(self.latency)
        return policy

    def again(
        self, step: Sequence[Trajectory], work: Sequence[Trajectory], fleet: Sequence[Replica] | None = None, **changed: Any
    ) -> Result:
        """Simulate `work`, trajectories of the step from `ready`, with recorded decisions except for what is `changed` (as in `run`)."""
        fleet = self.fleet() if fleet is None else fleet
        policy = self.admitting(self.engines.residents) if self.engines.residents else AsRecorded(step, fleet, self.engines.per_slot)
        return self.run(work, policy, order=self.engines.order, fleet=fleet, preempt=self.engines.preempt, **changed)


def machine(steps: Iterable[Sequence[Trajectory]], engines: Engines, table: LatencyModel | None = None) -> Machine:
    """The machine of a run, calibrated from its own times, or from a `table` plus the host time measured in the run.

    Raises:
        ValueError: the run has too few turns, or the table lacks the degree.
    """
    if table is None:
        return Machine(engines, calibrated(steps, engines.tp), (engines.tp,))
    if engines.tp not in table.tps:
        raise ValueError(f"{table.name} covers tensor-parallel degrees {', '.join(map(str, table.tps))}; the run has {engines.tp}")
    try:
        table = calibrate_host(table, enough(steps), engines.tp)
    except ValueError:  # too few turns
        table = table.with_host(HOST_STEP_S, "assumed: too few turns to measure it")
    memory = engines.utilization or UTILIZATION
    fitting = tuple(tp for tp in table.tps if tp == engines.tp or (tp <= engines.gpus and table.fits(tp, memory)))
    return Machine(engines, table, fitting)


class AsRecorded:
    """Policy: each turn runs on its recorded replica with its recorded priority; with `known`, the trajectory with most true tokens first.

    `known` ranks by whole length rather than by what remains: by remaining length, a running trajectory falls behind the waiting ones
    (`schedule.priority`). `per_slot`: turns in flight per slot of a replica; the rest are held as in the plugin's router; 0: no bound.
    """

    def __init__(self, step: Sequence[Trajectory], fleet: Sequence[Replica], per_slot: float = 0.0, known: bool = False) -> None:
        self._gate = Admission(Options().admission.hold_s) if per_slot else None
        if self._gate is not None:
            for replica in fleet:
                self._gate.add(replica.name, ceil(per_slot * replica.slots))
        names = sorted({turn.replica for item in step for turn in item.steps if turn.replica is not None})
        simulated = {name: fleet[number % len(fleet)].name for number, name in enumerate(names)}
        self._turns: dict[tuple[str, str], list[tuple[str, int]]] = {}
        known_length = [item for item in step if any(turn.output_tokens is not None for turn in item.steps)]
        for item, source in zip(ready(step), known_length, strict=True):
            whole = longest_first(item.output_tokens, Options().priority.quantum_tokens)
            self._turns[item.prompt_id, str(item.trial)] = [
                (simulated.get(turn.replica or "", fleet[0].name), whole if known else turn.priority or 0) for turn in source.steps
            ]

    def replicas_added(self, replicas: Iterable[Replica]) -> None:
        """No-op: the constructor gets the fleet."""

    def replicas_removed(self, names: Iterable[str]) -> None:
        """No-op: the fleet is fixed."""

    def turn_started(self, turn: TurnStart, now: float) -> Decision:
        """The recorded decision."""
        replica, priority = self._turns[turn.trajectory.prompt, str(turn.trajectory.sample)][turn.turn]
        begun = turn.generated_tokens > 0
        held = self._gate is not None and not self._gate.ask(turn.request, replica, priority, now, begun)
        return Decision(replica, priority, Reason.STICKY, held=held)

    def admitted(self, now: float) -> list[str]:
        """Held turns that may now start."""
        return [] if self._gate is None else self._gate.admitted(now)

    def turn_finished(self, turn: TurnEnd, now: float) -> None:
        """Frees the turn's place in flight."""
        if self._gate is not None:
            self._gate.left(turn.request, turn.replica, now if turn.completed else None)

    def trajectory_ended(self, end: TrajectoryEnd, now: float) -> None:
        """No-op: nothing is learned."""


def prediction(step: Sequence[Trajectory]) -> list[tuple[int, float, float, float | None]]:
    """(turn, predicted, true, predicted upper quantile) remaining tokens, for turns with a prediction in finished trajectories."""
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
    """Number of turns decided for each reason."""
    found: dict[str, int] = defaultdict(int)
    for item in step:
        for turn in item.steps:
            if turn.reason:
                found[turn.reason] += 1
    return dict(found)
