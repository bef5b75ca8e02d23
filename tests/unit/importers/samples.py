"""Runs one importer over text, as a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from verl_heddle.traces import TraceError, from_dict, to_dict
from verl_heddle.traces.importers import Imported, imported
from verl_heddle.trajectory import Trajectory


def lines(*values: Any) -> str:
    """JSON Lines."""
    return "".join(json.dumps(value) + "\n" for value in values)


def put(folder: Path, content: str | bytes, name: str = "file.jsonl") -> Path:
    """Write it."""
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def taken(folder: Path, content: str | bytes, kind: str, name: str = "file.jsonl") -> tuple[list[Trajectory], Imported]:
    """Its trajectories, the format found out; every one of them fits the trace schema and survives the way through it."""
    path = put(folder, content, name)
    result = imported(path)
    assert result.format.name == kind, result.format
    items = list(result.trajectories)
    assert [from_dict(to_dict(item)) for item in items] == items
    return items, result


def fault(folder: Path, content: str | bytes, kind: str | None = None, name: str = "file.jsonl") -> str:
    """The one line that it ends in."""
    path = put(folder, content, name)
    try:
        list(imported(path, kind).trajectories)
    except TraceError as error:
        assert "\n" not in str(error) and str(path) in str(error), str(error)
        return str(error)
    raise AssertionError("it was read")
