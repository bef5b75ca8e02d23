"""How many short programs does the sandbox run per minute?

    python bench/sandbox.py [--runs 200] [--parallel 2]

Runs `print(1)` that often at each level and prints a table and one JSON line. `plain` is the same interpreter started without a sandbox:
`slower` is the ratio of its rate to the level's, what safety costs on any machine.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from recipes.sandbox import levels
from recipes.sandbox.local import Sandbox

CODE = "print(1)"


def measure(run: Callable[[], bool], runs: int, parallel: int) -> float:
    """Runs per minute."""
    start = time.monotonic()
    with ThreadPoolExecutor(parallel) as pool:
        good = sum(pool.map(lambda _: run(), range(runs)))
    rate = 60 * runs / (time.monotonic() - start)
    if good != runs:
        raise SystemExit(f"{runs - good} of {runs} runs failed")
    return round(rate)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--parallel", type=int, default=2)
    args = parser.parse_args()
    python = levels.interpreter("bwrap")[0]
    plain = measure(lambda: subprocess.run([python, "-c", CODE], stdout=subprocess.DEVNULL).returncode == 0, args.runs, args.parallel)
    table = {"plain": plain}
    for name in ("bubblewrap", "process"):
        try:
            sandbox = Sandbox(level=name, parallel=args.parallel)
        except RuntimeError as error:
            print(f"{name}: {error}")
            continue
        with sandbox:
            table[name] = measure(lambda pool=sandbox: pool.run({"main.py": CODE}).ok, args.runs, args.parallel)  # type: ignore[misc]
    print(f"{'level':<12}{'runs/min':>9}{'slower':>8}")
    for name, rate in table.items():
        print(f"{name:<12}{rate:>9.0f}{plain / rate:>8.2f}")
    print(json.dumps({"bench": "sandbox", "cpus": os.cpu_count(), "parallel": args.parallel, "runs": args.runs, "per_minute": table}))


if __name__ == "__main__":
    main()
