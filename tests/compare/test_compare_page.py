"""The comparison's page: stands alone, escapes, and looks right in a real browser on a phone and a desk, light and dark."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "report"))
from test_report_page import Parts, browse

from verl_heddle.compare.outcome import write
from verl_heddle.compare.plan import read_plan


@pytest.fixture(scope="module")
def html(finished):
    return (finished[0] / "report.html").read_text()


def test_stands_alone(html):
    parts = Parts()
    parts.feed(html)
    assert "script" not in parts.tags and all(link.startswith("data:") for link in parts.links)
    assert not re.search(r"url\(|@import|https?://", re.sub(r"data:[^\"]*", "", html)) and len(html) < 2_000_000


def test_every_part_is_there(html):
    headings = re.findall(r"<h2>([^<]*)</h2>", html)
    for wanted in (
        "What came out",
        "Speed ratio",
        "Where the seconds of each step went",
        "Curves",
        "Replicas over time",
        "Prediction quality",
        "Decisions and outcomes",
        "Configuration: what differs",
        "Runs",
        "What was compared",
    ):
        assert wanted in headings
    assert html.count('<i class="generate" style="height') == 2 * 4, "a column per step and traced arm"
    assert html.count("<polyline") == 2 * 3 + 4 * (3 * 3), (
        "a thick line an arm and a thin one a run; the makespan has two arms, all else three"
    )
    assert html.count("data:image/png") == 2 * 2 and "lower bound" in html


def test_names_are_escaped(finished, tmp_path):
    from dataclasses import replace

    out = finished[0]
    plan = replace(read_plan(out), name="<img src=x>", command=("<script>alert(1)</script>",))
    for name in ("compare.json", "report.html"):
        (tmp_path / name).write_bytes((out / name).read_bytes())
    try:
        write(plan, out, 1, None, "<b>shell</b>")
        text = (out / "report.html").read_text()
    finally:
        for name in ("compare.json", "report.html"):
            (out / name).write_bytes((tmp_path / name).read_bytes())
    assert "<script" not in text and "<img src=x>" not in text and "<b>shell" not in text and "&lt;img src=x&gt;" in text


@pytest.mark.parametrize(("width", "scheme"), [(390, 0), (390, 1), (1280, 0), (1280, 1)])
def test_in_a_browser(html, tmp_path, width, scheme):
    seen, console = browse(tmp_path, html, width, scheme)
    assert console == [] and seen["width"] == width
    assert seen["scroll"] <= width and seen["wide"] == []
    assert seen["images"] == 2 and seen["broken"] == 0 and seen["rows"] > 10 and seen["clipped"] == 0 and seen["overlap"] == 0
    assert seen["background"] == ("rgb(20, 23, 28)" if scheme == 0 else "rgb(255, 255, 255)")
