"""The JSON: its schema, its documentation, and that its numbers hang together."""

import copy
import json
from pathlib import Path

import pytest
from report_cases import small

from verl_heddle.report.advice import advise, told
from verl_heddle.report.document import document, schema
from verl_heddle.report.draws import generated
from verl_heddle.report.explain import explain
from verl_heddle.report.setting import setting
from verl_heddle.report.study import ranking

DOCS = Path(__file__).resolve().parents[2] / "docs" / "simulate.md"


@pytest.fixture(scope="module")
def documents():
    answer = small()
    planned = ranking(setting("qwen3-8b", "h200", 2, slots=2), generated("search", 4, 4, [0]), 1)
    advice = advise(planned, 1)
    made = [document(answer, explain(answer)), document(planned, told(planned, advice), advice)]
    return [json.loads(json.dumps(one, allow_nan=False)) for one in made]


def test_schema(documents):
    jsonschema = pytest.importorskip("jsonschema")
    checker = jsonschema.Draft202012Validator(schema())
    checker.check_schema(schema())
    for value in documents:
        assert list(checker.iter_errors(value)) == []
    broken = copy.deepcopy(documents[0])
    del broken["arms"][0]["bound_fraction"]
    broken["config"]["surprise"] = 1
    assert len(list(checker.iter_errors(broken))) == 2


def test_every_key_is_documented(documents):
    text = DOCS.read_text()

    def keys(value, skip=("kv_tokens", "settings")):
        if isinstance(value, dict):
            for name, inner in value.items():
                yield name
                if name not in skip and not all(key.isdigit() for key in (inner if isinstance(inner, dict) else {})):
                    yield from keys(inner)
        elif isinstance(value, list):
            for inner in value:
                yield from keys(inner)

    assert [name for name in {key for value in documents for key in keys(value)} if f"`{name}`" not in text] == []


def test_numbers_hang_together(documents):
    for value in documents:
        for arm in value["arms"]:
            assert sum(arm["tail"].values()) == pytest.approx(arm["makespan_s"])
            assert arm["makespan_range_s"][0] <= arm["makespan_s"] <= arm["makespan_range_s"][1]
            assert [one["seed"] for one in arm["seeds"]] == value["config"]["seeds"]
            for one in arm["seeds"]:
                assert one["bound_s"] / one["makespan_s"] == pytest.approx(one["bound_fraction"]) and one["bound_fraction"] <= 1
        stock = value["arms"][0]
        assert stock["throughput_tok_s"] * stock["makespan_s"] == pytest.approx(value["config"]["tokens"])
        assert value["bound"]["makespan_s"] == pytest.approx(max(value["bound"]["longest_s"], value["bound"]["work_s"]))
    assert documents[0]["command"] == "simulate" and "recommendation" not in documents[0]
    assert documents[1]["command"] == "plan" and documents[1]["recommendation"]["overrides"][-1].startswith("+plugin=")
