"""A bench over cells of the regime map, several draws of each: its command line, its processes, its results and the table in its README."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.marked import fill
from bench.provenance import FOLDER, ROOT, measured_again, save


@dataclass(frozen=True)
class Bench:
    """`measured` makes a row, JSON-ready, of (name, cell, tp, seed); `table` a table in Markdown of the document with all `rows`."""

    name: str
    """Of the results in `bench/results/simulated` and of the table in `readme`."""
    readme: Path
    cells: Mapping[str, tuple[Any, int]]
    """Cell and tensor-parallel degree, by the name of the row."""
    seeds: Sequence[int]
    about: Mapping[str, Any]
    """What else stands in the document."""
    measured: Callable[[str, Any, int, int], dict[str, Any]]
    table: Callable[[dict[str, Any]], str]
    quick: Callable[[], dict[str, Any]]

    def main(self, text: str) -> None:
        """Run it as the command line says; `text` is its help."""
        parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--quick", action="store_true", help="one small cell, nothing is written")
        parser.add_argument("--table", action="store_true", help="write the README's table from the results that are there")
        parser.add_argument(
            "--check", type=int, metavar="N", help="measure N rows anew: are they what they were? Then the results still hold"
        )
        arguments = parser.parse_args()
        results = FOLDER / "simulated" / f"{self.name}.json"
        if arguments.quick:
            print(json.dumps(self.quick(), indent=1))
            return
        if arguments.check:
            return measured_again(results, json.loads(results.read_text())["rows"], self._again, arguments.check)
        if not arguments.table:
            save(results, {"kind": "simulated", **self.about, "rows": self.rows()})
        fill(self.readme, self.name, self.table(json.loads(results.read_text())))
        print(f"wrote {self.readme.relative_to(ROOT)}", file=sys.stderr)

    def _again(self, row: Mapping[str, Any]) -> dict[str, Any]:
        cell, tp = self.cells[row["cell"]]
        return self.measured(row["cell"], cell, tp, row["seed"])

    def rows(self) -> list[dict[str, Any]]:
        """Of all cells and draws, a process to each core."""
        rows, begun = list[dict[str, Any]](), time.monotonic()
        todo = [(name, cell, tp, seed) for name, (cell, tp) in self.cells.items() for seed in self.seeds]
        with ProcessPoolExecutor() as pool:
            for row in pool.map(self.measured, *zip(*todo, strict=True)):
                rows.append(row)
                print(f"{len(rows)} of {len(todo)}, {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
        return rows
