"""Reads with one importer alone, and breaks good files in every way that JSON allows."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from types import ModuleType
from typing import Any

from hypothesis import strategies as st
from samples import put

from verl_heddle.traces import TraceError, from_dict, to_dict
from verl_heddle.traces.importers.counting import Tally
from verl_heddle.traces.importers.document import documents
from verl_heddle.trajectory import Trajectory

NUMBERS = st.integers(-(2**80), 2**80) | st.floats(-1e300, 1e300) | st.sampled_from([float("nan"), float("inf"), 0, -1, 2**40, 10**400])
WORDS = st.text(max_size=8) | st.sampled_from(["user", "assistant", "tool", "", "nan", "-1", "2024-01-01T00:00:00Z", "9999-12-31T23:59:59"])
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=6,
)


def known_and_read(kind: ModuleType, folder: Path, content: str | bytes, name: str = "file.json") -> tuple[list[Trajectory], Tally]:
    """Its trajectories, each of which fits the schema, of a file that the importer knows."""
    path = put(folder, content, name)
    assert kind.knows(next(documents(path)).value)
    return read(kind, path)


def read(kind: ModuleType, path: Path) -> tuple[list[Trajectory], Tally]:
    """Its trajectories, each of which fits the schema."""
    tally = Tally()
    items = list(kind.read(documents(path), tally))
    assert [from_dict(to_dict(item)) for item in items] == items
    return items, tally


def ends_well(kind: ModuleType, folder: Path, content: str | bytes, name: str = "file.json") -> str | None:
    """None where it is read, else the one line that it ends in."""
    path = put(folder, content, name)
    try:
        kind.knows(next(documents(path)).value)
        read(kind, path)
    except TraceError as error:
        assert "\n" not in str(error) and str(path) in str(error), str(error)
        return str(error)
    return None


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every key of every object and list in it."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, one in inside for place in [(value, key), *_places(one)]]


@st.composite
def wrecked(draw: st.DrawFn, good: Any) -> Any:
    """The same, with up to three values replaced by anything, or gone."""
    value = deepcopy(good)
    for _ in range(draw(st.integers(1, 3))):
        places = _places(value)
        if not places:
            return draw(JSON)
        within, key = draw(st.sampled_from(places))
        if draw(st.booleans()):
            within[key] = draw(JSON)
        else:
            del within[key]
    return value
