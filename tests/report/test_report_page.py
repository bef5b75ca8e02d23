"""The page: stands alone, escapes what it is given, and looks right in a real browser on a phone and a desk, light and dark."""

import json
import re
import subprocess
from dataclasses import replace
from html import escape, unescape
from html.parser import HTMLParser

import pytest
from report_cases import chromium, lived, small, trace

from verl_heddle.report.advice import advise, told
from verl_heddle.report.draws import generated, recorded
from verl_heddle.report.explain import explain
from verl_heddle.report.figure import pictured, scenes
from verl_heddle.report.page import page, ticks
from verl_heddle.report.setting import setting
from verl_heddle.report.study import ranking, study

pytest.importorskip("jinja2")

FLAGS = [f"--disable-{part}" for part in ("gpu", "quic", "background-networking", "component-update", "sync")]
FLAGS += ["--headless", "--no-sandbox", "--no-first-run", "--hide-scrollbars", "--enable-logging=stderr"]

PROBE = """
<script>
addEventListener("error", e => document.title = "ERROR " + e.message);
addEventListener("load", () => {
  const wide = [...document.querySelectorAll("body *")].filter(e => {
    const box = e.getBoundingClientRect();
    return box.width > 0 && getComputedStyle(e).display != "none" && (box.right > innerWidth + 1 || box.left < -1);
  });
  const images = [...document.images];
  const overlap = [...document.querySelectorAll(".axis")].flatMap(axis => {
    const marks = [...axis.children].map(e => e.getBoundingClientRect());
    return marks.filter((box, k) => k && box.left < marks[k - 1].right);
  }).length;
  const body = getComputedStyle(document.body);
  document.documentElement.setAttribute("data-probe", JSON.stringify({
    width: innerWidth, scroll: document.documentElement.scrollWidth, wide: wide.slice(0, 5).map(e => e.outerHTML.slice(0, 120)),
    overlap, images: images.length, broken: images.filter(i => !i.complete || !i.naturalWidth).length, background: body.backgroundColor,
    rows: document.querySelectorAll("tbody tr").length, clipped: [...document.querySelectorAll(".axis span, .flag")].filter(e =>
      e.scrollWidth > e.clientWidth + 1).length,
  }));
});
</script>
"""


class Parts(HTMLParser):
    """Tags and the attributes that could load something."""

    def __init__(self):
        super().__init__()
        self.tags, self.links = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]


@pytest.fixture(scope="module")
def html():
    answer = small(seeds=(0, 1))
    return page(answer, explain(answer), scenes(answer, pictured(answer)), "verl-heddle simulate --workload search")


@pytest.fixture(scope="module")
def plan_html():
    answer = ranking(setting("qwen3-8b", "h200", 2, slots=2), generated("search", 4, 4, [0]), 1)
    advice = advise(answer, 1)
    return page(answer, told(answer, advice), scenes(answer, ["stock", advice.row.name]), "", advice)


def test_stands_alone(html, plan_html):
    for text in (html, plan_html):
        parts = Parts()
        parts.feed(text)
        assert "script" not in parts.tags and all(link.startswith("data:") for link in parts.links)
        assert not re.search(r"url\(|@import|https?://", re.sub(r"data:[^\"]*", "", text))
        assert len(text) < 3_000_000


def test_says_what_the_text_says(html, plan_html):
    assert "no schedule on these 4 GPUs" in html and "lpt_oracle" in html and "AIConfigurator" in html
    assert "actor_rollout_ref.rollout.tensor_model_parallel_size=" in plan_html and "+plugin=" in plan_html


def test_names_from_a_trace_are_escaped(tmp_path):
    work = [replace(lived(f"<script>alert({k})</script>", s, (20, 30)), workload="<b>x</b>") for k in range(3) for s in range(2)]
    answer = study(setting("qwen3-8b", "h200", 1), recorded(trace(tmp_path, work, "<img src=x>.jsonl"), [0]), (), 1)
    text = page(answer, explain(answer), scenes(answer, ["stock"]))
    assert "<script" not in text and text.count("<b>") == 3  # the three tiles
    assert "<img src=x>" not in text and "&lt;img src=x&gt;" in text


@pytest.mark.parametrize("end", [0.004, 0.9, 3.93, 10, 312, 999, 5e5])
def test_ticks_are_few_and_round(end):
    marks = ticks(end, " s")
    assert 2 < len(marks) < 8 and marks[0]["text"] == "0 s" and all(0 <= mark["at"] <= 100 for mark in marks)
    assert len({mark["text"] for mark in marks}) == len(marks)


def browse(folder, text, width, scheme):
    """Load the page in a browser; what the probe saw, and what the console said.

    In a frame of that width, as a headless window is at least 500 wide.
    """
    without_policy = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    inner = escape(without_policy.replace("</body>", PROBE + "</body>"), quote=True)
    take = "document.documentElement.dataset.probe = document.querySelector('iframe').contentDocument.documentElement.dataset.probe"
    file = folder / "frame.html"
    frame = f'<iframe style="width:{width}px;height:2000px;border:0" srcdoc="{inner}"></iframe>'
    head = '<meta charset="utf-8"><meta name="color-scheme" content="light dark">'
    file.write_text(f"<!doctype html>{head}<body>{frame}<script>onload = () => {{ {take} }}</script></body>", encoding="utf-8")
    window = [f"--blink-settings=preferredColorScheme={scheme}", "--window-size=1400,2100"]
    words = [chromium(), *FLAGS, f"--user-data-dir={folder / 'profile'}", *window, "--dump-dom", f"file://{file}"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    probe = re.search(r'<html[^>]* data-probe="([^"]*)"', done.stdout)
    assert probe, done.stderr[-2000:]
    return json.loads(unescape(probe.group(1))), [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.parametrize(("width", "scheme"), [(390, 0), (390, 1), (1280, 0), (1280, 1)])
def test_in_a_browser(html, plan_html, tmp_path, width, scheme):
    for name, text in (("simulate", html), ("plan", plan_html)):
        folder = tmp_path / name
        folder.mkdir()
        seen, console = browse(folder, text, width, scheme)
        assert console == [] and seen["width"] == width
        assert seen["scroll"] <= width and seen["wide"] == []
        assert seen["images"] > 0 and seen["broken"] == 0 and seen["rows"] > 2 and seen["clipped"] == 0 and seen["overlap"] == 0
        assert seen["background"] == ("rgb(20, 23, 28)" if scheme == 0 else "rgb(255, 255, 255)")


def test_policy_lets_the_page_through(html, tmp_path):
    """With its own content policy in force nothing is blocked."""
    file = tmp_path / "page.html"
    file.write_text(html, encoding="utf-8")
    words = [chromium(), *FLAGS, f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run([*words, "--dump-dom", f"file://{file}"], capture_output=True, text=True, timeout=60)
    assert "</html>" in done.stdout and "CONSOLE" not in done.stderr
