"""The reference pages that are written by hand name what the code has: fields of a trace, metrics."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest
from docs_pages import ROOT

from verl_heddle.traces import schema
from verl_heddle.trajectory import Trajectory, Turn

TRACE, METRICS = ROOT / "docs" / "trace.md", ROOT / "docs" / "metrics.md"


def first_column(page: Path, head: str) -> list[str]:
    """Names in the first column of the page's table with this head."""
    rows = page.read_text().partition(f"| {head} |")[2].partition("\n\n")[0].splitlines()[2:]
    return [name for row in rows for name in re.findall(r"`([^`]+)`", row.split("|")[1])]


@pytest.mark.parametrize(
    ("head", "known"),
    [
        ("field", {field.name for field in fields(Trajectory)} - {"meta"}),
        ("field of a step", {field.name for field in fields(Turn)}),
        ("field of `meta`", set(schema._META) | {"trainer_mode"}),  # it may be any name
    ],
)
def test_the_trace_page_names_every_field_and_no_other(head, known):
    assert set(first_column(TRACE, head)) == known


def test_metrics_on_the_page_are_names_in_the_code():
    """The last part of a name, as far as a placeholder, stands in some string of the package; what is built is built of such parts."""
    code = "\n".join(path.read_text() for path in (ROOT / "verl_heddle").rglob("*.py"))

    def known(name: str) -> bool:
        last = re.split(r"[<…]", name.strip("…_"))[0].rstrip("/_").split("/")[-1]
        return bool(re.search(rf"[\"'/_]{re.escape(last.removeprefix('most_').removeprefix('prewarm_'))}(?![a-z])", code))

    names = first_column(METRICS, "metric (`heddle/…`)")
    assert len(names) > 80 and not known("queue_seconds"), "or this test sees nothing"
    assert [name for name in names if not known(name)] == []
