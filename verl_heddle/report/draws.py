"""Prepare the steps to simulate, from a trace or a synthetic workload, and the history heddle learns from before them.

Heddle learns from history, which a first epoch lacks; a forecast for a run of many epochs must not judge it on a cold start. So every draw
comes with an epoch `before`:

- generated workload: the same number of other samples of the same prompts, drawn independently;
- trace: the trace itself, cross-fitted. Each prompt's trajectories are split into two halves, and each half is the history of the other
  (`verl_heddle.report.play`). No trajectory is predicted from itself; half a group is less history than a real epoch provides.

Each seed is one draw. For a generated workload it draws different trajectories. For a trace the trajectories are given, and the seed draws
the order in which prompts are submitted (seed 0: as recorded) and the routers' tie-breaks.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from random import Random
from typing import Any

from verl_heddle.traces import WORKLOADS, generate, read, replayable
from verl_heddle.traces.steps import by_step, first_groups, latest, told
from verl_heddle.trajectory import Trajectory

Step = tuple[Trajectory, ...]
"""The trajectories of one RL step, in the order of submission."""


@dataclass(frozen=True, slots=True)
class Draw:
    """One seed's steps, and the steps of the epoch before them. With `crossed`, `before` holds the same trajectories."""

    seed: int
    steps: tuple[Step, ...]
    before: tuple[Step, ...] = ()
    crossed: bool = False
    cap_tokens: int | None = None
    """verl's `response_length`, passed to heddle. For a trace: its longest trajectory if any was truncated. None: unknown."""


@dataclass(frozen=True, slots=True)
class Source:
    """The draws and their origin for reports: `name`, `about` (JSON-ready facts) and `notes` (one line each)."""

    name: str
    draws: tuple[Draw, ...]
    about: dict[str, Any]
    notes: tuple[str, ...] = field(default=())
    gpus: int | None = None
    """GPUs of the whole fleet, if a sample is simulated on part of it (`report.quick`)."""
    sample: str = ""
    """One line that describes the sample; empty: not sampled."""


def generated(workload: str, prompts: int, samples: int, seeds: Sequence[int], cold: bool = False, **parameters: Any) -> Source:
    """Draws of a synthetic workload, `prompts` x `samples` trajectories each, one step; `parameters` as in `traces.generate`.

    Raises:
        TraceError: unknown workload, or a number out of range.
    """
    draws = []
    cap = parameters.get("cap_tokens", WORKLOADS[workload].cap_tokens) if workload in WORKLOADS else None
    for seed in seeds:
        both = generate(workload, prompts, samples if cold else 2 * samples, seed=seed, **parameters)
        now = tuple(item for item in both if int(item.trial) < samples)
        seen = tuple(item for item in both if int(item.trial) >= samples)
        draws.append(Draw(seed, (now,), (seen,) if seen else (), cap_tokens=cap))
    about = {"workload": workload, "trace": None, "steps": 1, "prompts": prompts, "samples": samples}
    history = "none (first epoch)" if cold else "one epoch: other samples of the same prompts"
    return Source(f"{workload} (synthetic)", tuple(draws), about | {"history": history})


def recorded(
    path: str | os.PathLike[str],
    seeds: Sequence[int],
    step: int | None = None,
    prompts: int | None = None,
    samples: int | None = None,
    cold: bool = False,
) -> Source:
    """Draws of a trace: its training steps, or one of them; at most the first `prompts` of a step and the first `samples` of a prompt.

    A trace without step numbers is one step. Of a step recorded more than once (resumed, repeated) only the latest run counts. Validation
    trajectories and those of unknown length or without turns are left out, with a note.

    Raises:
        TraceError: the trace cannot be read, or nothing usable remains.
    """
    skipped: list[str] = []
    return assembled(read(path, skipped.append), skipped, path, seeds, step, prompts, samples, cold)


def assembled(
    items: Iterable[Trajectory],
    torn: Sequence[str],
    path: str | os.PathLike[str],
    seeds: Sequence[int],
    step: int | None = None,
    prompts: int | None = None,
    samples: int | None = None,
    cold: bool = False,
) -> Source:
    """As `recorded`, for trajectories that the caller reads from `path`; `torn` holds the notes of that read once `items` is exhausted."""
    left: Counter[str] = Counter()
    found = by_step(items, _facts, left, str(path), step)
    left["cancelled"] = sum(item.meta.get("outcome") == "cancelled" for trajectories in found.values() for item in trajectories)
    steps = tuple(_limited(latest(list(map(replayable, trajectories)), left), prompts, samples) for trajectories in found.values())
    work = [item for trajectories in steps for item in trajectories]
    cap = max(item.output_tokens for item in work) if any(item.meta.get("truncated") for item in work) else None
    draws = [replace(_shuffled(steps, seed, cold), cap_tokens=cap) for seed in seeds]
    groups = [len({item.prompt_id for item in trajectories}) for trajectories in steps]
    about = {
        "workload": steps[0][0].workload,
        "trace": os.path.basename(os.fspath(path)),
        "steps": len(steps),
        "prompts": round(sum(groups) / len(groups), 1),
        "samples": round(sum(map(len, steps)) / sum(groups), 1),
        "history": "none (first epoch)" if cold else "one epoch: half of each prompt's trajectories is the history of the other half",
    }
    return Source(f"{about['trace']}" + ("" if step is None else f", step {step}"), tuple(draws), about, (*torn, *_notes(left)))


def _facts(item: Trajectory) -> tuple[bool, int | None, bool]:
    known = any(turn.output_tokens is not None for turn in item.steps)
    return bool(item.meta.get("validate")), item.meta.get("step"), known


def _limited(items: list[Trajectory], prompts: int | None, samples: int | None) -> Step:
    """The first of the groups. If a step visited a prompt twice, its trials are renumbered, because the simulator needs unique trials."""
    trials: dict[str, list[str]] = defaultdict(list)
    for item in items:
        trials[item.prompt_id].append(str(item.trial))
    numbers = {name: count() for name, known in trials.items() if len(set(known)) < len(known)}
    kept = first_groups(items, prompts, samples)
    return tuple(replace(item, trial=next(numbers[item.prompt_id])) if item.prompt_id in numbers else item for item in kept)


def _shuffled(steps: tuple[Step, ...], seed: int, cold: bool) -> Draw:
    """Shuffle whole prompts, as a data loader does; seed 0 keeps the recorded order."""
    before = () if cold else steps
    if seed:
        rng = Random(seed)
        shuffled = []
        for step in steps:
            order = list(dict.fromkeys(item.prompt_id for item in step))
            rng.shuffle(order)
            rank = {name: index for index, name in enumerate(order)}
            shuffled.append(tuple(sorted(step, key=lambda item: rank[item.prompt_id])))
        steps = tuple(shuffled)
    return Draw(seed, steps, before, crossed=not cold)


def _notes(left: Counter[str]) -> list[str]:
    cancelled = left.pop("cancelled", 0)
    notes = told(left)
    if cancelled:
        notes.append(f"{cancelled:,} cancelled trajectories are simulated with the length they had reached; their full length is unknown.")
    return notes
