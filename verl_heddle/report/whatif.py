"""What would have helped a recorded step: other decisions, engines and tools, simulated one at a time, on the machine the run had.

Every answer is a ratio to the simulation of the step *as it was* (`Machine.replayed`), so that what the simulator gets wrong in both
cancels as far as it can; what the run had on (preemption on arrival, the bound on turns in flight) stays on where its own decisions stay.
Nothing is combined: effects do not add up. Where lengths were known in advance, it says so; no live policy
knows them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from verl_heddle.options import Options
from verl_heddle.report.play import preempt_rule
from verl_heddle.report.recorded import AsRecorded, Machine, overhead_s, ready
from verl_heddle.report.redrawn import spare_samples
from verl_heddle.simulate import HostTier, Result
from verl_heddle.simulate.baselines import LptOracle, Slime, Stock, TrajectoryFcfs
from verl_heddle.simulate.workload import most_kv
from verl_heddle.trajectory import Trajectory


@dataclass(frozen=True, slots=True)
class WhatIf:
    """`ratio`: makespan as it was over makespan in this case, both simulated. `kind` groups them: `order`, `place`, `tools`, ..."""

    name: str
    kind: str
    told: str
    makespan_s: float
    ratio: float
    value: int | None = None
    """Slots or degree that was tried."""


def what_ifs(step: Sequence[Trajectory], machine: Machine, base: Result, last: Trajectory) -> list[WhatIf]:
    """Every case that can be asked; `base` is the step as it was, `last` the trajectory that ended last.

    A case the engines could not serve (a context that fits no replica) is left out.
    """
    rows = []
    for name, kind, told, value, result in _cases(step, machine, last):
        rows.append(WhatIf(name, kind, told, result.makespan_s, base.makespan_s / result.makespan_s, value))
    if (spare := spare_samples(step, machine)) is not None:
        told = f"spare samples, the first n kept, lengths drawn anew ({100 * spare.more_tokens:+.0f} % tokens)"
        rows.append(WhatIf("spare_samples", "shape", told, base.makespan_s / spare.ratio, spare.ratio))
    return rows


def _cases(step: Sequence[Trajectory], machine: Machine, last: Trajectory) -> Iterator[tuple[str, str, str, int | None, Result]]:
    work, lost, engines = ready(step), overhead_s(step), machine.engines
    run, again, order = machine.run, machine.again, engines.order
    plugin, predicting = Options(), Options.longest()
    alike = order == "priority" and not engines.residents
    bound, rule = (engines.per_slot, engines.preempt) if alike else (predicting.admission.per_slot, preempt_rule(predicting))
    known = AsRecorded(step, machine.fleet(), bound, known=True)
    told = "lengths known: longest first, each where it was"
    yield "known_order", "order", told, None, run(work, known, order="priority", overhead=lost, preempt=rule)
    told = "lengths known: longest first, placed anew"
    yield "known_all", "order", told, None, run(work, LptOracle(work), order="priority", overhead=lost)
    told = "the trajectory that came first runs first, nothing predicted"
    yield "trajectory_fcfs", "order", told, None, run(work, TrajectoryFcfs(), order="priority", overhead=lost)
    yield "least_loaded", "place", "every turn to the least loaded replica", None, run(work, Slime(), order=order, overhead=lost)
    if not engines.residents:
        told = "trajectories admitted as KV cache has room, and kept through their tools"
        yield "residents", "order", told, None, run(work, machine.admitting(plugin.residents.order), order="priority", overhead=lost)
    if order == "priority":
        yield "stock", "order", "verl's own placement and order", None, run(work, Stock(), overhead=lost)
    if machine.held(engines.tp) is not None and machine.latency.kv_bytes(engines.tp) is not None:
        tier = HostTier()
        told = f"evicted KV cache kept on the host, read back at {tier.bytes_per_s / 1e9:g} GB/s per GPU"
        yield "kv_offload", "memory", told, None, again(step, work, overhead=lost, tier=tier)
    if any(turn.tool_latency_s for item in work for turn in item.steps):
        quick = [replace(item, steps=tuple(replace(turn, tool_latency_s=0.0) for turn in item.steps)) for item in work]
        yield "no_tools", "tools", "tools take no time", None, again(step, quick, overhead=lost)
    if lost > 0:
        yield "no_overhead", "between", "no time between engine and tools", None, again(step, work)
    more = engines.slots * 2
    roomy = machine.fleet(slots=more)
    yield "more_slots", "slots", f"{more} slots a replica", more, again(step, work, roomy, overhead=lost)
    if (fewer := engines.slots // 2) >= 1:
        few = machine.fleet(slots=fewer)
        yield "fewer_slots", "slots", f"{fewer} slots a replica", fewer, again(step, work, few, overhead=lost)
    for tp in machine.tps:
        if tp != engines.tp and engines.gpus % tp == 0 and _holds(machine, tp, work):
            yield f"tp_{tp}", "tp", f"tp={tp} on the same GPUs, verl's rule", tp, run(work, Stock(), fleet=machine.fleet(tp), overhead=lost)
    double = machine.fleet(replicas=2 * engines.replicas)
    yield "more_replicas", "replicas", "twice the replicas, verl's rule", None, run(work, Stock(), fleet=double, overhead=lost)
    if others := ready(step, without=last):
        yield "without_last", "shape", "without the trajectory that ended last", None, again(step, others, overhead=lost)


def _holds(machine: Machine, tp: int, work: Sequence[Trajectory]) -> bool:
    held = machine.held(tp)
    return held is None or held >= most_kv(work)
