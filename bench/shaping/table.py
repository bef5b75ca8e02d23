"""Write the tables of README.md from the numbers: `python bench/shaping/table.py`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))

from bench.marked import fill

RESULT = HERE.parent / "results" / "simulated" / "shaping.json"

COLUMNS = {
    "uniform 8:0": "uniform 1.25n, 8:0",
    "uniform 7:1": "uniform 1.25n, 7:1",
    "uniform 4:4": "uniform 1.25n, 4:4",
    "2n, 8:0": "uniform 2n, 8:0",
    "2n, 7:1": "uniform 2n, 7:1",
    "adaptive 7:1 (DARTS)": "adaptive 1.25n, 7:1, by spread (DARTS)",
    "adaptive 8:0": "adaptive 1.25n, 8:0, by spread",
    "adaptive 7:1, free patience": "adaptive 1.25n, 7:1, by tail, free patience",
    "auto": "auto",
    "auto, no guard": "auto, no guard",
    "auto, unseen allowed": "auto, prompts unseen and allowed",
}
PARTS = (
    "planning",
    "even shaping",
    "even 24",
    "even both",
    "even both 24",
    "shaping",
    "both, last",
    "both",
    "planning, true",
    "tokens of even shaping",
    "tokens of even 24",
    "tokens of shaping",
)
PLUGIN = ("heddle", "heddle, shaping", "placing", "placing, shaping", "mixed", "mixed, shaping")


def row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def grid(head: list[str], body: list[list[str]]) -> list[str]:
    return [row(head), row(["---"] * len(head)), *map(row, body)]


def speeds(cases: list[dict[str, Any]]) -> list[str]:
    """Speed / tokens by case and arm."""
    body = []
    for case in cases:
        arms = case["arms"]
        cells = [f"{arms[name]['speedup']:.2f} / {arms[name]['tokens']:.2f}" for name in COLUMNS.values()]
        body.append([case["case"], *cells])
    return grid(["speedup / tokens over stock", *COLUMNS], body)


def kept(cases: list[dict[str, Any]]) -> list[str]:
    """What the kept are like: auto, and the paper's."""
    body = []
    for case in cases:
        cells = [case["case"]]
        for name in ("stock", "uniform 1.25n, 8:0", "uniform 1.25n, 7:1", "adaptive 1.25n, 7:1, by tail, free patience", "auto"):
            arm = case["arms"][name]
            reward = f", reward {arm['reward_kept']:.3f}" if "reward_kept" in arm else ""
            mixed = f", mixed {arm['mixed/kept']:.2f}" if "mixed/kept" in arm else ""
            cells.append(f"{arm['kept_length']:.2f}{reward}{mixed}")
        order = case["arrival_order"]
        cells.append(f"{order['groups_differ_0_long']:.2f} / {order['groups_differ_1_long']:.2f}")
        body.append(cells)
    head = [
        "kept length over all",
        "stock",
        "uniform 8:0",
        "uniform 7:1",
        "adaptive 7:1, free patience",
        "auto",
        "groups differ by arrival, 8:0 / 7:1",
    ]
    return grid(head, body)


def thesis(rows: list[dict[str, Any]], columns: Sequence[str]) -> list[str]:
    """Alone and together, over stock at its best degree."""
    body = []
    for one in sorted(rows, key=lambda x: (x["turns"], x["tools_s"], x["model"] != "Qwen3-8B", x["per_gpu"])):
        told = one["over_best_stock"]
        usual = next(value for name, value in told.items() if name.startswith("stock"))
        name = f"{one['model']}, {one['per_gpu']} per GPU" + (", tools" if one["tools_s"] else ", one turn" if one["turns"] == 1 else "")
        cells = [f"{told[part]['median']:.2f}" if part in told else "" for part in columns]
        body.append([name, f"{one['usual_tp']} / {one['best_tp']}", f"{usual['median']:.2f}", *cells, str(one["seeds"])])
    return grid(["regime", "usual / best tp", "stock, usual", *columns, "seeds"], body)


def correction(rows: list[dict[str, Any]]) -> list[str]:
    """Bias raw and corrected."""
    body = []
    for one in rows:
        cells = [f"{one[m]['reward']:+.3f} / {one[m]['length']:+.2f} / {one[m]['pull']:.2f}" for m in ("raw", "true", "learnt", "first")]
        body.append([one["pattern"], one["rule"], *cells, f"{one['learnt']['ess']:.2f}"])
    return grid(
        ["longer is", "rule", "raw: reward / length / pull", "weights, true law", "weights, learnt law", "weights, first visit", "ESS"],
        body,
    )


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    document = json.loads(RESULT.read_text())
    cases = document["cases"]
    lines = ["### Speed", "", *speeds(cases), "", "### What is kept", "", *kept(cases)]
    if document.get("thesis"):
        lines += [
            "",
            "### The thesis",
            "",
            *thesis(document["thesis"], PARTS),
            "",
            "### The plugin",
            "",
            *thesis(document["thesis"], PLUGIN),
        ]
    if document.get("correction"):
        lines += ["", "### Bias and its correction", "", *correction(document["correction"])]
    fill(HERE / "README.md", "tables", "\n".join(lines))


if __name__ == "__main__":
    main()
