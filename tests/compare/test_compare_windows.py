"""Asynchronous trainers compared: by tokens trained on per second, from what the runs logged of the windows between their batches."""

from __future__ import annotations

import copy
import json
import re

import pytest
from compare_cases import FAKE, compare

from verl_heddle.compare.document import schema


@pytest.fixture(scope="module")
def asynchronous(tmp_path_factory):
    """(folder, what the call left): stock, heddle and bare verl, 2 pairs of 4 steps, each a window."""
    out = tmp_path_factory.mktemp("compare") / "cmp"
    command = (*FAKE, "trainer.v1.trainer_mode=colocate_async")
    return out, compare("--out", str(out), "--pairs", "2", "--steps", "4", "--stock-bare", command=command, FAKE_STEP_S="0")


@pytest.fixture(scope="module")
def value(asynchronous):
    return json.loads((asynchronous[0] / "compare.json").read_text())


def logged(out, arm):
    """What counts of the arm's runs, straight from verl's own file."""
    lines = [json.loads(line) for pair in (1, 2) for line in (out / f"runs/p{pair}-{arm}/metrics.jsonl").read_text().splitlines()]
    return [line["data"] for line in lines if line["step"] > 1]


def test_the_ratio_is_of_seconds_per_token_trained_on(asynchronous, value):
    cost = {
        arm: sum(row["heddle/window_s"] / row["heddle/trained/tokens"] for row in logged(asynchronous[0], arm))
        for arm in ("stock", "heddle")
    }
    heddle = next(arm for arm in value["arms"] if arm["name"] == "heddle")
    assert heddle["trained_ratio"]["value"] == pytest.approx(cost["stock"] / cost["heddle"]) and heddle["trained_ratio"]["steps"] == 6
    assert heddle["speedup"] is None and heddle["makespan_s"] is None and heddle["split"] is None, "there is no makespan"
    rows = logged(asynchronous[0], "heddle")
    rate = sum(row["heddle/trained/tokens"] for row in rows) / sum(row["heddle/window_s"] for row in rows)
    assert heddle["windows"]["trained_tokens_per_s"] == pytest.approx(rate)
    assert heddle["validation"] == 0.25 and 0 < heddle["windows"]["dropped_share"] < 1 < heddle["windows"]["window_s"]


def test_bare_verl_is_known_by_its_own_clock(value):
    bare = next(arm for arm in value["arms"] if arm["name"] == "stock_bare")
    assert bare["trained_ratio"] is None and bare["windows"] is None and bare["step_ratio"]["value"] == pytest.approx(1.0)
    assert any("stock_bare has no trace" in line for line in value["explanation"])


def test_it_is_told_in_words_and_a_table(asynchronous, value):
    found = next(arm for arm in value["arms"] if arm["name"] == "heddle")["trained_ratio"]
    assert value["explanation"][0].startswith(f"heddle trains on {found['value']:.2f}x (95 % interval")
    assert all(line in asynchronous[1].out for line in value["explanation"])
    assert (
        "trained tokens/s" in asynchronous[1].out
        and "makespan" not in asynchronous[1].out
        and "Validation: 0.250 (stock)" in asynchronous[1].out
    )
    assert "of 4: trained on" in asynchronous[1].err, "progress has no rollout to tell of"
    assert "verl-heddle explain" not in asynchronous[1].out, "it would refuse"


def test_schema(value):
    jsonschema = pytest.importorskip("jsonschema")
    checker = jsonschema.Draft202012Validator(schema())
    assert list(checker.iter_errors(value)) == []
    broken = copy.deepcopy(value)
    del broken["arms"][0]["windows"]["age_steps"]
    assert list(checker.iter_errors(broken))


def test_the_page_shows_windows(asynchronous):
    html = (asynchronous[0] / "report.html").read_text()
    headings = re.findall(r"<h2>([^<]*)</h2>", html)
    assert "Speed ratio" in headings and "Where the seconds of each step went" not in headings and "Replicas over time" not in headings
    assert "window between batches" in html and "tokens trained on per second" in html and "of bound" not in html
    assert html.count('<i class="paused" style="width') == 2, "the traced arms' bars"
