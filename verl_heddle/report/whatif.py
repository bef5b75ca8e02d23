"""Simulate what would have helped a recorded step: different decisions, engines and tools, one at a time, on the run's machine.

Law. Each result is a ratio to the simulation of the step *as recorded* (`Machine.replayed`), so that simulator errors common to both cancel
as far as possible. The run's settings (preemption on arrival, the bound on turns in flight) stay on in cases that keep its decisions. Cases
are not combined, because effects do not add up. Cases with lengths known in advance say so; no live policy knows them.

Spare samples (`heddle.shape`) on a recorded step that had none, by visiting its prompts again. Both arms use the same draws (parametric
bootstrap): 2n samples of every prompt, all started at once, each a copy of one of its n in the step with a length drawn from the law that
`shape.budget` learns from them. One arm takes n; the other takes as many as shaping plans with default settings, after observing n other
draws of the prompt at an earlier visit. Both run under the run's own decisions: resident sets if it had them, else verl's rule. The result
is the median ratio of their makespans over the draws. If the run already shaped, its samples were cut short, and there is no result.

Cost: two simulated steps per draw. bench/shaping/forecast.py compares the forecast with steps whose spare samples are known.
Source: DARTS (see `verl_heddle.shape`).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import exp, inf
from random import Random
from statistics import median, median_low

from verl_heddle.options import Options, Shape
from verl_heddle.place.pace import habit_of
from verl_heddle.report.play import preempt_rule
from verl_heddle.report.recorded import AsRecorded, Machine, overhead_s, ready
from verl_heddle.shape.budget import Spreads
from verl_heddle.shape.censored import Law
from verl_heddle.shape.settings import check
from verl_heddle.shape.shaper import Shaper, fleet_of
from verl_heddle.simulate import HostTier, Result
from verl_heddle.simulate.baselines import LptOracle, Slime, Stock, TrajectoryFcfs
from verl_heddle.simulate.policy import Policy
from verl_heddle.simulate.shaped import Shaped, started
from verl_heddle.simulate.workload import most_kv
from verl_heddle.trajectory import Outcome, Trajectory

DRAWS = 5

Pool = dict[str, list[Trajectory]]
"""Samples by prompt."""


@dataclass(frozen=True, slots=True)
class SpareSamples:
    """Simulated effect of spare samples, medians over the draws."""

    ratio: float
    """Makespan without over makespan with spare samples."""
    more_tokens: float
    """Additional generated tokens as a share, stopped samples included; below 0 if fewer are generated because long samples are stopped."""


def spare_samples(step: Sequence[Trajectory], machine: Machine, draws: int = DRAWS) -> SpareSamples | None:
    """Simulate spare samples (see the module); None: the prompts have too few samples each, or some samples were cancelled."""
    if any(item.meta.get("outcome") == Outcome.CANCELLED for item in step):
        return None
    groups: Pool = defaultdict(list)
    for item in ready(step):
        groups[item.prompt_id].append(item)
    size, _ = Counter(map(len, groups.values())).most_common(1)[0] if groups else (0, 0)
    groups = {prompt: items for prompt, items in groups.items() if len(items) == size}
    settings = Shape(enable=True)
    if check(settings, size):
        return None
    laws, overhead = laws_of(groups), overhead_s(step)
    found = [_draw(groups, laws, settings, machine, overhead, Random(seed)) for seed in range(draws)]
    return SpareSamples(median_low(draw.ratio for draw in found), median(draw.more_tokens for draw in found))


def laws_of(groups: Mapping[str, Sequence[Trajectory]]) -> dict[str, Law]:
    """The length distribution of each prompt, learned from its samples."""
    spreads = Spreads()
    for prompt, items in groups.items():
        spreads.observe(prompt, _lengths(items))
    return {prompt: spreads.law(prompt) for prompt in groups}


def drawn(items: Sequence[Trajectory], law: Law, count: int, longest: int, rng: Random, kv_tokens: int | None = None) -> list[Trajectory]:
    """Draw `count` samples of a prompt; those longer than `longest`, or larger than a replica's KV cache, are truncated there."""
    rooms = [inf if kv_tokens is None else kv_tokens - most_kv([item]) + item.output_tokens for item in items]
    made = []
    for number, (item, room) in enumerate(rng.choices(list(zip(items, rooms, strict=True)), k=count)):
        length, limit = exp(rng.gauss(law.mean, law.spread)), min(longest, room)
        factor = min(length, limit) / max(1, item.output_tokens)
        turns = tuple(replace(turn, output_tokens=_scaled(turn.output_tokens, factor)) for turn in item.steps)
        made.append(replace(item, trial=number, steps=turns, meta={**item.meta, "start_s": 0.0, "truncated": length > limit}))
    return made


def _scaled(tokens: int | None, factor: float) -> int | None:
    """Scale a turn's tokens, rounded down so that a truncated trajectory fits; a turn with tokens keeps at least one."""
    return tokens and max(1, int(tokens * factor))


def _lengths(items: Sequence[Trajectory]) -> list[tuple[int, bool]]:
    return [(item.output_tokens, bool(item.meta.get("truncated"))) for item in items]


def _draw(groups: Pool, laws: Mapping[str, Law], settings: Shape, machine: Machine, overhead: float, rng: Random) -> SpareSamples:
    size, prompts = len(next(iter(groups.values()))), list(groups)
    most = int(settings.most * size)
    longest = max(item.output_tokens for items in groups.values() for item in items)  # the length limit, as far as the step shows it
    held = machine.held(machine.engines.tp)
    pool: Pool = {}
    before: list[Trajectory] = []
    shaper = Shaper(settings, size, longest)
    for prompt, law in laws.items():
        level = law._replace(mean=rng.gauss(law.mean, law.doubt))  # the prompt's own level, common to both visits
        pool[prompt], seen = (drawn(groups[prompt], level, count, longest, rng, held) for count in (most, size))
        shaper.spreads.observe(prompt, _lengths(seen))
        before += seen
    usual = habit_of(before)
    fleet = None if usual is None else fleet_of(machine.latency, machine.fleet(), usual, most * len(prompts))
    plan = shaper.plan(0, prompts, fleet)
    plain = [item for prompt in prompts for item in pool[prompt][:size]]
    batch = started(plan, prompts, pool)
    order = machine.engines.order
    without = machine.run(plain, _inner(machine), order=order, overhead=overhead)
    shaped = machine.run(batch, Shaped(_inner(machine), shaper, plan, prompts, batch), order=order, overhead=overhead)
    return SpareSamples(without.makespan_s / shaped.makespan_s, shaped.tokens / without.tokens - 1)


def _inner(machine: Machine) -> Policy:
    residents = machine.engines.residents
    return machine.admitting(residents) if residents else Stock()


@dataclass(frozen=True, slots=True)
class WhatIf:
    """One case. `ratio`: makespan as recorded over makespan in this case, both simulated. `kind`: `order`, `place`, `tools`, ..."""

    name: str
    kind: str
    label: str
    makespan_s: float
    ratio: float
    value: int | None = None
    """The slots or degree simulated."""


def what_ifs(step: Sequence[Trajectory], machine: Machine, base: Result, last: Trajectory) -> list[WhatIf]:
    """Simulate all cases; `base` is the step as recorded, `last` the trajectory that ended last.

    A degree whose replicas cannot hold the longest context is left out.
    """
    rows = []
    for name, kind, label, value, result in _cases(step, machine, last):
        rows.append(WhatIf(name, kind, label, result.makespan_s, base.makespan_s / result.makespan_s, value))
    if (spare := spare_samples(step, machine)) is not None:
        label = f"spare samples, the first n kept, lengths redrawn ({100 * spare.more_tokens:+.0f} % tokens)"
        rows.append(WhatIf("spare_samples", "shape", label, base.makespan_s / spare.ratio, spare.ratio))
    return rows


def _cases(step: Sequence[Trajectory], machine: Machine, last: Trajectory) -> Iterator[tuple[str, str, str, int | None, Result]]:
    work, overhead, engines = ready(step), overhead_s(step), machine.engines
    run, again, order = machine.run, machine.again, engines.order
    plugin, predicting = Options(), Options.longest()
    prioritized = order == "priority" and not engines.residents
    bound, rule = (engines.per_slot, engines.preempt) if prioritized else (predicting.admission.per_slot, preempt_rule(predicting))
    known = AsRecorded(step, machine.fleet(), bound, known=True)
    label = "lengths known: longest first, on the recorded replicas"
    yield "known_order", "order", label, None, run(work, known, order="priority", overhead=overhead, preempt=rule)
    label = "lengths known: longest first, replicas reassigned"
    yield "known_all", "order", label, None, run(work, LptOracle(work), order="priority", overhead=overhead)
    label = "the trajectory that started first runs first; no predictions"
    yield "trajectory_fcfs", "order", label, None, run(work, TrajectoryFcfs(), order="priority", overhead=overhead)
    yield "least_loaded", "place", "every turn to the least loaded replica", None, run(work, Slime(), order=order, overhead=overhead)
    if not engines.residents:
        label = "resident sets: admitted when KV cache has room, kept during tool calls"
        yield "residents", "order", label, None, run(work, machine.admitting(plugin.residents.order), order="priority", overhead=overhead)
    if order == "priority":
        yield "stock", "order", "verl's own placement and order", None, run(work, Stock(), overhead=overhead)
    if machine.held(engines.tp) is not None and machine.latency.kv_bytes(engines.tp) is not None:
        tier = HostTier()
        label = f"evicted KV cache kept in host memory, read back at {tier.bytes_per_s / 1e9:g} GB/s per GPU"
        yield "kv_offload", "memory", label, None, again(step, work, overhead=overhead, tier=tier)
    if any(turn.tool_latency_s for item in work for turn in item.steps):
        quick = [replace(item, steps=tuple(replace(turn, tool_latency_s=0.0) for turn in item.steps)) for item in work]
        yield "no_tools", "tools", "tools take no time", None, again(step, quick, overhead=overhead)
    if overhead > 0:
        yield "no_overhead", "between", "no time between engine and tools", None, again(step, work)
    more = engines.slots * 2
    roomy = machine.fleet(slots=more)
    yield "more_slots", "slots", f"{more} slots per replica", more, again(step, work, roomy, overhead=overhead)
    if (fewer := engines.slots // 2) >= 1:
        few = machine.fleet(slots=fewer)
        yield "fewer_slots", "slots", f"{fewer} slots per replica", fewer, again(step, work, few, overhead=overhead)
    for tp in machine.tps:
        if tp != engines.tp and engines.gpus % tp == 0 and _holds(machine, tp, work):
            yield (
                f"tp_{tp}",
                "tp",
                f"tp={tp} on the same GPUs, verl's rule",
                tp,
                run(work, Stock(), fleet=machine.fleet(tp), overhead=overhead),
            )
    double = machine.fleet(replicas=2 * engines.replicas)
    yield "more_replicas", "replicas", "twice the replicas, verl's rule", None, run(work, Stock(), fleet=double, overhead=overhead)
    if others := ready(step, without=last):
        yield "without_last", "shape", "without the trajectory that ended last", None, again(step, others, overhead=overhead)


def _holds(machine: Machine, tp: int, work: Sequence[Trajectory]) -> bool:
    held = machine.held(tp)
    return held is None or held >= most_kv(work)
