"""The experiment's result as a table: on the console, and in README.md between two marks.

python bench/fidelity/table.py      write the README's table anew from bench/results/cpu/fidelity.json
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

README = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- table: begin, written by table.py -->", "<!-- table: end -->"
HEADER = ("configuration", "runs", "makespan, s", "predicted, s", "makespan error, by run", "finish error p50", "p90", "disturbed", "load")


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
                _percent(max(max(run["disturbed"].values()) for run in runs)),
                _span(run["load"] for run in runs),
            )
        )
    over = result["overall"]
    finish = _percent(over["finish_error_median"]), _percent(over["finish_error_p90"])
    table.append(("**all**", str(over["runs"]), "", "", f"**{_errors(over)}**", *(f"**{one}**" for one in finish), "", ""))
    return table


def notes(result: dict[str, Any]) -> list[str]:
    """What the table does not show, one line each."""
    fit, near, over, plain = result["calibration"], result["neighbour"], result["overall"], result["without_overhead"]
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    step = f"{_ms(fit['decode_base_s'])} + {_ms(fit['decode_per_sequence_s'])} per sequence"
    step += f" + {_ms(1e3 * fit['decode_per_context_token_s'])} per 1000 tokens of context"
    step += f" + {_ms(1e3 * fit['prefill_per_token_s'])} per 1000 prefilled tokens"
    overheads = ", ".join(f"{name.removesuffix('_s')} {_ms(seconds)}" for name, seconds in fit["overheads_s"].items())
    again = ", ".join(f"{seconds:.2f}" for seconds in result["repeated"]["makespans_s"])
    same = sum(run["same_replica"] for run in result["runs"]) / len(result["runs"])
    return [
        f"Made {result['date']} at commit `{result['commit'][:12]}` on {result['machine']}; {versions}.",
        f"Calibrated step: {step}; from {fit['turns']} turns of {len(fit['runs'])} runs, largest mean batch {fit['max_batch']:.1f}. "
        f"Error of a turn: median {_percent(fit['turn_error_median'])}, p90 {_percent(fit['turn_error_p90'])}.",
        f"Overhead of a turn: {overheads}. Without it: makespan error {_errors(plain)}, mean with sign "
        f"{_percent(plain['makespan_bias'], sign=True)}; with it {_percent(over['makespan_bias'], sign=True)}.",
        f"Turns that ran on the replica the simulator said: {_percent(same)}.",
        f"All {result['all_attempts']['runs']} attempts, the disturbed ones included: makespan error {_errors(result['all_attempts'])}.",
        f"{result['repeated']['configuration']}, the same seed recorded in each round: {again} s.",
        f"One sequence takes {_ms(near['alone_s'])} per token while the other engine idles, {_ms(near['together_s'])} while both do that.",
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


def write_readme(path: Path, result: dict[str, Any]) -> None:
    """Put the table between its marks.

    Raises:
        ValueError: the marks are not there.
    """
    text = path.read_text()
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{path} lacks the marks {BEGIN!r} and {END!r}")
    path.write_text(f"{head}{BEGIN}\n{markdown(result)}\n{END}{tail}")


def _percent(share: float, sign: bool = False) -> str:
    return f"{100 * share:{'+' if sign else ''}.1f} %"


def _errors(over: dict[str, Any]) -> str:
    return f"median {_percent(over['makespan_error_median'])}, largest {_percent(over['makespan_error_max'])}"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f} ms"


def _span(values: Iterable[float]) -> str:
    known = list(values)
    return f"{min(known):.1f} to {max(known):.1f}"


if __name__ == "__main__":
    write_readme(README, json.loads((Path(__file__).resolve().parents[1] / "results/cpu/fidelity.json").read_text()))
