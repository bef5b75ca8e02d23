"""The training steps of a recorded run, each as its latest run recorded it and each trajectory once.

A run that was killed and resumed records the steps after its last checkpoint again: with the same `meta.step`, a later `meta.run`, and
verl's `uid` drawn anew. A trace may hold validation as well, lines copied twice, and trajectories that are no live run's. What does not
count is left out and told, one line for each kind.
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
"""What `meta` must say of a trajectory whose step is to be explained."""


def training_steps(path: str | os.PathLike[str], note: Note = lambda text: None) -> dict[int, list[Trajectory]]:
    """The training trajectories of a live run by step, ascending.

    Args:
        note: told in one line each what was left out, and what was assumed.

    Raises:
        TraceError: there is no such trace, it is damaged, or it holds no training trajectory of a live run; names the first line at fault.
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
                f"it was recorded under trainer_mode={mode}, whose trajectories outlive steps: there is no step to tell of",
                allowed="a synchronous run's; what such a run does is on W&B, heddle/*: docs/async.md",
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
        note(f"{unfit:,} trajectories left out, no live run recorded them: the first is {fault}")
    if endings:
        note(f"{endings:,} trajectories do not say how they ended (meta.outcome); taken as finished.")
    left: Counter[str] = Counter()
    result = {step: latest(items, left) for step, items in sorted(steps.items())}
    for text in told(left):
        note(text)
    return result


def by_step(
    items: Iterable[T], facts: Callable[[T], tuple[bool, int | None, bool]], left: Counter[str], path: str, step: int | None = None
) -> dict[int | None, list[T]]:
    """The training trajectories of a trace by step, ascending, those of no step first; or of one `step`. `left` counts the rest.

    Args:
        facts: of an item, whether it is of validation, its training step, and whether its lengths are known.

    Raises:
        TraceError: there is no such step, or nothing of known length.
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
    """Of a step the first so many prompts, and of each the first so many samples; None: all."""
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
    """One step's trajectories as its latest run recorded them, each once: the last line that tells of it. `left` counts the rest."""
    last = max(_run(item) for item in items)
    kept: dict[object, T] = {}
    for number, item in enumerate(items):
        if _run(item) == last:
            uid = item.meta.get("uid")
            kept[number if uid is None else (str(uid), item.prompt_id, str(item.trial))] = item
    same = sum(_run(item) == last for item in items)
    left["of earlier runs of the same step"] += len(items) - same
    left["told twice, the later line counts"] += same - len(kept)
    return list(kept.values())


def told(left: Counter[str]) -> list[str]:
    """The counts as sentences."""
    return [f"{number:,} trajectories left out: {what}." for what, number in left.items() if number]


def _run(item: Trajectory | Entry) -> str:
    return str(item.meta.get("run", ""))


def _not_live(item: Trajectory, file: str, line: int) -> TraceError | None:
    for name in LIVE:
        if name not in item.meta:
            allowed = "a number, as a live run records it (+plugin=heddle or +plugin=observe)"
            return TraceError("missing", allowed=allowed, field=f"meta.{name}", file=file, line=line)
    if item.meta["end_s"] < item.meta["start_s"]:
        return TraceError(f"got {item.meta['end_s']}", allowed="not before meta.start_s", field="meta.end_s", file=file, line=line)
    return None
