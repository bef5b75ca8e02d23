"""A path that may be a trace of ours or a file of somebody else's."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

from verl_heddle.traces.importers.counting import Tally
from verl_heddle.traces.importers.formats import Imported, UnknownFormatError, imported
from verl_heddle.traces.io import Note, read
from verl_heddle.traces.schema import TraceError
from verl_heddle.trajectory import Trajectory

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
