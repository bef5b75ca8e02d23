"""Extract the training steps of a recorded run: each step from its latest recording, each trajectory once.

A run that was killed and resumed records the steps after its last checkpoint again, with the same `meta.step`, a later `meta.run`, and
new verl `uid`s. A trace may also hold validation, duplicate lines, and trajectories that no live run recorded. Those are left out, and
each kind is reported in one line.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, TypeVar

from verl_heddle.traces.io import Note, placed
from verl_heddle.traces.schema import TraceError
from verl_heddle.trajectory import Trajectory

if TYPE_CHECKING:
    from verl_heddle.traces.index import Entry

T = TypeVar("T", "Trajectory", "Entry")

LIVE = ("step", "start_s", "end_s")
"""Fields that `meta` must have for a trajectory's step to be explained."""


def training_steps(path: str | os.PathLike[str], note: Note = lambda text: None) -> dict[int, list[Trajectory]]:
    """The training trajectories of a live run by step, ascending.

    Args:
        note: receives one line for each kind of data left out or assumed.

    Raises:
        TraceError: the trace is missing, damaged, or without training trajectories of a live run; names the first faulty line.
    """
    steps: dict[int, list[Trajectory]] = defaultdict(list)
    fault: TraceError | None = None
    unfit = endings = 0
    for file, line, item in placed(path, note):
        if item.meta.get("validate"):
            continue
        if (wrong := _not_live(item, file, line)) is not None:
            fault, unfit = fault or wrong, unfit + 1
            continue
        if (mode := item.meta.get("trainer_mode")) is not None:
            raise TraceError(
                f"recorded with trainer_mode={mode}, where trajectories span several steps, so no single step can be analysed",
                allowed="a trace of a synchronous run; for asynchronous runs see heddle/* on W&B and docs/async.md",
                file=file,
                line=line,
            )
        if "outcome" not in item.meta:
            item.meta["outcome"] = "finished"
            endings += 1
        steps[item.meta["step"]].append(item)
    if not steps:
        raise fault or TraceError("no training trajectories", allowed="at least one", file=str(path))
    if unfit:
        note(f"{unfit:,} trajectories left out, not recorded by a live run; the first: {fault}")
    if endings:
        note(f"{endings:,} trajectories have no meta.outcome; assumed finished.")
    left: Counter[str] = Counter()
    result = {step: latest(items, left) for step, items in sorted(steps.items())}
    for text in told(left):
        note(text)
    return result


def by_step(
    items: Iterable[T], facts: Callable[[T], tuple[bool, int | None, bool]], left: Counter[str], path: str, step: int | None = None
) -> dict[int | None, list[T]]:
    """Group the training trajectories of a trace by step, ascending, those without a step first; only `step` if given.

    Args:
        facts: returns whether an item is from validation, its training step, and whether its lengths are known.
        left: counts the items left out, by reason.

    Raises:
        TraceError: there is no such step, or no trajectory of known length.
    """
    found: dict[int | None, list[T]] = defaultdict(list)
    seen: set[int] = set()
    for item in items:
        validates, number, known = facts(item)
        if validates:
            left["validation"] += 1
            continue
        if number is not None:
            seen.add(number)
        if step is not None and number != step:
            continue
        if known:
            found[number].append(item)
        else:
            left["of unknown length"] += 1
    if step is not None and step not in seen:
        has = f"steps {', '.join(map(str, sorted(seen)[:20]))}" if seen else "no steps"
        raise TraceError(f"no training step {step}", allowed=f"this trace has {has}", file=path)
    if not found:
        raise TraceError("no training trajectory of known length", allowed="at least one", file=path)
    return {number: found[number] for number in sorted(found, key=lambda key: -1 if key is None else key)}


def first_groups(items: list[T], prompts: int | None, samples: int | None) -> list[T]:
    """The first `prompts` prompts of a step and the first `samples` samples of each; None: all."""
    if prompts is None and samples is None:
        return items
    names = set(list(dict.fromkeys(item.prompt_id for item in items))[:prompts])
    taken: Counter[str] = Counter()
    kept = []
    for item in items:
        if item.prompt_id in names and (samples is None or taken[item.prompt_id] < samples):
            taken[item.prompt_id] += 1
            kept.append(item)
    return kept


def latest(items: list[T], left: Counter[str]) -> list[T]:
    """One step's trajectories from its latest run, each once: its last line counts. `left` counts the rest by reason."""
    last = max(_run(item) for item in items)
    kept: dict[object, T] = {}
    for number, item in enumerate(items):
        if _run(item) == last:
            uid = item.meta.get("uid")
            kept[number if uid is None else (str(uid), item.prompt_id, str(item.trial))] = item
    same = sum(_run(item) == last for item in items)
    left["of earlier runs of the same step"] += len(items) - same
    left["recorded twice, the later line counts"] += same - len(kept)
    return list(kept.values())


def told(left: Counter[str]) -> list[str]:
    """Format the counts as one sentence per reason."""
    return [f"{number:,} trajectories left out: {what}." for what, number in left.items() if number]


def _run(item: Trajectory | Entry) -> str:
    return str(item.meta.get("run", ""))


def _not_live(item: Trajectory, file: str, line: int) -> TraceError | None:
    for name in LIVE:
        if name not in item.meta:
            allowed = "a number, as recorded by a live run (+plugin=heddle or +plugin=observe)"
            return TraceError("missing", allowed=allowed, field=f"meta.{name}", file=file, line=line)
    if item.meta["end_s"] < item.meta["start_s"]:
        return TraceError(f"got {item.meta['end_s']}", allowed="not before meta.start_s", field="meta.end_s", file=file, line=line)
    return None
