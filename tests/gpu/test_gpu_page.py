"""Schema and page: a rehearsal is never shown as a GPU figure, and what was not measured says so."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from bench.gpu import one, page, results

ROW = {"name": "decode, batch 1", "unit": "ms", "predicted": 5.0, "measured": None, "error": None, "detail": {}}
FORECAST = {
    "schema": 1,
    "kind": "forecast",
    "profile": "h200",
    "made": "2026-01-01T00:00:00+00:00",
    "commit": "0" * 40,
    "experiments": [
        {"experiment": "tau", "title": "Steps", "caveats": ["Steps alone."], "source": "the table", "settings": {}, "rows": [ROW]},
        {
            "experiment": "smoke",
            "title": "Engine",
            "caveats": [],
            "source": "hope",
            "settings": {},
            "rows": [ROW | {"unit": "yes", "predicted": 1}],
        },
    ],
}
RESULT = {
    "schema": 1,
    "experiment": "tau",
    "title": "Steps",
    "kind": "measured",
    "profile": "h200",
    "status": "done",
    "commit": "1" * 40,
    "versions": {"vllm": "0.24.0", "torch": "2.11.0+cu130"},
    "device": {"type": "cuda", "name": "NVIDIA H200", "clocks": {"clocks.sm": "1980 MHz"}},
    "settings": {},
    "seeds": [0],
    "caveats": ["Steps alone."],
    "prediction": {"made": "2026-01-02T00:00:00+00:00", "source": "the table"},
    "rows": [ROW | {"measured": 6.25, "error": -0.2}],
    "detail": {},
    "error": None,
    "started": "2026-01-02T00:00:00+00:00",
    "finished": "2026-01-02T00:01:00+00:00",
    "wall_s": 60.0,
    "deadline_s": 90.0,
}


def wrong(change) -> list[str]:
    document = copy.deepcopy(RESULT)
    change(document)
    return list(results.problems(document))


def test_the_schema_takes_results_and_forecasts():
    assert not list(results.problems(FORECAST))
    assert not list(results.problems(RESULT))
    rehearsal = RESULT | {"kind": "rehearsal", "profile": "rehearsal", "device": {"type": "cpu", "name": "2 cores", "clocks": {}}}
    assert not list(results.problems(rehearsal))


@pytest.mark.parametrize(
    "change",
    [
        lambda one: one["device"].update(type="cpu"),  # measured, on no GPU
        lambda one: one.update(profile="rehearsal"),  # measured, with the rehearsal's sizes
        lambda one: one.update(kind="rehearsal"),  # a rehearsal under the profile of the GPU
        lambda one: one.update(status="failed"),  # failed without an error
        lambda one: one.update(status="perhaps"),
        lambda one: one.pop("prediction"),
        lambda one: one["rows"][0].pop("predicted"),
        lambda one: one["rows"][0].update(unit="furlongs"),
        lambda one: one.update(extra=1),
    ],
)
def test_the_schema_refuses(change):
    assert wrong(change)


def folder(tmp_path: Path, *documents: dict) -> Path:
    for document in documents:
        name = "forecast" if document["kind"] == "forecast" else document["experiment"]
        (tmp_path / f"{name}.json").write_text(json.dumps(document))
    return tmp_path


def test_rows_never_measured_say_so(tmp_path):
    text = page.render(*page.gather(folder(tmp_path, FORECAST)))
    assert page.NONE_YET in text
    assert "| decode, batch 1 | 5.00 ms | not measured |  |" in text
    assert text.count(page.NOT_MEASURED) == 2


def test_a_measurement_stands_beside_its_prediction(tmp_path):
    text = page.render(*page.gather(folder(tmp_path, FORECAST, RESULT)))
    assert page.NONE_YET not in text
    assert "| decode, batch 1 | 5.00 ms | 6.25 ms | -20 % |" in text
    assert "NVIDIA H200 (clocks.sm 1980 MHz)" in text and "vllm 0.24.0" in text and "`111111111111`" in text
    assert text.count(page.NOT_MEASURED) == 1  # the other experiment's


def test_a_cut_result_shows_what_it_has_and_says_that_it_was_cut(tmp_path):
    rows = [RESULT["rows"][0], ROW | {"name": "decode, batch 2"}]
    text = page.render(*page.gather(folder(tmp_path, FORECAST, RESULT | {"status": "cut", "error": "deadline", "rows": rows})))
    assert "cut by its deadline" in text and "| decode, batch 2 | 5.00 ms | not measured |" in text


def test_a_rehearsal_among_the_results_is_an_error(tmp_path):
    rehearsal = RESULT | {"kind": "rehearsal", "profile": "rehearsal", "device": {"type": "cpu", "name": "2 cores", "clocks": {}}}
    with pytest.raises(ValueError, match="does not belong here"):
        page.gather(folder(tmp_path, FORECAST, rehearsal))


def test_what_is_committed_fits_and_the_page_is_current():
    forecast, found = page.gather(page.FOLDER)
    assert [entry["experiment"] for entry in forecast["experiments"]] == list(one.NAMES)
    assert page.PAGE.read_text() == page.render(forecast, found)
    for entry in forecast["experiments"]:
        assert entry["rows"] and all(row["measured"] is None for row in entry["rows"])
