"""What the pages claim of speed, in their own words, computed from the results of the benches: worst beside best, whole tables.

`make docs` writes these between marks of the README and docs/results.md; a test finds them out of date when a bench was run again.
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

TOOLS = {"no tools": "no tool time", "tools 30 %": "tools are 30 % of the time", "tools 60 %": "tools are 60 % of the time"}
"""What the names of bench/residents' cells hold -> in words."""


def results(name: str) -> dict[str, Any] | None:
    """A bench's results; None where they have not been made."""
    path = RESULTS / name
    return json.loads(path.read_text()) if path.exists() else None


def pictured() -> str:
    """What stands under the figure."""
    real = results("cpu/residents.json")["workloads"]
    told = "; ".join(f"{name}, {_pairs(one['ratios']['stock/heddle'])}" for name, one in real.items())
    return (
        "*Simulated: 8 H200, step times composed by AIConfigurator from tables of single operators, not measured. Left: what there is to\n"
        "win. Right: heddle over stock where KV cache is short. Measured on two real vLLM engines on a CPU\n"
        f"with KV cache for a quarter of the contexts: {told}\n"
        "([pairs](bench/residents/README.md)).*"
    )


def _pairs(ratio: dict[str, Any]) -> str:
    """Median and range of the pairs of one arm, and the forecast."""
    low, high, count = min(ratio["pairs"]), max(ratio["pairs"]), len(ratio["pairs"])
    return f"{ratio['median']:.2f}x ({low:.2f}x to {high:.2f}x over {count} pairs; forecast {ratio['forecast_median']:.2f}x)"


def where_it_helps() -> str:
    """The table of heddle over stock by kind of rollout."""
    short = results("simulated/residents.json")["rows"]
    lines = ["| your rollout | mean | worst to best | slower than stock |", "|---|---|---|---|"]
    for tools, what in TOOLS.items():
        lines.append(_row(f"KV cache is short, {what}", _over("heddle", (row for row in short if tools in row["cell"]))))
    every = results("simulated/regimes.json")["cells"]
    lines.append(_row(f"all {len(every)} cells of the [regime map](docs/regimes.md)", [cell["heddle_speedup"] for cell in every]))
    cells, best = len({row["cell"] for row in short}), max(cell["best_speedup"] for cell in every)
    return "\n".join(
        [
            *lines,
            "",
            f"Simulated: stock's makespan over heddle's at the same degree, geometric mean over {len(short)} steps of {cells} cells whose",
            "contexts want more KV cache than there is; of the map, medians of 3 to 6 draws. Where there is room for all, heddle does",
            f"what verl does. The tensor-parallel degree alone, without the plugin, is worth up to {best:.1f}x: `verl-heddle plan`.",
            f"vLLM's KV offload to an ideal host gives stock {_mean(_over('stock_tier', short)):.2f}x over those steps.",
            _switch(),
        ]
    )


def _switch() -> str:
    """What verl's own switch of trainer is worth, without and with the plugin."""
    rows = [row["modes"] for row in results("simulated/modes.json")["rows"]]
    base = [modes["sync"]["stock"]["tokens_per_s"] for modes in rows]

    def over(arm: str) -> str:
        values = [modes["colocate_async"][arm]["tokens_per_s"] / one for modes, one in zip(rows, base, strict=True)]
        return f"{min(values):.2f}x to {max(values):.2f}x"

    return (
        f"verl's own `colocate_async`, off-policy, trains on {over('stock')} stock's synchronous tokens per second without the plugin,\n"
        f"{over('heddle')} with it ([bench/modes](bench/modes/README.md))."
    )


def peers() -> str:
    """What else could be had where KV cache is short."""
    short = results("simulated/residents.json")["rows"]

    def told(arm: str) -> str:
        values = _over(arm, short)
        return f"{_mean(values):.2f}x ({min(values):.2f}x to {max(values):.2f}x)"

    return "\n".join(
        [
            f"Over all {len(short)} steps of [bench/residents](../bench/residents/README.md), simulated, heddle gives {told('heddle')};",
            f"admitting the longest first, true lengths known, {told('known')}; by predicted length without resident sets",
            f"(`heddle.priority.order=longest`) {told('heddle_longest')}; ThunderAgent's law {told('thunder_agent')},",
            f"Continuum's {told('continuum')}, trajectory-FCFS {told('trajectory_fcfs')}. vLLM's KV offloading",
            f"(`heddle.offload.enable=true`), to an ideal host tier, gives stock verl {told('stock_tier')}; resident sets are",
            "disabled with it.",
        ]
    )


def _over(arm: str, rows: Iterable[dict[str, Any]]) -> list[float]:
    return [row["arms"]["stock"]["makespan_s"] / row["arms"][arm]["makespan_s"] for row in rows]


def accuracy() -> str:
    """How far the simulator is from engines, and where that was looked at."""
    roomy, rules = (results(f"cpu/{name}.json") for name in ("fidelity", "fidelity_rules"))
    return (
        f"Against two real vLLM engines on a CPU, {_errors(roomy)}\n"
        "([bench/fidelity](../bench/fidelity/README.md)). That is at most 24 trajectories, contexts to 1,900 tokens, KV cache for all of\n"
        "them and no preemption, while the gains above come from KV pressure. With KV cache for a quarter of the contexts:\n"
        f"against vLLM's own scheduler on a virtual clock, {_errors(rules)};\n"
        f"against engines, in the pairs of [bench/residents](../bench/residents/README.md), {_pair_errors()}."
    )


def pair_errors() -> list[float]:
    """Of the forecasts of bench/residents, with sign, over all arms and pairs: engines that are short of KV cache."""
    pairs = [row for told in results("cpu/residents.json")["workloads"].values() for row in told["pairs"]]
    return [row["forecast_s"][arm] / row["makespan_s"][arm] - 1 for row in pairs for arm in row["makespan_s"]]


def _pair_errors() -> str:
    errors = pair_errors()
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


def _mean(values: Sequence[float]) -> float:
    return exp(sum(map(log, values)) / len(values))


def _row(what: str, values: Sequence[float]) -> str:
    slower = sum(value < SLOWER for value in values)
    return f"| {what} | {_mean(values):.2f}x | {min(values):.2f}x to {max(values):.2f}x | {slower} of {len(values)} |"
