"""The map as heat maps: one column per model, one row per ratio; inside, concurrency against tools and tails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm, Normalize, TwoSlopeNorm
from matplotlib.figure import Figure

RATIOS = (
    ("stock_over_bound", "stock verl, usual tp\nmakespan / lower bound", "magma_r", LogNorm(1.0, 5.0)),
    ("best_over_bound", "stock verl, best fixed tp\nmakespan / lower bound", "magma_r", LogNorm(1.0, 5.0)),
    ("heddle_best_speedup", "heddle, same tp\nspeedup over the row above", "RdBu", TwoSlopeNorm(1.0, 0.8, 1.6)),
)
"""Key, label, colour map (even in lightness, or red-blue; both survive colour blindness), scale."""


def heat_maps(result: dict[str, Any], path: Path) -> None:
    """Write the PNG."""
    known = result["assumptions"]
    models = list(dict.fromkeys(cell["model"] for cell in result["cells"]))
    base = min(cell["utilization"] for cell in result["cells"])
    lines = [(share, sigma) for share in known["tool_shares"] for sigma in known["sigmas"]]
    figure = Figure(figsize=(13.5, 13.2), layout="constrained")
    panels = figure.subplots(len(RATIOS), len(models), sharex=True, sharey=True)
    for row, (key, label, colors, scale) in enumerate(RATIOS):
        image = None
        for column, model in enumerate(models):
            panel = panels[row, column]
            grid = np.full((len(lines), len(known["concurrency"])), np.nan)
            for cell in result["cells"]:
                if cell["model"] == model and cell["utilization"] == base:
                    grid[lines.index((cell["tool_share"], cell["sigma"])), known["concurrency"].index(cell["concurrency"])] = cell[key]
            image = panel.imshow(grid, cmap=colors, norm=scale, aspect="auto")
            _numbers(panel, grid, scale, image)
            for edge in range(1, len(known["tool_shares"])):
                panel.axhline(edge * len(known["sigmas"]) - 0.5, color="white", linewidth=3)
            if row == 0:
                tp = next(cell["tp"] for cell in result["cells"] if cell["model"] == model)
                panel.set_title(f"{model} (usual tp={tp})", fontsize=11, fontweight="bold")
            if row == len(RATIOS) - 1:
                panel.set_xticks(range(len(known["concurrency"])), [str(value) for value in known["concurrency"]])
                panel.set_xlabel("trajectories per GPU")
            if column == 0:
                panel.set_yticks(range(len(lines)), [f"tools {share:.0%}, sigma {sigma:g}" for share, sigma in lines])
                panel.set_ylabel(label, fontsize=11, labelpad=8)
            panel.tick_params(length=0, labelsize=9)
            for spine in panel.spines.values():
                spine.set_visible(False)
        bar = figure.colorbar(image, ax=panels[row, :].tolist(), shrink=0.8, pad=0.01)
        bar.outline.set_visible(False)
        marks = [1, 1.5, 2, 3, 4, 5] if key != "heddle_best_speedup" else [0.8, 0.9, 1, 1.2, 1.4, 1.6]
        bar.set_ticks(marks, labels=[f"{mark:g}x" for mark in marks])
        bar.ax.minorticks_off()
    figure.suptitle(
        f"Where there is something to win: {known['gpus']} x {known['gpu'].upper()}, simulated (1 = nothing)",
        fontsize=14,
        fontweight="bold",
    )
    figure.savefig(path, dpi=110)


def _numbers(panel: Any, grid: np.ndarray, scale: Normalize, image: Any) -> None:
    for (y, x), value in np.ndenumerate(grid):
        red, green, blue, _ = image.cmap(scale(value))
        dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.5
        panel.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=8.5, color="white" if dark else "black")
