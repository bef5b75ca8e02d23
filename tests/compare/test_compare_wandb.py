"""The summary on W&B, written offline and read back by wandb itself: `wandb sync` uploads it to a fake server."""

from __future__ import annotations

import json
import shutil

import pytest
from compare_cases import compare
from wandb_server import synced

pytest.importorskip("wandb")


@pytest.fixture(scope="module")
def uploaded(finished, tmp_path_factory):
    folders = list(finished[0].glob("wandb/offline-run-*"))
    assert folders, finished[1].out
    copy = tmp_path_factory.mktemp("wandb") / folders[0].name  # a sync leaves its mark in the folder
    shutil.copytree(folders[0], copy)
    return synced(copy, tmp_path_factory.mktemp("config"))


def test_the_summary_is_in_the_group_of_its_runs(finished, uploaded):
    plan = json.loads((finished[0] / "comparison.json").read_text())
    assert uploaded.about["name"] == plan["summary_id"] and uploaded.about["displayName"] == "cmp-summary"
    assert uploaded.about["groupName"] == "cmp" and uploaded.about["jobType"] == "summary"


def test_numbers_tables_and_plots_arrive(finished, uploaded):
    value = json.loads((finished[0] / "compare.json").read_text())
    found = next(arm for arm in value["arms"] if arm["name"] == "heddle")["speedup"]
    for name in ("value", "low", "high"):
        key = "heddle/speedup" if name == "value" else f"heddle/speedup_{name}"
        assert uploaded.summary[key] == pytest.approx(found[name])
    [row] = [line for line in uploaded.history if "compare/arms" in line]
    assert row["compare/arms"]["_type"] == "table-file" and row["compare/arms"]["nrows"] == 3
    assert row["compare/config_diff"]["nrows"] == 1 and row["compare/report"]["_type"] == "html-file"
    assert {f"compare/{name}_table" for name in ("makespan_s", "reward", "response_tokens", "step_s")} <= set(row)


def test_the_media_files_hold_what_was_logged(finished):
    [folder] = finished[0].glob("wandb/offline-run-*")
    [table] = folder.glob("files/media/table/compare/arms_*.table.json")
    logged = json.loads(table.read_text())
    assert [row[0] for row in logged["data"]] == ["stock", "heddle", "stock_bare"] and logged["columns"][2] == "speedup"
    [page] = folder.glob("files/media/html/compare/report_*.html")
    assert page.read_text() == (finished[0] / "report.html").read_text()


def test_the_terminal_says_how_to_upload(finished):
    assert "W&B: group cmp, summary run cmp-summary" in finished[1].out and "wandb sync" in finished[1].out


def test_without_wandb_nothing_is_lost(tmp_path):
    broken = tmp_path / "wandb.py"
    broken.write_text("raise ImportError('no wandb here')")
    words = ("--out", str(tmp_path / "cmp"), "--pairs", "1", "--steps", "2")
    done = compare(*words, FAKE_STEP_S="0", PYTHONPATH=str(tmp_path))
    assert done.code == 0 and "no summary: pip install wandb" in done.out and (tmp_path / "cmp" / "report.html").exists()
