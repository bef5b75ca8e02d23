"""A path that may be a trace of ours or a file of somebody else's."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from verl_heddle.traces.importers.counting import Tally
from verl_heddle.traces.importers.document import documents
from verl_heddle.traces.importers.formats import Imported, imported
from verl_heddle.traces.io import Note, read, trace_files
from verl_heddle.trajectory import Trajectory


def is_ours(path: str | os.PathLike[str]) -> bool:
    """Whether it is a trace, a folder of them, or something that only `read` can tell what is wrong with.

    Raises:
        TraceError: the file is neither a trace nor JSON nor CSV.
    """
    place = Path(path)
    if place.is_dir() or not place.is_file():
        return True
    first = next(documents(place), None)
    return first is not None and isinstance(first.value, dict) and {"source", "workload", "steps"} <= first.value.keys()


def trajectories(
    path: str | os.PathLike[str], name: str | None = None, tally: Tally | None = None, note: Note | None = None
) -> tuple[Iterator[Trajectory], Imported | None]:
    """The trajectories of either, and for a foreign file what its import has to say.

    Args:
        name: of the foreign format; None: found out.

    Raises:
        TraceError: as `read` and `imported`.
    """
    if name is None and is_ours(path):
        trace_files(path)
        return read(path, note), None
    found = imported(Path(path), name, tally)
    return found.trajectories, found
