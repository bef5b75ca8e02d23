"""How many short programs does the sandbox run per minute?

    python bench/sandbox.py [--runs 200] [--parallel 2]

Runs `print(1)` that often at each level and prints a table and one JSON line. `plain` is the level's own interpreter started without a
sandbox (levels may need different ones, see `levels.interpreter`): `slower` is the ratio of the two rates, what safety costs anywhere.
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
from functools import partial
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
    table: dict[str, dict[str, float]] = {}
    for name in ("bubblewrap", "process"):
        try:
            sandbox = Sandbox(level=name, parallel=args.parallel)
        except RuntimeError as error:
            print(f"{name}: {error}")
            continue
        python = levels.interpreter(sandbox.level.bwrap)[0]
        plain = measure(partial(bare, python), args.runs, args.parallel)
        with sandbox:
            rate = measure(partial(inside, sandbox), args.runs, args.parallel)
        table[name] = {"per_minute": rate, "plain_per_minute": plain, "slower": round(plain / rate, 2)}
    print(f"{'level':<12}{'runs/min':>9}{'plain':>9}{'slower':>8}")
    for name, row in table.items():
        print(f"{name:<12}{row['per_minute']:>9.0f}{row['plain_per_minute']:>9.0f}{row['slower']:>8.2f}")
    print(json.dumps({"bench": "sandbox", "cpus": os.cpu_count(), "parallel": args.parallel, "runs": args.runs, "levels": table}))


def bare(python: str) -> bool:
    """One run without a sandbox."""
    return subprocess.run([python, "-c", CODE], stdout=subprocess.DEVNULL, env={}).returncode == 0


def inside(sandbox: Sandbox) -> bool:
    """One run in it."""
    return sandbox.run({"main.py": CODE}).ok


if __name__ == "__main__":
    main()
