"""bench/regimes: one small cell for real, and the page and picture from made-up cells."""

import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "bench" / "regimes"


@pytest.fixture
def bench(monkeypatch):
    """The benchmark's modules, which are scripts beside each other and no package."""
    monkeypatch.syspath_prepend(str(FOLDER))
    names = ("cells", "reading", "picture")
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    import cells
    import reading

    yield cells, reading
    for name in names:
        sys.modules.pop(name, None)


def test_a_cell(bench):
    cells, _ = bench
    row = cells.measure(cells.Cell("Qwen3-8B", 4, 0.9, 0.3))
    assert row["trajectories"] == 32 and row["draws"] == 6
    assert 1 <= row["best_over_bound"] <= row["stock_over_bound"]
    assert row["heddle_speedup"] == pytest.approx(1.0, abs=0.01)  # a slot for everybody
    assert 0.2 < row["tool_share_stock"] < 0.5


def test_the_map_is_what_was_asked_for(bench):
    cells, _ = bench
    every = list(cells.cells())
    assert len(set(every)) == len(every) == 4 * 5 * 3 * 3 + 4 * 5


def test_page_and_picture(bench, tmp_path):
    cells, reading = bench
    made = {
        "tp": 1,
        "best_tp": 4,
        "stock_over_bound": 2.0,
        "best_over_bound": 1.2,
        "best_speedup": 1.6,
        "best_s": 10.0,
        "heddle_speedup": 1.0,
    }
    made["peers"] = dict.fromkeys(cells.PEERS, 1.11)
    made |= {"heddle_best_speedup": 1.04, "queue_share": 0.0, "stock_s": 16.0, "bound_s": 8.0, "preemptions": 0}
    rows = [vars(cell) | made | {"queue_share": 0.2 if cell.concurrency == 256 else 0.0} for cell in cells.cells()]
    known = {"latency": "made up", "gpu": "h200", "gpus": 8, "slots": 256, "samples": 8, "mean_tokens": 8000, "cap_tokens": 40960}
    known["heddle"] = "priority only"
    known |= {"concurrency": list(cells.CONCURRENCY), "sigmas": list(cells.SIGMAS), "tool_shares": list(cells.TOOL_SHARES)}
    result = {"assumptions": known | {"draws": {"4": 6}}, "cells": rows}
    text = reading.markdown(result)
    assert text.count("\n## ") == 2 + 4 + 1 and "1.60x at the median" in text and "2.00 → 1.20 (4)" in text and "1.00; 1.04" in text
    assert "trajectory-FCFS; ThunderAgent's law:" in text and "| 1.11; 1.11; 1.11 |" in text
    assert "heddle: priority only" in text
    assert "simulated" in text and "nan" not in text
    pytest.importorskip("matplotlib")
    from picture import heat_maps

    heat_maps(result, tmp_path / "map.png")
    assert (tmp_path / "map.png").stat().st_size > 20_000
