"""What the README claims of speed, in its own words, computed from the results of the benches: worst beside best, whole tables.

`make docs` writes these between marks of the README; a test finds them out of date when a bench was run again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from math import exp, log
from pathlib import Path
from statistics import median
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"

SLOWER = 0.995
"""A ratio below this reads 0.99x or less."""

FEW, MANY = 16, 128
"""Trajectories per GPU up to which every turn finds a slot, and from which on most wait."""

SINGLE_TURNS = "math8"
"""The open trace of single turns, told apart because it is another kind of work."""


def results(name: str) -> dict[str, Any] | None:
    """A bench's results; None where they have not been made."""
    path = RESULTS / name
    return json.loads(path.read_text()) if path.exists() else None


def pictured() -> str:
    """What stands under the figure."""
    real = results("cpu/residents.json")["workloads"]
    short, long = (_pairs(real[name]["ratios"]["stock/heddle"]) for name in ("short tools", "long tools"))
    return (
        "*Simulated: 8 H200, step times composed by AIConfigurator from tables of single operators, not measured; no GPU run has been\n"
        "made yet. Left: what there is to win, and that most of it is often the tensor-parallel degree, which needs no plugin. Right:\n"
        "what heddle gives over stock, all rows, those where it loses included ([numbers](bench/schedule/README.md)).\n"
        f"Measured, on two real vLLM engines on a CPU with KV cache for a quarter of the contexts: {short};\n"
        f"with tools so long that nothing is worth holding: {long} ([pairs](bench/residents/README.md)).*"
    )


def _pairs(ratio: dict[str, Any]) -> str:
    """Median and range of the pairs of one arm, and the forecast."""
    low, high, count = min(ratio["pairs"]), max(ratio["pairs"]), len(ratio["pairs"])
    return f"{ratio['median']:.2f}x, the median of {count} pairs from {low:.2f}x to {high:.2f}x; forecast {ratio['forecast_median']:.2f}x"


def where_it_helps() -> str:
    """The table of heddle's order over stock by kind of rollout, and what it leaves out."""
    regimes = results("simulated/regimes.json")
    cells = [cell for cell in regimes["cells"] if cell["utilization"] == 0.5]
    rows = results("simulated/schedule.json")["rows"]
    traces = [row for row in rows if row["kind"] != "generated"]

    def of(some: Iterable[dict[str, Any]]) -> list[float]:
        return [cell[key] for cell in some for key in ("heddle_speedup", "heddle_best_speedup")]

    def drawn(some: Iterable[dict[str, Any]]) -> list[float]:
        return [value for row in some for value in row["draws"]["heddle"]]

    between = sorted({cell["concurrency"] for cell in cells if FEW < cell["concurrency"] < MANY})
    lines = [
        "| your rollout | mean | worst to best | slower than stock |",
        "|---|---|---|---|",
        _row(f"4 to {FEW} trajectories per GPU: every turn finds a slot", of(c for c in cells if c["concurrency"] <= FEW)),
        *(_row(f"{number} per GPU", of(c for c in cells if c["concurrency"] == number)) for number in between),
    ]
    many = [cell for cell in cells if cell["concurrency"] >= MANY]
    for share in sorted({cell["tool_share"] for cell in many}):
        what = f"tools are {100 * share:.0f} % of the time" if share else "no tool time"
        lines.append(_row(f"{MANY} and more per GPU, {what}", of(c for c in many if c["tool_share"] == share)))
    agents, single = ([row for row in traces if (SINGLE_TURNS in row["name"]) is alone] for alone in (False, True))
    lines.append(_row("open traces of agents, 8 to 256 slots", drawn(agents)))
    lines.append(_row(f"single turns whose length their prompt does not tell (`{SINGLE_TURNS}`)", drawn(single)))
    drawn_most = max(count for place, count in regimes["assumptions"]["draws"].items() if int(place) >= MANY)
    told = f"the median of {drawn_most} draws"
    best = max(cell["best_speedup"] for cell in cells)
    return "\n".join(
        [
            *lines,
            "",
            "All simulated: makespan of stock over heddle's at the same degree, geometric mean; the map counts at the usual degree and",
            f"at stock's best, traces by draw. Single steps scatter; a cell with {MANY} and more is {told}. The",
            f"tensor-parallel degree alone, without the plugin, is worth up to {best:.1f}x: `verl-heddle plan`.",
            *_where_kv_is_short(),
        ]
    )


def _where_kv_is_short() -> list[str]:
    """The cells in which contexts want more KV than there is, and what else could be had there."""
    rows = results("simulated/residents.json")["rows"]

    def of(arm: str) -> str:
        values = [row["arms"]["stock"]["makespan_s"] / row["arms"][arm]["makespan_s"] for row in rows]
        return f"{exp(sum(map(log, values)) / len(values)):.2f}x ({min(values):.2f}x to {max(values):.2f}x)"

    cells = len({row["cell"] for row in rows})
    return [
        "",
        f"**Where KV is short** ({cells} cells, {len(rows)} steps): heddle {of('heddle')}; with its longest first by true lengths",
        f"{of('known')}; by predicted length without resident sets (`heddle.priority.order=longest`) {of('heddle_longest')};",
        f"ThunderAgent's law {of('thunder_agent')}, Continuum's {of('continuum')}, trajectory-FCFS {of('trajectory_fcfs')}.",
        f"vLLM's KV offloading needs no plugin: to an ideal host tier it gives stock verl {of('stock_tier')}, and heddle",
        f"{of('heddle_tier')}. [bench/residents](bench/residents/README.md).",
    ]


def accuracy() -> str:
    """How far the simulator is from engines, and where that was looked at."""
    roomy, rules = (results(f"cpu/{name}.json") for name in ("fidelity", "fidelity_rules"))
    return (
        f"Against two real vLLM engines on a CPU, {_errors(roomy)}\n"
        "([bench/fidelity](bench/fidelity/README.md)). That is at most 24 trajectories, contexts to 1,900 tokens, KV cache for all of\n"
        "them and no preemption, while the gains above come from KV pressure. With KV cache for a quarter of the contexts:\n"
        f"against vLLM's own scheduler on a virtual clock, {_errors(rules)};\n"
        f"against engines, in the pairs of [bench/residents](bench/residents/README.md), {_pair_errors()}."
    )


def _pair_errors() -> str:
    """Of the forecasts of bench/residents, over all arms and pairs."""
    pairs = [row for told in results("cpu/residents.json")["workloads"].values() for row in told["pairs"]]
    errors = [row["forecast_s"][arm] / row["makespan_s"][arm] - 1 for row in pairs for arm in row["makespan_s"]]
    off = sorted(map(abs, errors))
    return (
        f"{len(errors)} runs: makespan error {100 * median(off):.1f} % in the median, {100 * off[-1]:.1f} % at worst, "
        f"{100 * sum(errors) / len(errors):+.1f} % with sign"
    )


def _errors(result: dict[str, Any]) -> str:
    over = result["overall"]
    median, most = (100 * over[f"makespan_error_{which}"] for which in ("median", "max"))
    bias = f", {100 * over['makespan_bias']:+.1f} % with sign" if abs(over["makespan_bias"]) >= 0.5 * over["makespan_error_median"] else ""
    named = f"{len(result['configurations'])} configurations, {over['runs']} runs"
    return f"{named}: makespan error {median:.1f} % in the median, {most:.1f} % at worst{bias}"


def _row(what: str, values: Sequence[float]) -> str:
    mean = exp(sum(map(log, values)) / len(values))
    slower = sum(value < SLOWER for value in values)
    return f"| {what} | {mean:.2f}x | {min(values):.2f}x to {max(values):.2f}x | {slower} of {len(values)} |"
