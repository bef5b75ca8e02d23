"""A path that may be a trace of ours or a file of somebody else's."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

from verl_heddle.traces.importers.counting import Tally
from verl_heddle.traces.importers.document import documents
from verl_heddle.traces.importers.formats import FORMATS, Imported, imported
from verl_heddle.traces.io import Note, read, trace_files
from verl_heddle.traces.schema import TraceError
from verl_heddle.trajectory import Trajectory

OURS = {field.name for field in fields(Trajectory)}


def is_ours(path: str | os.PathLike[str]) -> bool:
    """Whether `read` is to say what is in it: a trace, a folder, or a file that no format knows and that is no other JSON object."""
    place = Path(path)
    if place.is_dir() or not place.is_file():
        return True
    try:
        first = next(documents(place)).value
    except TraceError:
        return True
    if any(one.knows(first) for one in FORMATS.values()):
        return False
    return not isinstance(first, dict) or bool(OURS & first.keys() - {"model", "meta"})


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
