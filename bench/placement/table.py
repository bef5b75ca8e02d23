"""The README's tables from bench/results/simulated/placement.json: `python bench/placement/table.py`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from bench.marked import fill

RESULT = ROOT / "bench/results/simulated/placement.json"
README = Path(__file__).parent / "README.md"
PLANS = ("plan 1", "plan 0.95", "plan 0.83", "plan 0.71", "plan 0.57", "plan 0")
OTHERS = ("learned", "online 1", "online 0.71", "online 0", "liar", "point 1", "point 0.71", "point 0", "slime")
HONEST = (*PLANS, "learned", "online 1", "online 0.71", "online 0")


def cells(cases: list[dict[str, Any]], arms: tuple[str, ...]) -> list[tuple[float, str, str]]:
    """(ratio, case, arm), the slowest first."""
    return sorted((case["arms"][arm]["ratio"], case["case"], arm) for case in cases for arm in arms if arm in case["arms"])


def _row(case: dict[str, Any], arms: tuple[str, ...]) -> str:
    found = case["arms"]
    return " | ".join(f"{found[arm]['ratio']:.2f}" if arm in found else "" for arm in arms)


def lines(cases: list[dict[str, Any]]) -> list[str]:
    """Both tables and what they say at worst."""
    made = [
        "| | steps | stock / bound | 1 | 0.95 | 0.83 | 0.71 | 0.57 | 0 | bound / plan at 1, 0.71 | moves per trajectory, most |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case in cases:
        found = case["arms"]
        bound = f"{found['plan 1']['of_bound']:.2f}, {found['plan 0.71']['of_bound']:.2f}"
        moves = max(found[arm]["moves"] for arm in PLANS)
        made.append(f"| {case['case']} | {case['runs']} | {found['stock']['of_bound']:.2f} | {_row(case, PLANS)} | {bound} | {moves:.2f} |")
    made += ["", "| | " + " | ".join(OTHERS) + " |", "|---" * (len(OTHERS) + 1) + "|"]
    made += [f"| {case['case']} | {_row(case, OTHERS)} |" for case in cases]
    most = max((case["arms"][arm]["moves"], case["case"], arm) for case in cases for arm in HONEST if arm in case["arms"])
    points = tuple(arm for arm in OTHERS if arm.startswith("point"))
    worst, means = (
        ", ".join(f"{ratio:.3f} ({name}, {arm})" for ratio, name, arm in cells(cases, arms)[:number])
        for arms, number in ((HONEST, 5), (points, 3))
    )
    made += [
        "",
        f"Slowest of the {len(cells(cases, HONEST))} cells with honest predictions: {worst}. Slowest of planning on medians as if",
        f"they were certain (`point`): {means}. Most moves per trajectory: {most[0]:.2f} ({most[1]}, {most[2]}).",
    ]
    return made


def write(readme: Path = README) -> None:
    """Into the page, between its marks."""
    fill(readme, "simulated", "\n".join(lines(json.loads(RESULT.read_text())["cases"])))


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    write()
