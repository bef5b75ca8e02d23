"""Reads with one importer alone, and breaks good files in every way that JSON allows."""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from pathlib import Path
from types import ModuleType
from typing import Any

from hypothesis import strategies as st
from samples import put

from verl_heddle.traces import TraceError, from_dict, to_dict
from verl_heddle.traces.importers.counting import Tally
from verl_heddle.traces.importers.document import Document, documents
from verl_heddle.trajectory import Trajectory

NUMBERS = st.integers(-(2**80), 2**80) | st.floats(-1e300, 1e300) | st.sampled_from([float("nan"), float("inf"), 0, -1, 2**40, 10**400])
WORDS = st.text(max_size=8) | st.sampled_from(
    ["user", "assistant", "tool", "", "nan", "-1", "2024-01-01T00:00:00Z", "9999-12-31T23:59:59", "\ud800", "type", "text", "role", "id"]
)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=6,
)


def known_and_read(kind: ModuleType, folder: Path, content: str | bytes, name: str = "file.json") -> tuple[list[Trajectory], Tally]:
    """Its trajectories, each of which fits the schema, of a file that the importer knows."""
    path = put(folder, content, name)
    assert kind.knows(next(documents(path)).value) is True
    return read(kind, documents(path))


def read(kind: ModuleType, every: Iterable[Document]) -> tuple[list[Trajectory], Tally]:
    """The trajectories of documents, each of which fits the schema and survives the way through it."""
    tally = Tally()
    items = list(kind.read(every, tally))
    assert [from_dict(to_dict(item)) for item in items] == items
    return items, tally


def ended(kind: ModuleType, *values: Any) -> str | None:
    """The one line that the values of a file end in; None where they are read."""
    return _line(kind, [Document(value, "some/file.jsonl", number + 1) for number, value in enumerate(values)], "some/file.jsonl")


def ends_well(kind: ModuleType, folder: Path, content: str | bytes, name: str = "file.json") -> str | None:
    """The same of a file."""
    path = put(folder, content, name)
    return _line(kind, documents(path), str(path))


def _line(kind: ModuleType, every: Iterable[Document], file: str) -> str | None:
    try:
        found = list(every)
        assert all(kind.knows(document.value) in (True, False) for document in found)
        read(kind, found)
    except TraceError as error:
        assert "\n" not in str(error) and str(error).startswith(file), str(error)
        return str(error)
    return None


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every key of every object and list in it."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, one in inside for place in [(value, key), *_places(one)]]


@st.composite
def wrecked(draw: st.DrawFn, good: Any) -> Any:
    """The same, with up to three values replaced by anything, or gone, or there twice."""
    value = deepcopy(good)
    for _ in range(draw(st.integers(1, 3))):
        places = _places(value)
        if not places:
            return [draw(JSON)]
        within, key = draw(st.sampled_from(places))
        match draw(st.sampled_from(["replace", "replace", "drop", "twice"])):
            case "replace":
                within[key] = draw(JSON)
            case "drop":
                del within[key]
            case "twice" if isinstance(within, list):
                within.insert(key, deepcopy(within[key]))
    return value
