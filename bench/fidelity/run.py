"""Does the simulator tell what real engines do? Records runs on two vLLM engines, predicts them, and reports the errors.

    python bench/fidelity/run.py             all configurations, three seeds; about 10 minutes; writes the JSON and the table in README.md
    python bench/fidelity/run.py --quick     three configurations, one seed; about 2 minutes; prints only
    python bench/fidelity/run.py --kv        the KV-bound configurations instead; about 8 minutes; another JSON and another table
    python bench/fidelity/run.py --traces DIR --predict-only    the recorded runs of DIR again, without engines

Uses the whole machine: run nothing beside it, least of all another verl.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.fidelity.configurations import KV_BOUND, PREDICTED
from bench.fidelity.predict import evaluate
from bench.fidelity.table import README, console, write_readme
from bench.provenance import save

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "bench/results/cpu/fidelity.json"
KV_RESULT = ROOT / "bench/results/cpu/fidelity_kv.json"
PACKAGES = ("verl-heddle", "verl", "vllm", "torch", "ray", "numpy")
QUICK = 3


def commit() -> str:
    """The commit of the working tree, read from its files; "unknown" outside of a plain clone."""
    git = ROOT / ".git"
    try:
        head = (git / "HEAD").read_text().strip()
        if not head.startswith("ref: "):
            return head
        name = head[5:]
        if (git / name).exists():
            return (git / name).read_text().strip()
        return next(line.split()[0] for line in (git / "packed-refs").read_text().splitlines() if line.endswith(f" {name}"))
    except (OSError, StopIteration):
        return "unknown"


def facts() -> dict[str, Any]:
    """Where and with what the runs were made."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    machine = f"{os.cpu_count()} cores, {platform.machine()}, no GPU"
    return {"date": datetime.now(UTC).isoformat(timespec="seconds"), "commit": commit(), "machine": machine, "versions": versions}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three configurations, one seed")
    parser.add_argument("--kv", action="store_true", help="the KV-bound configurations")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each configuration (3)")
    parser.add_argument("--patience-s", type=float, default=300.0, help="seconds to wait for a calm machine and to repeat runs (300)")
    parser.add_argument("--traces", type=Path, default=ROOT / "outputs/fidelity", help="folder for the recorded runs (outputs/fidelity)")
    parser.add_argument("--predict-only", action="store_true", help="take the runs that --traces holds")
    parser.add_argument("--out", type=Path, help="JSON to write (bench/results/cpu/fidelity.json; with --quick: none)")
    args = parser.parse_args(argv)
    if args.predict_only:
        index = json.loads((args.traces / "runs.json").read_text())
    else:
        from bench.fidelity.record import record  # here, because predicting needs neither ray nor vLLM

        chosen = KV_BOUND if args.kv else PREDICTED
        index = facts() | record(
            args.traces, chosen[:QUICK] if args.quick else chosen, range(1 if args.quick else args.seeds), args.patience_s
        )
        (args.traces / "runs.json").write_text(json.dumps(index, indent=1))
    result = {key: value for key, value in index.items() if key != "runs"} | evaluate(args.traces, index)
    print(console(result))
    usual = KV_RESULT if args.kv else RESULT
    out = args.out or (None if args.quick else usual)
    if out is not None:
        save(out, result)
        if out == usual:
            write_readme(README, result, "kv" if args.kv else "table")


if __name__ == "__main__":
    main()
