"""Writes the README from the results, so that no number in it can be older than they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.provenance import block

README = Path(__file__).with_name("README.md")

HEAD = """# Prediction: what is known of a trajectory's rest

Made by `python bench/prediction/run.py` from `bench/results/prediction.json`; do not edit.

Each source is split by prompt (sub-agents with their parent, BFCL scenarios with their variants): trees, pool and fitted lines know the
other prompts only. Replay in time order at a fixed decode rate; a sibling is finished only after its simulated end. A quarter of the
prompts served development and is in no number here. *burst*: unseen prompts, all samples start at once. *waves*: unseen prompts, slots
for a quarter of the trajectories. *revisit*: half of a prompt's samples came in an earlier epoch.

`best` is the baseline (prompt length, tokens so far, turn count, history, finished siblings) that turned out best in that very cell, so the
margin is conservative; [low, high] is its 95 % bootstrap interval over prompts. Rows where heddle is better by more than the interval
are marked +, where it is worse by more than the interval -. `bayes` is heddle without trees.
"""

NAMES = {"recall": "recall@20%", "spearman": "Spearman", "pearson": "Pearson of logs"}


def write_readme(results: dict[str, Any]) -> None:
    """Replace README.md."""
    sources = {name: entry for name, entry in results.items() if "settings" in entry}
    parts = [HEAD, "\n" + block(["prediction.json"]) + "\n"]
    for turns in ("2", "0", "1", "5"):
        parts.append(f"\n## After {turns} turns\n")
        for metric, title in NAMES.items():
            parts.append(f"\n| {title} | setting | n | best baseline | | bayes | heddle | margin [low, high] | | below the 0.9 quantile |")
            parts.append("|---|---|---|---|---|---|---|---|---|---|")
            for name, entry in sources.items():
                for setting, looks in entry["settings"].items():
                    if turns in looks:
                        parts.append(_row(name + (" (generated)" if entry["generated"] else ""), setting, looks[turns], metric))
    if "cost" in results:
        cost = results["cost"]
        parts.append("\n## Cost\n\n| | wall | CPU |\n|---|---|---|")
        for key, title in (
            ("predict_1", "one prediction"),
            ("predict_10000", "10,000 predictions"),
            ("fit", f"fit of {cost['fit_rows']} rows"),
        ):
            parts.append(f"| {title} | {cost[key]['wall_s'] * 1e3:.3g} ms | {cost[key]['cpu_s'] * 1e3:.3g} ms |")
    if rows := {name: row for name, row in results.get("censoring", {}).items() if isinstance(row, dict)}:
        parts.append(f"\n## {results['censoring']['stopped_share']:.0%} of the training trajectories stopped early\n")
        parts.append("| the stopped ones | mean bias of log remaining | median bias | mean absolute error |\n|---|---|---|---|")
        for name, row in rows.items():
            parts.append(f"| {name} | {row['bias']:+.3f} | {row['median_bias']:+.3f} | {row['absolute_error']:.3f} |")
    README.write_text("\n".join(parts) + "\n")


def _row(name: str, setting: str, cell: dict[str, Any], metric: str) -> str:
    margin, methods = cell["margin"][metric], cell["methods"]
    mark = "+" if margin["low"] > 0 else "-" if margin["high"] < 0 else ""
    best, own = methods[margin["best"]][metric], methods["heddle"][metric]
    interval = f"{margin['margin']:+.2f} [{margin['low']:+.2f}, {margin['high']:+.2f}]"
    bayes = methods["bayes"][metric]
    numbers = f"{best:.2f} | {bayes:.2f} | {own:.2f} | {interval} | {mark} | {cell['below_upper']:.2f}"
    return f"| {name} | {setting} | {cell['looks']} | {margin['best']} | {numbers} |"
