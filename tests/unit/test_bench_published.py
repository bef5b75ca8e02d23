"""The bench of published benchmarks: a row's units, its admission, its sources; forecasts against the table in closed form."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from bench.published.run import ALL, BENCHMARKS, MS, OUTPUT, forecast, summary, table
from verl_heddle.latency import HOST_STEP_S, load

ROWS = BENCHMARKS["rows"]
ALONE = {
    **{"source": "qwen3", "model": "Qwen3-8B", "gpu": "H100", "tp": 1, "weights": "bf16", "kv": "bf16", "engine": "vLLM", "slots": 1},
    **{"inputs": 300, "outputs": 400, "requests": 3, "utilization": 0.9, "measured": 1.0, "unit": MS},
}


def test_rows_are_complete_and_cover_what_was_asked_for():
    assert {row["source"] for row in ROWS} == set(BENCHMARKS["sources"]) and {row["unit"] for row in ROWS} == {OUTPUT, ALL, MS}
    assert all(source["url"].startswith("https://") for source in BENCHMARKS["sources"].values())
    assert all(set(ALONE) <= set(row) and row["measured"] > 0 for row in ROWS)
    assert len({(row["model"], row["gpu"]) for row in ROWS}) >= 5 and len({row["gpu"] for row in ROWS}) >= 4


def test_one_request_at_a_time_takes_the_steps_of_the_table():
    latency = load("H100", "Qwen3-8B")
    step = latency.decode_s(1, 1, 300 + 400 / 2) + HOST_STEP_S
    made = forecast(ALONE)
    assert made["forecast"] == pytest.approx(1e3 * step, rel=0.01) and made["times"] == "table"
    whole = latency.prefill_s(1, 300) + HOST_STEP_S + 399 * step
    assert forecast(ALONE | {"unit": OUTPUT})["forecast"] == pytest.approx(400 / whole, rel=0.01)
    assert forecast(ALONE | {"unit": ALL})["forecast"] == pytest.approx(700 / whole, rel=0.01)


@given(st.sampled_from([OUTPUT, ALL, MS]), st.floats(0.2, 5.0))
def test_an_error_is_of_throughput_whatever_the_unit(unit, factor):
    exact = forecast(ALONE | {"unit": unit})["forecast"]
    slower_engine = exact * factor if unit == MS else exact / factor
    assert forecast(ALONE | {"unit": unit, "measured": slower_engine})["error"] == pytest.approx(factor - 1, abs=1e-9)


def test_without_a_limit_as_many_run_as_are_never_evicted():
    made = forecast(ALONE | {"slots": None, "unit": OUTPUT, "requests": 1500})
    held = load("H100", "Qwen3-8B").kv_tokens(1, 0.9)
    assert made["at_once"] == held // 700


def test_what_cannot_be_forecast_stands_in_the_table_with_its_reason():
    made = [forecast(ALONE), forecast(ALONE | {"gpu": "H101"})]
    assert "error" not in made[1] and "H101" in summary(made) and "| all | 1 |" in summary(made)
    assert sum(line.startswith("| Qwen3-8B |") for line in table(made).splitlines()) == 2
