"""The README's figure, from results that other benches wrote: `python bench/readme_figure.py` writes docs/speed.png.

Left: how far stock verl is from what no schedule can beat (bench/regimes). Right: what heddle gives over stock where KV cache is short,
row by row (bench/residents). All of it is simulated, and the figure says so. The PNG carries a digest of its sources, by which a
test sees that it is up to date.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench.claims import pair_errors

RESULTS = ROOT / "bench" / "results"
SOURCES = tuple(
    RESULTS / name for name in ("simulated/regimes.json", "simulated/residents.json", "cpu/fidelity.json", "cpu/residents.json")
)
PICTURE = ROOT / "docs" / "speed.png"
KEY = "Sources"
"""Name of the PNG's text field that holds the digest."""

INK, FAINT, GRID = "#1b2430", "#66707c", "#e3e7ec"
TOOLS = {0.0: "#b8420f", 0.3: "#8a6d1a", 0.6: "#4d7c9a"}
"""Colour of a share of tool time: even steps of lightness, apart for every kind of colour vision."""
GENERATED = "#2a5db0"


def digest() -> str:
    """Of the sources."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in SOURCES)).hexdigest()[:16]


def draw(path: Path = PICTURE) -> None:
    """Write the PNG."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams.update({"font.size": 9.5, "text.color": INK, "axes.labelcolor": INK, "xtick.color": FAINT, "ytick.color": INK})
    regimes, short, fidelity = (json.loads(source.read_text()) for source in SOURCES[:3])
    error, short_of_kv = fidelity["overall"]["makespan_error_median"], median(map(abs, pair_errors()))
    figure = Figure(figsize=(11, 6.2), layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.15))
    _distance(left, regimes)
    _gain(right, short["rows"])
    figure.supxlabel(
        "Simulated, not measured: 8 H200, step times of vLLM as AIConfigurator composes them.\nAgainst real vLLM engines on a CPU, "
        f"the simulator's makespans are off by {error:.0%} with KV cache for all, by {short_of_kv:.0%} where it is short "
        "(medians).",
        fontsize=8.5,
        color=FAINT,
    )
    figure.savefig(path, dpi=130, metadata={KEY: digest(), "Software": None})


def _distance(axes: Any, regimes: dict[str, Any]) -> None:
    """Lines over concurrency: medians over models and tails."""
    known = regimes["assumptions"]
    base = min(cell["utilization"] for cell in regimes["cells"])
    places = range(len(known["concurrency"]))
    for share in known["tool_shares"]:
        for key, style in (("stock_over_bound", "--"), ("best_over_bound", "-")):
            line = [
                median(
                    cell[key]
                    for cell in regimes["cells"]
                    if cell["utilization"] == base and cell["tool_share"] == share and cell["concurrency"] == n
                )
                for n in known["concurrency"]
            ]
            axes.plot(places, line, style, color=TOOLS[share], linewidth=2 if style == "-" else 1.3, marker="o", markersize=3.5)
        axes.annotate(
            f"tools {share:.0%}", (places[-1], line[-1]), xytext=(7, 0), textcoords="offset points", color=TOOLS[share], va="center"
        )
    axes.plot([], [], "--", color=FAINT, label="stock verl, usual tp")
    axes.plot([], [], "-", color=FAINT, linewidth=2, label="stock verl, its best tp")
    axes.legend(frameon=False, loc="upper left", labelcolor=INK)
    axes.set_xticks(places, [str(n) for n in known["concurrency"]])
    axes.set_xlim(-0.25, len(places) - 0.25)
    axes.set_ylim(1, 3.2)
    axes.set_xlabel("trajectories per GPU")
    axes.set_title(
        "How much there is to win: makespan / lower bound\n(1 = nothing; medians over 4 models, 3 tails)", fontsize=10.5, loc="left"
    )
    _clean(axes, "y")


def _gain(axes: Any, steps: list[dict[str, Any]]) -> None:
    """A dot a cell, sorted; the line is the range over draws."""
    draws: dict[str, list[float]] = {}
    for row in steps:
        draws.setdefault(row["cell"], []).append(row["arms"]["stock"]["makespan_s"] / row["arms"]["heddle"]["makespan_s"])
    ranked = sorted(draws, key=lambda name: median(draws[name]))
    for place, name in enumerate(ranked):
        axes.plot([min(draws[name]), max(draws[name])], [place, place], color=GENERATED, alpha=0.35, linewidth=4, solid_capstyle="round")
        axes.plot(median(draws[name]), place, "o", color=GENERATED, markersize=5)
    axes.axvline(1, color=INK, linewidth=1)
    axes.set_yticks(range(len(ranked)), ranked, fontsize=7.5)
    axes.set_ylim(-0.7, len(ranked) - 0.3)
    axes.xaxis.set_major_formatter("{x:.1f}x")
    axes.set_title(
        "What heddle gives over stock where KV cache is short\n(same tp; as released; three draws a row)", fontsize=10.5, loc="left"
    )
    _clean(axes, "x")


def _clean(axes: Any, grid: str) -> None:
    axes.grid(axis=grid, color=GRID)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    draw()
    print(f"{PICTURE.relative_to(ROOT)}: sources {digest()}")
