"""Every result has a record of what it was measured on, and every page that shows results says whether that code has changed since."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from bench import provenance
from bench.provenance import (
    CHANGED,
    FOLDER,
    FRESH,
    MEASURES,
    PAGES,
    RECORD,
    UNRECORDED,
    fingerprint,
    line,
    measured_again,
    page,
    record,
    save,
    state,
)

ROOT = Path(__file__).resolve().parents[2]


def test_every_result_has_a_record_and_a_page():
    results = {str(path.relative_to(FOLDER)) for path in FOLDER.rglob("*.json") if path != RECORD}
    ours = {name for name in results if not name.startswith("h200/")}  # measurements on a GPU host name their commit themselves
    assert ours | {"h200/forecast.json"} <= set(MEASURES), "say in bench/provenance.py what a new result measures"
    unrecorded = {name for name in MEASURES if (FOLDER / name).exists() and state(name)[0] == UNRECORDED}
    assert unrecorded == set(), "results are written by `bench.provenance.save`"
    assert {name for names in PAGES.values() for name in names} <= set(MEASURES)
    assert all((ROOT / path).exists() for paths in MEASURES.values() for path in paths)


@pytest.mark.parametrize("name", PAGES)
def test_a_page_says_what_its_numbers_were_measured_on(name):
    assert page(name) == (ROOT / name).read_text(), "run `make docs`"


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """A result `x.json` that measures one module, in a repository of its own."""
    code = tmp_path / "code" / "rule.py"
    code.parent.mkdir()
    code.write_text('"""A rule."""\nK = 1\n')
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    monkeypatch.setattr(provenance, "FOLDER", tmp_path / "results")
    monkeypatch.setattr(provenance, "RECORD", tmp_path / "results" / "measured.json")
    monkeypatch.setattr(provenance, "MEASURES", {"x.json": ("code",)})
    monkeypatch.setattr(provenance, "_git", lambda *words: b"0123456789abcdef\n" if words[0] == "rev-parse" else b"")
    return tmp_path / "results" / "x.json", code


def test_a_result_is_out_of_date_when_the_code_changes_and_not_when_words_do(bench):
    result, code = bench
    save(result, {"speedup": 1.1})
    assert json.loads(result.read_text()) == {"speedup": 1.1} and state("x.json") == (FRESH, "0123456789abcdef")
    assert line(["x.json"]) == "*Measured on commit:* x.json `0123456`."
    code.write_text('"""The rule."""\n\n# why\nK = (1)\n')
    assert state("x.json")[0] == FRESH
    code.write_text("K = 2\n")
    assert state("x.json")[0] == CHANGED and line(["x.json"]).endswith("**The code measured has changed since.**")
    save(result, {"speedup": 1.2})
    assert state("x.json")[0] == FRESH


def test_a_result_holds_for_other_code_that_gives_the_same_rows(bench):
    result, code = bench
    rows = [{"row": number, "speedup": 1.0 + number / 7} for number in range(10)]
    save(result, {"rows": rows})
    code.write_text("K = 2\n")
    asked = []
    measured_again(result, rows, lambda row: asked.append(row) or {**row}, 4)
    assert len(asked) == 4 and state("x.json") == (FRESH, "0123456789abcdef")
    assert line(["x.json"]) == "*Measured on commit:* x.json `0123456` (4 of 10 rows the same on `0123456`)."
    code.write_text("K = 3\n")
    assert state("x.json")[0] == CHANGED, "other code again"
    with pytest.raises(SystemExit, match="is not what it was"):
        measured_again(result, rows, lambda row: {**row, "speedup": row["speedup"] + 1e-12}, 4)
    assert state("x.json")[0] == CHANGED


def test_parts_that_were_kept_leave_a_result_out_of_date(bench):
    result, code = bench
    save(result, [1], kept=True)
    save(result, [1, 2], kept=True)
    assert state("x.json")[0] == FRESH
    code.write_text("K = 2\n")
    save(result, [1, 2, 3], kept=True)
    assert state("x.json")[0] == CHANGED
    save(result, [4])
    assert state("x.json")[0] == FRESH


def test_a_result_written_by_hand_has_no_record(bench):
    result, _ = bench
    save(result, [1])
    result.write_text("[2]")
    assert state("x.json") == (UNRECORDED, "") and "without a record" in line(["x.json"])
    record(result)
    assert state("x.json")[0] == FRESH
    save(result.parent.parent / "elsewhere.json", [3])
    assert list(json.loads(provenance.RECORD.read_text())) == ["x.json"]


def test_what_is_not_there_counts_as_nothing():
    assert fingerprint(["no/such/file.py"]) == fingerprint([])
