"""Register the formats, detect the format of a file, and import it with a report of exact, estimated and missing values.

`trajectories` reads a path that may be either a heddle trace or another tool's file.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain
from pathlib import Path
from typing import Any

from verl_heddle.traces.importers import (
    claude_code,
    inspect_log,
    mini_swe_agent,
    openai_chat,
    openhands,
    request_traces,
    swe_agent,
    tau2,
    verl_dump,
    weave,
)
from verl_heddle.traces.importers.counting import Tally
from verl_heddle.traces.importers.document import Document, documents
from verl_heddle.traces.io import Note, read
from verl_heddle.traces.schema import TraceError
from verl_heddle.trajectory import Trajectory


@dataclass(frozen=True, slots=True)
class Format:
    """One file format: `knows(value of the first document)`, `read(documents of one file, tally)`. `unique_prompts`: no two trajectories
    share a prompt, so the prompts of a million requests need not be remembered."""

    name: str
    title: str
    knows: Callable[[Any], bool]
    read: Callable[[Iterable[Document], Tally], Iterator[Trajectory]]
    unique_prompts: bool = False


MODULES: Sequence[Any] = (
    swe_agent,
    mini_swe_agent,
    openhands,
    claude_code,
    tau2,
    inspect_log,
    weave,
    verl_dump,
    request_traces,
    openai_chat,
)
"""In detection order: the more specific formats first."""

FORMATS: Mapping[str, Format] = {
    module.NAME: Format(module.NAME, module.TITLE, module.knows, module.read, getattr(module, "UNIQUE_PROMPTS", False))
    for module in MODULES
}


@dataclass
class Imported:
    """A lazy import: the trajectories, and a report that is complete once they are exhausted."""

    format: Format
    trajectories: Iterator[Trajectory]
    tally: Tally
    turns: int = 0
    count: int = 0

    def told(self) -> list[str]:
        """Report lines: what was read, estimated, missing and left out."""
        lines = [f"{self.format.title}: {self.count:,} trajectories, {self.turns:,} turns"]
        if self.tally.known:
            lines.append(f"exact: {_formatted(self.tally.known)}")
        if self.tally.estimated:
            lines.append(f"estimated as characters / 4 (exact with --tokenizer): {_formatted(self.tally.estimated)}")
        if self.tally.missing:
            lines.append(f"missing, left unknown: {_formatted(self.tally.missing)}")
        lines += [f"left out, {why}: {number:,}" for why, number in self.tally.left_out.items()]
        return lines


class UnknownFormatError(TraceError):
    """No format recognises the file; `first`: the value of its first document."""

    def __init__(self, path: Path, first: Any) -> None:
        super().__init__("unknown format", allowed=f"{', '.join(FORMATS)} (--format), or a trace", file=str(path))
        self.first = first


def imported(path: Path, name: str | None = None, tally: Tally | None = None) -> Imported:
    """Start importing a file; trials of a prompt are numbered in file order.

    Args:
        name: the format; None: detected.

    Raises:
        TraceError: unknown format; while iterating: a faulty document.
    """
    if name is not None and name not in FORMATS:
        raise TraceError(f"unknown format {name!r}", allowed=", ".join(FORMATS))
    remaining = documents(path)
    first = next(remaining, None)
    if first is None:
        raise TraceError("a header without rows", allowed="at least one", file=str(path))
    kind = FORMATS[name] if name is not None else next((known for known in FORMATS.values() if known.knows(first.value)), None)
    if kind is None:
        raise UnknownFormatError(path, first.value)
    result = Imported(kind, iter(()), Tally() if tally is None else tally)
    result.trajectories = _numbered(kind.read(chain([first], remaining), result.tally), result, str(path))
    return result


def _numbered(items: Iterator[Trajectory], found: Imported, file: str) -> Iterator[Trajectory]:
    trials: Counter[tuple[str, str]] = Counter()
    for item in _depth_checked(items, file):
        again = 0
        if not found.format.unique_prompts:
            key = (item.prompt_id, str(item.trial))
            again = trials[key]
            trials[key] += 1
        found.count += 1
        found.turns += len(item.steps)
        yield replace(item, trial=again if item.trial == 0 else f"{item.trial}.{again}") if again else item
    if not found.count:
        raise TraceError("no trajectories", allowed="at least one assistant message", file=file)


def _depth_checked(items: Iterator[Trajectory], file: str) -> Iterator[Trajectory]:
    try:
        yield from items
    except RecursionError:
        raise TraceError("nested too deeply", file=file) from None


def _formatted(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {number:,} times" for name, number in counts.most_common())


_TRACE_FIELDS = {field.name for field in fields(Trajectory)} - {"model", "meta"}


def trajectories(
    path: str | os.PathLike[str], name: str | None = None, tally: Tally | None = None, note: Note | None = None
) -> tuple[Iterator[Trajectory], Imported | None]:
    """Read a heddle trace or another tool's file; for the latter also return the `Imported` with its report.

    An unrecognised file goes to `read`, which reports its fault, unless its first object has no trace field: then this raises.

    Args:
        name: the foreign format; None: detected.

    Raises:
        TraceError: as `read` and `imported`.
    """
    place = Path(path)
    if name is not None or place.is_file():
        try:
            found = imported(place, name, tally)
        except UnknownFormatError as error:
            if isinstance(error.first, dict) and not _TRACE_FIELDS & error.first.keys():
                raise
        except TraceError:
            if name is not None:
                raise
        else:
            return found.trajectories, found
    return read(path, note), None
