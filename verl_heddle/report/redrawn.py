"""What spare samples (`heddle.shape`) would do to a recorded step that had none: its prompts, visited again.

Law: both arms play the same draws (parametric bootstrap): of every prompt 2n samples, all begun at once, each one of its n in the step with
a length drawn from the law that `shape.spread` learns from them. One arm takes n; the other as many as shaping plans as released, having
seen n other draws of the prompt at an earlier visit. Around both the run's own decisions: resident sets where it had them, else verl's
rule. The answer is the median ratio of their makespans over the draws.
Where the run shaped already, its samples were cut short, and nothing is said.
Cost: two simulated steps a draw. bench/shaping/forecast.py holds it against steps whose spare samples are known.
Source: DARTS (see `verl_heddle.shape`).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import exp, inf
from random import Random
from statistics import median, median_low

from verl_heddle.options import Shape
from verl_heddle.place.pace import habit_of
from verl_heddle.report.recorded import Machine, overhead_s, ready
from verl_heddle.shape.censored import Law
from verl_heddle.shape.settings import check
from verl_heddle.shape.shaper import Shaper, fleet_of
from verl_heddle.shape.spread import Spreads
from verl_heddle.simulate.baselines import Stock
from verl_heddle.simulate.policy import Policy
from verl_heddle.simulate.shaped import Shaped, started
from verl_heddle.simulate.workload import most_kv
from verl_heddle.trajectory import Outcome, Trajectory

DRAWS = 5

Pool = dict[str, list[Trajectory]]
"""Samples by prompt."""


@dataclass(frozen=True, slots=True)
class SpareSamples:
    """Medians over the draws."""

    ratio: float
    """Makespan without over makespan with spare samples."""
    more_tokens: float
    """Share of tokens generated in addition, the stopped samples' included; below 0: less is generated, since long samples are stopped."""


def spare_samples(step: Sequence[Trajectory], machine: Machine, draws: int = DRAWS) -> SpareSamples | None:
    """See the module; None: the step's prompts have too few samples each, or some were stopped."""
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
    chosen = median_low(one.ratio for one in found)
    return SpareSamples(chosen, median(one.more_tokens for one in found))


def laws_of(groups: Mapping[str, Sequence[Trajectory]]) -> dict[str, Law]:
    """What is known of each prompt's lengths from these samples."""
    spreads = Spreads()
    for prompt, items in groups.items():
        spreads.observe(prompt, _lengths(items))
    return {prompt: spreads.law(prompt) for prompt in groups}


def drawn(items: Sequence[Trajectory], law: Law, count: int, longest: int, rng: Random, kv_tokens: int | None = None) -> list[Trajectory]:
    """So many samples of a prompt; those that would be longer than `longest`, or than a replica's KV cache, are cut there."""
    rooms = [inf if kv_tokens is None else kv_tokens - most_kv([item]) + item.output_tokens for item in items]
    made = []
    for number, (item, room) in enumerate(rng.choices(list(zip(items, rooms, strict=True)), k=count)):
        length, limit = exp(rng.gauss(law.mean, law.spread)), min(longest, room)
        factor = min(length, limit) / max(1, item.output_tokens)
        turns = tuple(replace(turn, output_tokens=_scaled(turn.output_tokens, factor)) for turn in item.steps)
        made.append(replace(item, trial=number, steps=turns, meta={**item.meta, "start_s": 0.0, "truncated": length > limit}))
    return made


def _scaled(tokens: int | None, factor: float) -> int | None:
    """Rounded down, so that what is cut fits; a turn that generated something still does."""
    return tokens and max(1, int(tokens * factor))


def _lengths(items: Sequence[Trajectory]) -> list[tuple[int, bool]]:
    return [(item.output_tokens, bool(item.meta.get("truncated"))) for item in items]


def _draw(groups: Pool, laws: Mapping[str, Law], settings: Shape, machine: Machine, overhead: float, rng: Random) -> SpareSamples:
    size, prompts = len(next(iter(groups.values()))), list(groups)
    most = int(settings.most * size)
    longest = max(item.output_tokens for items in groups.values() for item in items)  # the cap, as far as the step shows it
    held = machine.held(machine.engines.tp)
    pool: Pool = {}
    before: list[Trajectory] = []
    shaper = Shaper(settings, size, longest)
    for prompt, law in laws.items():
        level = law._replace(mean=rng.gauss(law.mean, law.doubt))  # the prompt's own, which both visits have
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
