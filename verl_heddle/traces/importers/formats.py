"""Which formats there are, which one a file has, and its trajectories with a word on what was told, estimated and missing.

A path that may be a trace of ours or a file of somebody else's.
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
    """`knows(value of the first document)`; `read(documents of one file, tally)` gives its trajectories. `one_of_a_kind`: no two of them
    are of one prompt, so that a million of them need not be remembered."""

    name: str
    title: str
    knows: Callable[[Any], bool]
    read: Callable[[Iterable[Document], Tally], Iterator[Trajectory]]
    one_of_a_kind: bool = False


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
"""In the order in which they are asked: the more particular first."""

FORMATS: Mapping[str, Format] = {
    module.NAME: Format(module.NAME, module.TITLE, module.knows, module.read, getattr(module, "ONE_OF_A_KIND", False)) for module in MODULES
}


@dataclass
class Imported:
    """Trajectories as they come, and what can be said of them when they have all come."""

    format: Format
    trajectories: Iterator[Trajectory]
    tally: Tally
    turns: int = 0
    count: int = 0

    def told(self) -> list[str]:
        """One line each: what was understood, estimated, missing."""
        lines = [f"{self.format.title}: {self.count:,} trajectories, {self.turns:,} turns"]
        if self.tally.told:
            lines.append(f"told by the file: {_listed(self.tally.told)}")
        if self.tally.estimated:
            lines.append(f"estimated as characters / 4 (exact with --tokenizer): {_listed(self.tally.estimated)}")
        if self.tally.missing:
            lines.append(f"not told, taken as unknown: {_listed(self.tally.missing)}")
        lines += [f"left out, {why}: {number:,}" for why, number in self.tally.left_out.items()]
        return lines


class UnknownFormatError(TraceError):
    """No format knows the file; `first`: the value of its first document."""

    def __init__(self, path: Path, first: Any) -> None:
        super().__init__("not a format that is known", allowed=f"{', '.join(FORMATS)} (--format), or a trace", file=str(path))
        self.first = first


def imported(path: Path, name: str | None = None, tally: Tally | None = None) -> Imported:
    """Begin to import a file; trials of one prompt are numbered in the order of the file.

    Args:
        name: of the format; None: found out.

    Raises:
        TraceError: unknown format; while iterating: what is wrong with a document.
    """
    if name is not None and name not in FORMATS:
        raise TraceError(f"unknown format {name!r}", allowed=", ".join(FORMATS))
    every = documents(path)
    first = next(every, None)
    if first is None:
        raise TraceError("a header and no rows", allowed="at least one", file=str(path))
    kind = FORMATS[name] if name is not None else next((one for one in FORMATS.values() if one.knows(first.value)), None)
    if kind is None:
        raise UnknownFormatError(path, first.value)
    found = Imported(kind, iter(()), Tally() if tally is None else tally)
    found.trajectories = _numbered(kind.read(chain([first], every), found.tally), found, str(path))
    return found


def _numbered(items: Iterator[Trajectory], found: Imported, file: str) -> Iterator[Trajectory]:
    trials: Counter[tuple[str, str]] = Counter()
    for item in _shallow(items, file):
        again = 0
        if not found.format.one_of_a_kind:
            key = (item.prompt_id, str(item.trial))
            again = trials[key]
            trials[key] += 1
        found.count += 1
        found.turns += len(item.steps)
        yield replace(item, trial=again if item.trial == 0 else f"{item.trial}.{again}") if again else item
    if not found.count:
        raise TraceError("no trajectory in it", allowed="at least one assistant message", file=file)


def _shallow(items: Iterator[Trajectory], file: str) -> Iterator[Trajectory]:
    try:
        yield from items
    except RecursionError:
        raise TraceError("nested too deeply", file=file) from None


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {number:,} times" for name, number in counts.most_common())


OURS = {field.name for field in fields(Trajectory)} - {"model", "meta"}


def trajectories(
    path: str | os.PathLike[str], name: str | None = None, tally: Tally | None = None, note: Note | None = None
) -> tuple[Iterator[Trajectory], Imported | None]:
    """The trajectories of either, and for a foreign file what its import has to say.

    What no format knows and is no other JSON object is left to `read`, which says what is wrong with it.

    Args:
        name: of the foreign format; None: found out.

    Raises:
        TraceError: as `read` and `imported`.
    """
    place = Path(path)
    if name is not None or place.is_file():
        try:
            found = imported(place, name, tally)
        except UnknownFormatError as error:
            if isinstance(error.first, dict) and not OURS & error.first.keys():
                raise
        except TraceError:
            if name is not None:
                raise
        else:
            return found.trajectories, found
    return read(path, note), None
