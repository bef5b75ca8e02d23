"""Answer in seconds: simulate one draw; if a step is too large for that, simulate a sample of it on a fleet scaled down to match.

Invariants: slots and KV memory per replica, every requested degree, whole groups of a prompt's trajectories, and trajectories per replica.
The fleet shrinks to a divisor of its GPUs on which every degree still has a replica, and the prompts shrink in proportion.

Selection: prompts are taken evenly over their order by longest trajectory, including the longest of all, because a step ends with it. If
even the smallest such fleet has too much work, the step is shortened: fewer prompts, but more than the replicas can run at a time. Turns
then wait less and gains are smaller; the sample's description says so. From a trace of many steps, some are taken evenly over the run.

Cost: reading, plus `TURNS` turns under stock at every degree and under the plugin at two. Error: bench/quick.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil

from verl_heddle.report.draws import Source, Step, assembled, generated
from verl_heddle.report.setting import Setting
from verl_heddle.report.words import count, listed
from verl_heddle.simulate.workload import most_kv
from verl_heddle.traces.index import catalogue
from verl_heddle.traces.steps import by_step, first_groups, latest, told

ARMS = ("stock", "stock_best_tp", "heddle", "heddle_best_tp")

TURNS = 8_000
"""Maximum turns simulated per rule: 3 seconds of one core for all rules together."""

STEPS = 3
"""Minimum steps of a trace to simulate, if it has that many; a larger fleet comes second."""

FILLED = 2.0
"""A shortened step has at least this many times the trajectories that all replicas can run at a time, so that turns wait."""

DRAWN_PROMPTS = 256
"""Maximum prompts drawn from a workload: its prompts are alike, and drawing takes time too."""

READ_TURNS = 5 * TURNS
"""Maximum turns of a trace to decode and select from."""

READ_STEPS = 12
"""Maximum steps of a trace to examine."""


@dataclass(frozen=True, slots=True)
class Sample:
    """What is simulated: `prompts` of `of_prompts` per step, on `gpus` of `of_gpus`, for `steps` of `of_steps`."""

    prompts: float
    of_prompts: float
    gpus: int
    of_gpus: int
    steps: int
    of_steps: int
    longer: float
    """Mean tokens of the simulated trajectories over the mean of all trajectories."""

    @property
    def denser(self) -> float:
        """Prompts per GPU over those of the whole step; 1 up to rounding unless the step was shortened."""
        return self.prompts / self.gpus * self.of_gpus / self.of_prompts

    def description(self) -> str:
        """One line for the report."""
        parts = []
        if self.prompts != self.of_prompts:
            parts.append(f"{count(self.prompts)} of {count(self.of_prompts)} prompts")
        if self.gpus != self.of_gpus:
            parts.append(f"{self.gpus} of {self.of_gpus} GPUs")
        if self.steps != self.of_steps:
            parts.append(f"{self.steps} of {self.of_steps} steps")
        if not parts:
            return f"Quick: one draw of {'the whole step' if self.of_steps == 1 else f'all {self.of_steps} steps'}."
        if self.denser < 0.95:
            kept = "a shorter step than yours, in which fewer turns wait: times and gains are those of a smaller batch"
        elif self.gpus != self.of_gpus:
            kept = f"same slots and KV cache per replica, {self.denser:.2f} times as many trajectories per replica"
        else:
            kept = "same slots, KV cache and GPUs"
        return f"Quick: one draw of {listed(parts)}; {kept}, {self.longer:.2f} times as many tokens per trajectory."


@dataclass(frozen=True, slots=True)
class _Group:
    """The trajectories of one prompt in one step."""

    prompt: str
    trajectories: int
    turns: int
    tokens: int
    longest: int


def quick_workload(
    setting: Setting, workload: str, prompts: int, samples: int, cold: bool = False, **parameters: float
) -> tuple[Setting, Source]:
    """The setting and source for a quick answer about a synthetic workload.

    Raises:
        TraceError: as in `generated`.
        ValueError: as in `Setting.able`.
    """
    source = generated(workload, min(prompts, DRAWN_PROMPTS), samples, [0], cold, **parameters)
    groups = _groups_of(source.draws[0].steps)
    return _sampled(setting, source, prompts, 1, _mean_tokens(groups))


def quick_trace(
    setting: Setting, path: str, step: int | None = None, prompts: int | None = None, samples: int | None = None, cold: bool = False
) -> tuple[Setting, Source]:
    """The setting and source for a quick answer about a trace, or about a file from a different tool.

    Raises:
        TraceError: the file cannot be read, or nothing usable remains.
        ValueError: as in `Setting.able`.
    """
    notes: list[str] = []
    found = catalogue(path, notes.append)
    left: Counter[str] = Counter()
    known = by_step(
        found.entries, lambda entry: (entry.validate, entry.step, entry.turns > 0 and entry.tokens is not None), left, path, step
    )
    whole = {key: first_groups(latest(entries, left), prompts, samples) for key, entries in known.items()}
    usable = {key: some for key, entries in whole.items() if (some := found.candidates(entries))}
    steps = [usable[key] for key in _evenly(list(usable), READ_STEPS)]
    groups = [_groups([(entry.prompt_id, entry.turns, entry.tokens or 0) for entry in entries]) for entries in steps]
    share = min(1.0, READ_TURNS / sum(group.turns for in_step in groups for group in in_step))
    numbers = []
    for entries, those in zip(steps, groups, strict=True):
        names = _chosen(those, ceil(share * len(those)))
        numbers += [entry.number for entry in entries if entry.prompt_id in names]
    source = assembled(found.pick(numbers), notes, path, [0], step, cold=cold)
    source = replace(source, notes=(*found.told, *source.notes, *told(left)))
    every = [_groups([(entry.prompt_id, entry.turns, entry.tokens or 0) for entry in entries]) for entries in whole.values()]
    return _sampled(setting, source, sum(map(len, every)) / len(every), len(every), _mean_tokens(every))


def _sampled(setting: Setting, source: Source, of_prompts: float, of_steps: int, of_tokens: float) -> tuple[Setting, Source]:
    """Reduce the only draw of `source` to what can be simulated in time, and scale the setting in proportion.

    Args:
        of_prompts: prompts of a whole step; the draw may hold only part of them.
        of_steps: steps of the whole source.
        of_tokens: mean tokens of a trajectory.
    """
    (draw,) = source.draws
    setting, why = setting.holding([item for step in draw.steps for item in step])
    groups = _groups_of(draw.steps)
    gpus, part, steps = _extent(setting, draw.steps, groups, of_prompts)
    kept = _evenly(list(range(len(groups))), steps)
    names = {index: _chosen(groups[index], round(part * len(groups[index]))) for index in kept}
    played = tuple(tuple(item for item in draw.steps[index] if item.prompt_id in names[index]) for index in kept)
    if draw.crossed:
        before = played if draw.before else ()
    else:
        before = tuple(tuple(item for item in step if item.prompt_id in names[0]) for step in draw.before)
    chosen = [[group for group in groups[index] if group.prompt in names[index]] for index in kept]
    longer = _mean_tokens(chosen) / max(1e-9, of_tokens)
    sample = Sample(sum(map(len, chosen)) / len(chosen), of_prompts, gpus, setting.gpus, len(kept), of_steps, longer)
    about = source.about | {"steps": len(kept), "prompts": round(sample.prompts, 1)}
    source = replace(
        source,
        draws=(replace(draw, steps=played, before=before),),
        about=about,
        notes=(*source.notes, *filter(None, [why]), sample.description()),
        gpus=setting.gpus,
        sample=sample.description(),
    )
    return replace(setting, gpus=gpus, tools_at_once=max(1.0, setting.tools_at_once * gpus / setting.gpus)), source


def _extent(setting: Setting, steps: Sequence[Step], groups: Sequence[Sequence[_Group]], of_prompts: float) -> tuple[int, float, int]:
    """How many GPUs, which share of each step's prompts, and how many steps to simulate."""
    turns, present = sum(group.turns for step in groups for group in step) / len(groups), sum(map(len, groups)) / len(groups)
    sizes = [gpus for gpus in range(setting.gpus, 0, -1) if setting.gpus % gpus == 0 and all(gpus % tp == 0 for tp in setting.tps)]
    least = min(STEPS, len(steps))
    for gpus in sizes:
        part = of_prompts * gpus / setting.gpus / present
        if part < 1.001 and least * turns * part <= TURNS:
            return gpus, min(1.0, part), max(1, min(len(steps), int(TURNS / (turns * part))))
    part = min(1.0, of_prompts * sizes[-1] / setting.gpus / present)
    fit = TURNS / turns
    if part <= fit:
        return sizes[-1], part, int(fit / part)
    filled = FILLED * _running(setting, sizes[-1], steps) / (sum(map(len, steps)) / len(steps))
    return sizes[-1], min(part, max(fit, filled)), 1


def _running(setting: Setting, gpus: int, steps: Sequence[Step]) -> float:
    """Trajectories that run at a time on the degree with most room: limited by slots, or by KV cache with every context half grown."""
    items = [item for step in steps for item in step]
    context = sum(most_kv([item]) for item in items[:: max(1, len(items) // 500)]) / len(items[:: max(1, len(items) // 500)]) / 2
    return max(
        gpus // tp * min(setting.slots, setting.slots if (held := setting.kv_tokens[tp]) is None else held / context)
        for tp in setting.able(items)
    )


def _chosen(groups: Sequence[_Group], number: int) -> set[str]:
    """Choose `number` prompts. Ranked by longest trajectory and cut into equal parts, the first part gives its first prompt, and each other
    part the prompt that brings the running token total closest to the sum of the parts' means. This offsets the weight of the longest."""
    ranked = sorted(groups, key=lambda group: (-group.longest, group.prompt))
    number = max(1, min(number, len(ranked)))
    names: set[str] = set()
    tokens = due = 0.0
    for index in range(number):
        part = ranked[index * len(ranked) // number : (index + 1) * len(ranked) // number]
        due += sum(group.tokens for group in part) / len(part)
        chosen = part[0] if not names else min(part, key=lambda group: abs(tokens + group.tokens - due))
        names.add(chosen.prompt)
        tokens += chosen.tokens
    return names


def _evenly(items: list, number: int) -> list:  # type: ignore[type-arg]
    """`number` of the items, each from the middle of an equal part."""
    number = max(1, min(number, len(items)))
    return [items[int((index + 0.5) * len(items) / number)] for index in range(number)]


def _groups_of(steps: Sequence[Step]) -> list[list[_Group]]:
    return [_groups([(item.prompt_id, len(item.steps), item.output_tokens) for item in step]) for step in steps]


def _groups(items: Sequence[tuple[str, int, int]]) -> list[_Group]:
    """Group (prompt, turns, tokens) of a step's trajectories by prompt."""
    by: Mapping[str, list[tuple[int, int]]] = defaultdict(list)
    for prompt, turns, tokens in items:
        by[prompt].append((turns, tokens))
    return [
        _Group(prompt, len(those), sum(turns for turns, _ in those), sum(tokens for _, tokens in those), max(tokens for _, tokens in those))
        for prompt, those in by.items()
    ]


def _mean_tokens(steps: Sequence[Sequence[_Group]]) -> float:
    every = [group for step in steps for group in step]
    return sum(group.tokens for group in every) / sum(group.trajectories for group in every)
