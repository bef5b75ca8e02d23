"""How well is the rest of a trajectory predicted, and what does it cost? Writes `bench/results/prediction.json` and the README's table.

    python bench/prediction/run.py                    everything
    python bench/prediction/run.py --only taubench    one source; the others' results stay
    python bench/prediction/run.py --dev              development prompts only, printed, nothing written

Traces are read from --traces, by default VERL_HEDDLE_TRACES or ../shared/traces; without them the open sources are skipped. The results
hold aggregates only.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from bench.prediction.cost import censoring, cost
from bench.prediction.experiment import SETTINGS, is_dev, looks
from bench.prediction.metrics import measure
from bench.prediction.replay import LOOKS
from bench.prediction.table import write_readme
from bench.provenance import save
from verl_heddle.traces import WORKLOADS, TraceError, generate, read, trace_files
from verl_heddle.trajectory import Trajectory

RESULTS = ROOT / "bench" / "results" / "prediction.json"
FOLDS, FOLDS_MANY, MANY = 5, 3, 1000
"""Folds; fewer for sources of more than `MANY` trajectories, whose training sets are large enough without the last few per cent."""
PROMPTS, SAMPLES, SEED = 100, 16, 1


def evaluate(items: Sequence[Trajectory], settings: Sequence[str], dev: bool | None) -> dict:
    """Metrics by setting and number of turns; `dev`: only (True) or without (False) the development prompts, None: all."""
    result = {}
    for setting in settings:
        found = looks(items, setting, FOLDS_MANY if len(items) > MANY else FOLDS)
        found = [look for look in found if dev is None or is_dev(look.group) == dev]
        by_turns = {str(turns): measure([look for look in found if look.turns == turns]) for turns in LOOKS}
        result[setting] = {turns: measured for turns, measured in by_turns.items() if measured}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--traces", default=os.environ.get("VERL_HEDDLE_TRACES", ROOT.parent / "shared" / "traces"))
    parser.add_argument("--only", nargs="*", help="sources, generated workloads, or cost")
    parser.add_argument("--dev", action="store_true")
    arguments = parser.parse_args()
    try:
        files = {file.name.split(".")[0]: file for file in trace_files(arguments.traces)}
    except TraceError as error:
        print(f"open traces skipped: {error}")
        files = {}
    for name in arguments.only or [*files, *WORKLOADS, "cost"]:
        if name == "cost":
            _store("cost", cost())
            _store("censoring", censoring())
            continue
        if name not in WORKLOADS and name not in files:
            print(f"{name}: skipped, no such trace")
            continue
        items = generate(name, PROMPTS, SAMPLES, seed=SEED) if name in WORKLOADS else list(read(files[name]))
        single = len({item.prompt_id for item in items}) == len(items)
        measured = evaluate(items, SETTINGS[:1] if single else SETTINGS, None if name in WORKLOADS else arguments.dev)
        entry = {"trajectories": len(items), "generated": name in WORKLOADS, "settings": measured}
        print(name, json.dumps(entry), flush=True)
        if not arguments.dev:
            _store(name, entry)
    if RESULTS.exists() and not arguments.dev:
        write_readme(json.loads(RESULTS.read_text()))


def _store(name: str, entry: dict) -> None:
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results[name] = entry
    save(RESULTS, _rounded(dict(sorted(results.items()))), kept=len(results) > 1)


def _rounded(value):
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    return round(value, 4) if isinstance(value, float) else value


if __name__ == "__main__":
    main()
