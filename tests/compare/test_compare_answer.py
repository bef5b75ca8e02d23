"""What a comparison says: the JSON against its schema, its documentation and the runs' own files; the sentences against the numbers."""

from __future__ import annotations

import copy
import json
from collections import defaultdict
from pathlib import Path
from statistics import mean
from types import SimpleNamespace

import pytest
from compare_cases import compare

from verl_heddle.compare.document import schema
from verl_heddle.traces import read

DOCS = Path(__file__).resolve().parents[2] / "docs" / "compare.md"


@pytest.fixture(scope="module")
def value(finished):
    return json.loads((finished[0] / "compare.json").read_text())


def arm(value, name):
    return next(one for one in value["arms"] if one["name"] == name)


def makespans(out: Path, pair: int, name: str) -> dict[int, float]:
    """Straight from the trace, by its own definition."""
    spans = defaultdict(list)
    for item in read(out / "runs" / f"p{pair}-{name}" / "heddle" / "trace.jsonl"):
        spans[item.meta["step"]] += [item.meta["start_s"], item.meta["end_s"]]
    return {step: max(times) - min(times) for step, times in spans.items()}


def test_schema(value):
    jsonschema = pytest.importorskip("jsonschema")
    checker = jsonschema.Draft202012Validator(schema())
    checker.check_schema(schema())
    assert list(checker.iter_errors(value)) == []
    broken = copy.deepcopy(value)
    del broken["arms"][0]["bound_fraction"]
    broken["config"]["surprise"] = 1
    assert len(list(checker.iter_errors(broken))) == 2


def test_every_key_is_documented(value):
    text = DOCS.read_text()

    def keys(part):
        if isinstance(part, dict):
            for name, inner in part.items():
                yield name
                if name not in ("decisions", "outcomes", "fallbacks", "values"):
                    yield from keys(inner)
        elif isinstance(part, list):
            for inner in part:
                yield from keys(inner)

    assert [name for name in sorted(set(keys(value))) if f"`{name}`" not in text] == []


def test_the_ratio_is_that_of_the_traces_without_the_first_steps(finished, value):
    stock = [took for pair in (1, 2) for step, took in makespans(finished[0], pair, "stock").items() if step > 1]
    heddle = [took for pair in (1, 2) for step, took in makespans(finished[0], pair, "heddle").items() if step > 1]
    found = arm(value, "heddle")["speedup"]
    assert found["value"] == pytest.approx(sum(stock) / sum(heddle)) and found["steps"] == len(stock) == 6
    assert found["low"] <= found["value"] <= found["high"]
    assert arm(value, "heddle")["makespan_s"] == pytest.approx(mean(heddle))
    assert [row["pair"] for row in found["by_pair"]] == [1, 2]


def test_the_twins_number_stands_beside_the_measured_one(finished, value):
    twin = {"steps": 4, "speedup": pytest.approx(1.25), "error": 0.02}
    assert arm(value, "stock")["twin"] == arm(value, "heddle")["twin"] == twin, "steps 2 and 3 of 4 in two pairs; of the last nobody tells"
    assert arm(value, "stock_bare")["twin"] is None
    line = next(line for line in value["explanation"] if "twin" in line)
    measured = arm(value, "heddle")["speedup"]["value"]
    assert "1.25x inside stock (4 steps, 2 % error on real steps) and 1.25x inside heddle" in line
    assert f"measured between arms: {measured:.2f}x (heddle)" in line and line in finished[1].out


def test_numbers_hang_together(value):
    for one in value["arms"]:
        if one["bare"]:
            assert one["speedup"] is None and one["makespan_s"] is None and one["step_ratio"]["value"] == pytest.approx(1.0)
            continue
        assert sum(one["split"].values()) == pytest.approx(one["makespan_s"], rel=0.01)
        assert 0 < one["bound_fraction"] <= 1.0 and one["outcomes"] == {"finished": 2 * 3 * 24}
    assert arm(value, "stock")["prediction"] is None
    guess = arm(value, "heddle")["prediction"]
    assert 0.5 < guess["rank"] <= 1 and 1.2 < guess["factor"] < 2.0 and 0.5 < guess["covered"] <= 1, (
        "the fake's guesses are off by 0.6 in log"
    )
    assert arm(value, "heddle")["decisions"] == {
        "oracle": pytest.approx(sum(s["turns"] for r in value["runs"] if r["arm"] == "heddle" for s in r["steps"] if s["counts"]))
    }
    assert value["engines"] == value["engines"] | {"tp": 1, "slots": 4, "replicas": 2, "assumed": []}
    assert value["engines"]["median_error"] < 0.15, "the law the fake obeys is found again"
    diff = {row["key"]: row["values"] for row in value["config_diff"]}
    assert diff == {"actor_rollout_ref.rollout.scheduling_policy": {"stock": "fcfs", "heddle": "priority", "stock_bare": "fcfs"}}


def test_the_calibrated_bound_is_near_the_true_one(finished):
    """The fake's step times are known, so the bound that a calibration from its trace gives can be held against the true one."""
    from fake_trainer import LATENCY, SLOTS

    from verl_heddle.compare.measure import traced_steps
    from verl_heddle.report.recorded import Machine, engines_of, machine

    steps = traced_steps(finished[0] / "runs" / "p1-stock")
    engines = engines_of(steps[2])
    assert engines.slots == SLOTS
    fitted, true = machine([steps[2], steps[3], steps[4]], engines), Machine(engines, LATENCY, (1,))
    for number in (2, 3, 4):
        assert fitted.bound(steps[number]).makespan_s == pytest.approx(true.bound(steps[number]).makespan_s, rel=0.1)
        assert true.replayed(steps[number]).makespan_s == pytest.approx(makespans(finished[0], 1, "stock")[number], rel=0.02)


def test_sentences_follow_the_numbers(finished, value):
    found = arm(value, "heddle")["speedup"]
    verdict = {"faster": "faster", "slower": "slower", "unclear": "no difference beyond chance"}[found["verdict"]]
    assert value["explanation"][0].startswith(f"heddle's rollouts run at {found['value']:.2f}x") and value["explanation"][0].endswith(
        f": {verdict}."
    )
    assert any("stock_bare has no trace" in line for line in value["explanation"])
    assert any("rest on 2 pairs" in line for line in value["notes"])
    assert all(line in finished[1].out for line in value["explanation"])


def test_tools_that_set_the_pace_are_named():
    from verl_heddle.compare.bootstrap import Ratio
    from verl_heddle.compare.findings import not_helped

    def made(name, tool_s):
        split = {"queue_s": 0.1, "generate_s": 2.0, "tool_s": tool_s, "other_s": 0.9, "late_start_s": 0.0}
        known = {"split": split, "median": lambda key: 0.002, "prediction": None, "total": lambda start: {}}
        return SimpleNamespace(arm=SimpleNamespace(name=name, bare=False), headline=Ratio(1.0, 0.9, 1.1, ((1, 1.0),), 3), **known)

    for tool_s, dominate in ((27.0, True), (1.0, False)):
        arms = {name: made(name, tool_s) for name in ("stock", "heddle")}
        said = not_helped(SimpleNamespace(arms=arms, base=arms["stock"], others=[arms["heddle"]]))
        assert ("In stock the last trajectory to end spends 90 % of its time in tools: no order helps there." in said) == dominate
        assert ("Faster tools" in said[-1]) == dominate and ("Tensor parallelism" in said[-1]) != dominate


def test_what_did_not_help_is_said(tmp_path):
    out = tmp_path / "cmp"
    done = compare(
        "--out",
        str(out),
        "--pairs",
        "1",
        "--steps",
        "3",
        "--no-wandb",
        "--no-heddle",
        "--arm",
        "same: +plugin=observe x=1",
        FAKE_STEP_S="0",
    )
    assert done.code == 0, done.err
    value = json.loads((out / "compare.json").read_text())
    assert arm(value, "same")["speedup"]["value"] == pytest.approx(1.0) and arm(value, "same")["speedup"]["verdict"] == "unclear"
    assert value["did_not_help"][0].startswith("same showed no difference beyond chance from stock: 1.00x")
