"""What is simulated: steps of trajectories, from a trace or invented, and what heddle has seen before them.

Heddle learns from history, and a first epoch has none; a forecast for a run of many epochs must not judge it cold. So every draw comes with
an epoch `before`:

- a generated workload: as many other samples of the same prompts, drawn independently;
- a trace: the trace itself, cross-fitted. Each prompt's trajectories are dealt into two halves, and what one half did is the history of
  the other (`verl_heddle.report.play`). Nobody is predicted from himself; a history of half a group is less than a real epoch leaves.

A seed is one draw. With a generated workload it draws other trajectories; with a trace these are given, and the seed draws the order in
which prompts are submitted (seed 0: as recorded) and the routers' tie-breaks.
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
    """One seed's steps, and the steps before them. With `crossed`, `before` holds the same trajectories."""

    seed: int
    steps: tuple[Step, ...]
    before: tuple[Step, ...] = ()
    crossed: bool = False
    cap_tokens: int | None = None
    """verl's `response_length`, which heddle is told; of a trace the most that is in it, if any of it was cut; None: not known."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where draws come from, for reports: `name`, `about` (JSON-ready facts) and `notes` (one plain line each)."""

    name: str
    draws: tuple[Draw, ...]
    about: dict[str, Any]
    notes: tuple[str, ...] = field(default=())
    gpus: int | None = None
    """Of a sample that is played on a part of the fleet (`report.quick`): the GPUs of all of it."""
    sample: str = ""
    """What was sampled, in a line; empty: nothing was."""


def generated(workload: str, prompts: int, samples: int, seeds: Sequence[int], cold: bool = False, **parameters: Any) -> Source:
    """Draws of an invented workload, `prompts` x `samples` trajectories each, one step; `parameters` as in `traces.generate`.

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

    A trace without steps is one step; a step that was recorded again (resumed, repeated) counts as in its latest run. Validation and
    trajectories of unknown length or without turns are left out and noted.

    Raises:
        TraceError: the trace cannot be read, or nothing of it is left.
    """
    torn: list[str] = []
    return assembled(read(path, torn.append), torn, path, seeds, step, prompts, samples, cold)


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
    """As `recorded`, of trajectories that somebody else reads from `path`; `torn`: notes that come with them, read when all have come."""
    left: Counter[str] = Counter()
    found = by_step(items, _facts, left, str(path), step)
    left["cancelled"] = sum(item.meta.get("outcome") == "cancelled" for one in found.values() for item in one)
    steps = tuple(_limited(latest(list(map(replayable, one)), left), prompts, samples) for one in found.values())
    work = [item for one in steps for item in one]
    cap = max(item.output_tokens for item in work) if any(item.meta.get("truncated") for item in work) else None
    draws = [replace(_shuffled(steps, seed, cold), cap_tokens=cap) for seed in seeds]
    groups = [len({item.prompt_id for item in one}) for one in steps]
    about = {
        "workload": steps[0][0].workload,
        "trace": os.path.basename(os.fspath(path)),
        "steps": len(steps),
        "prompts": round(sum(groups) / len(groups), 1),
        "samples": round(sum(map(len, steps)) / sum(groups), 1),
        "history": "none (first epoch)" if cold else "one epoch: half of each prompt's trajectories teaches about the other half",
    }
    return Source(f"{about['trace']}" + ("" if step is None else f", step {step}"), tuple(draws), about, (*torn, *_notes(left)))


def _facts(item: Trajectory) -> tuple[bool, int | None, bool]:
    known = any(turn.output_tokens is not None for turn in item.steps)
    return bool(item.meta.get("validate")), item.meta.get("step"), known


def _limited(items: list[Trajectory], prompts: int | None, samples: int | None) -> Step:
    """The first of the groups; trials are numbered anew where a step visited a prompt twice, as the simulator tells them apart by trial."""
    trials: dict[str, list[str]] = defaultdict(list)
    for item in items:
        trials[item.prompt_id].append(str(item.trial))
    anew = {name: count() for name, known in trials.items() if len(set(known)) < len(known)}
    kept = first_groups(items, prompts, samples)
    return tuple(replace(item, trial=next(anew[item.prompt_id])) if item.prompt_id in anew else item for item in kept)


def _shuffled(steps: tuple[Step, ...], seed: int, cold: bool) -> Draw:
    """Whole prompts in another order, as a data loader deals them; seed 0 as recorded."""
    before = () if cold else steps
    if seed:
        rng = Random(seed)
        mixed = []
        for one in steps:
            order = list(dict.fromkeys(item.prompt_id for item in one))
            rng.shuffle(order)
            rank = {name: index for index, name in enumerate(order)}
            mixed.append(tuple(sorted(one, key=lambda item: rank[item.prompt_id])))
        steps = tuple(mixed)
    return Draw(seed, steps, before, crossed=not cold)


def _notes(left: Counter[str]) -> list[str]:
    cancelled = left.pop("cancelled", 0)
    notes = told(left)
    if cancelled:
        notes.append(f"{cancelled:,} cancelled trajectories run as long as they had run; how long they wanted to is not known.")
    return notes
