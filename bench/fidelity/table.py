"""The experiment's result as a table: on the console, and in README.md between two marks.

python bench/fidelity/table.py      write the README's tables anew from bench/results/cpu/fidelity.json and fidelity_kv.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from bench.marked import fill

README, RESULTS = Path(__file__).with_name("README.md"), ROOT / "bench" / "results" / "cpu"
TABLES = {"table": "fidelity.json", "kv": "fidelity_kv.json"}
"""The README's tables by the name of their marks, and the results they are made from."""
HEADER = ("configuration", "runs", "makespan, s", "predicted, s", "makespan error, by run", "finish error p50", "p90", "foreign", "load")


def rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """One row for each configuration and one for all, in the order of `HEADER`."""
    table = []
    for name, over in result["configurations"].items():
        runs = [run for run in result["runs"] if run["configuration"] == name]
        table.append(
            (
                name,
                str(len(runs)),
                " ".join(f"{run['makespan_s']:.1f}" for run in runs),
                " ".join(f"{run['predicted_s']:.1f}" for run in runs),
                " ".join(f"{100 * run['makespan_error']:+.1f}" for run in runs) + " %",
                _percent(over["finish_error_median"]),
                _percent(over["finish_error_p90"]),
                _span((100 * run["foreign"] for run in runs), "%.0f", " %"),
                _span(run["load"] for run in runs),
            )
        )
    over = result["overall"]
    finish = _percent(over["finish_error_median"]), _percent(over["finish_error_p90"])
    table.append(("**all**", str(over["runs"]), "", "", f"**{_errors(over)}**", *(f"**{one}**" for one in finish), "", ""))
    return table


def notes(result: dict[str, Any]) -> list[str]:
    """What the table does not show, one line each."""
    rounds, near, over, plain = result["rounds"], result["neighbour"], result["overall"], result["without_overhead"]
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())

    def ms(name: str, factor: float = 1.0) -> str:
        return _span((1e3 * factor * learned[name] for learned in rounds), "%.2f", " ms")

    step = (
        f"{ms('decode_base_s')} + {ms('decode_per_sequence_s')} per sequence + {ms('decode_per_context_token_s', 1e3)} per 1000 tokens of"
    )
    step += f" context + {ms('prefill_per_token_s', 1e3)} per 1000 prefilled tokens"
    overheads = ", ".join(
        f"{name.removesuffix('_s')} {_span((1e3 * learned['overheads_s'][name] for learned in rounds), '%.1f', ' ms')}"
        for name in rounds[0]["overheads_s"]
    )
    again = ", ".join(f"{run['makespan_s']:.2f} s (foreign {100 * run['foreign']:.0f} %)" for run in result["repeated"])
    same = sum(run["same_replica"] for run in result["runs"]) / len(result["runs"])
    made = f"Made {result['date']} at commit `{result['commit'][:12]}` on {result['machine']}, in {result['total_s'] / 60:.0f} minutes"
    alone, together = 1e3 * near["alone_s"], 1e3 * near["together_s"]
    return [
        f"{made}; {versions}.",
        f"Calibrated step, by round: {step}. Error of a turn: median {_span(100 * one['turn_error_median'] for one in rounds)} %, "
        f"p90 {_span(100 * one['turn_error_p90'] for one in rounds)} %.",
        f"Overhead of a turn, by round: {overheads}. Without it: makespan error {_errors(plain)}, mean with sign "
        f"{_percent(plain['makespan_bias'], sign=True)}; with it {_percent(over['makespan_bias'], sign=True)}.",
        f"Turns that ran on the replica the simulator said: {_percent(same)}." + _preempted(result["runs"]),
        f"All {result['all_attempts']['runs']} attempts, the disturbed ones included: makespan error {_errors(result['all_attempts'])}.",
        f"{result['repeated'][0]['configuration']}, the same seed recorded again: {again}.",
        f"One sequence takes {alone:.2f} ms per token while the other engine idles, {together:.2f} ms while both work.",
    ]


def console(result: dict[str, Any]) -> str:
    """Aligned text."""
    lines = [HEADER, *((cell.replace("*", "") for cell in row) for row in rows(result))]
    cells = [list(line) for line in lines]
    widths = [max(len(line[column]) for line in cells) for column in range(len(HEADER))]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    return "\n".join([*table, "", *notes(result)])


def markdown(result: dict[str, Any]) -> str:
    """The same for README.md."""
    lines = [HEADER, tuple("---" for _ in HEADER), *rows(result)]
    return "\n".join(["| " + " | ".join(line) + " |" for line in lines] + [""] + [f"- {note}" for note in notes(result)])


def rules_table(result: dict[str, Any]) -> str:
    """The table of `rules.py`: the simulator against vLLM's scheduler on a virtual clock."""
    lines = [
        "| configuration | runs | makespan error, median | most | with sign | finish error p50 | p90 | slots lost | simulated |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, over in [*result["configurations"].items(), ("**all**", result["overall"])]:
        runs = [run for run in result["runs"] if run["configuration"] == name] or result["runs"]
        cells = [
            name,
            over["runs"],
            _percent(over["makespan_error_median"]),
            _percent(over["makespan_error_max"]),
            _percent(over["makespan_bias"], sign=True),
            _percent(over["finish_error_median"]),
            _percent(over["finish_error_p90"]),
            sum(run["preemptions"] for run in runs),
            sum(run["predicted_preemptions"] for run in runs),
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items() if name in ("verl-heddle", "vllm"))
    return "\n".join([*lines, "", f"Made at commit `{result['commit'][:12]}`; {versions}."])


def write_readme(path: Path, result: dict[str, Any], name: str = "table") -> None:
    """Put a table between its marks.

    Raises:
        ValueError: the marks are not there.
    """
    fill(path, name, markdown(result))


def _preempted(runs: list[dict[str, Any]]) -> str:
    """How often turns lost their slots, where any did."""
    if not any(run.get("preemptions") or run.get("predicted_preemptions") for run in runs):
        return ""
    names = dict.fromkeys(run["configuration"] for run in runs)
    both = {name: [run for run in runs if run["configuration"] == name] for name in names}
    told = (
        f"{name} {sum(run['preemptions'] for run in mine)}, simulated {sum(run['predicted_preemptions'] for run in mine)}"
        for name, mine in both.items()
    )
    return f" Turns that lost their slot, all runs: {'; '.join(told)}."


def _percent(share: float, sign: bool = False) -> str:
    return f"{100 * share:{'+' if sign else ''}.1f} %"


def _errors(over: dict[str, Any]) -> str:
    return f"median {_percent(over['makespan_error_median'])}, largest {_percent(over['makespan_error_max'])}"


def _span(values: Iterable[float], form: str = "%.1f", unit: str = "") -> str:
    """Smallest and largest."""
    known = sorted(values)
    low, high = form % known[0], form % known[-1]
    return (low if low == high else f"{low} to {high}") + unit


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for name, file in TABLES.items():
        write_readme(README, json.loads((RESULTS / file).read_text()), name)
