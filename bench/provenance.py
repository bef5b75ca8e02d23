"""Which commit was each result measured on, and has the code it measures changed since?

    python bench/provenance.py                              print what is out of date, and write the line of every page that shows results
    python bench/provenance.py --adopt cpu/x.json COMMIT    a result that was written without a record: say where it was measured

`bench/results/measured.json` holds, for every file beside it, the commit, whether the measured code had uncommitted changes, and a
fingerprint of that code. Benches write results with `save`, which keeps the record. The fingerprint leaves comments, docstrings and layout
out, so that an edit of words makes nothing stale; `measured_again` shows of some rows that an edit of code changed no number. A file that
was written in another way is `unrecorded`.
"""

from __future__ import annotations

import argparse
import ast
import functools
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench.marked import fill, filled

FOLDER = ROOT / "bench" / "results"
RECORD = FOLDER / "measured.json"

DECIDES = (
    *("verl_heddle/orchestrator.py", "verl_heddle/turns.py", "verl_heddle/options.py"),
    *(f"verl_heddle/{name}" for name in ("place", "predict", "schedule", "shape")),
)
STUDIES = tuple(f"verl_heddle/report/{name}.py" for name in ("draws", "play", "rules", "setting", "study"))
WORK = ("verl_heddle/traces/generate.py", "verl_heddle/traces/workloads.py")
TIMES = tuple(f"verl_heddle/latency/{name}.py" for name in ("__init__", "calibrate", "model", "shipped", "surface"))
"""What makes the step times of the models that benches ask about: the first table and calibration, not the roofline."""

SIMULATED = (*DECIDES, *WORK, "verl_heddle/simulate", *TIMES, "verl_heddle/data/latency.json.gz")
LIVE = (*DECIDES, "verl_heddle/verl_plugin")
PUBLISHED = (
    *("verl_heddle/latency", "verl_heddle/data/models.json", "verl_heddle/report/setting.py"),
    *(f"verl_heddle/data/latency_{gpu}.json.gz" for gpu in ("a100", "b200", "h100", "h200", "l40s")),
    *("bench/published/run.py", "bench/published/benchmarks.json"),
)
SCHEDULER = ("verl_heddle/schedule", "verl_heddle/verl_plugin/vllm_scheduler.py")

MEASURES: dict[str, tuple[str, ...]] = {
    "cpu/fidelity.json": (*SIMULATED, "bench/fidelity/run.py", "bench/fidelity/model.py", "bench/fidelity/predict.py"),
    "cpu/fidelity_kv.json": (*SIMULATED, "bench/fidelity/run.py", "bench/fidelity/model.py", "bench/fidelity/predict.py"),
    "cpu/fidelity_rules.json": ("verl_heddle/simulate", *SCHEDULER, "bench/fidelity/rules.py"),
    "cpu/kills.json": (*LIVE, "bench/placement/kills.py"),
    "cpu/learning.json": (*LIVE, "bench/learning/run.py"),
    "cpu/modes.json": (*LIVE, *SIMULATED, "verl_heddle/training", "bench/modes/real.py", "bench/modes/replay_loop.py"),
    "cpu/placement.json": (*DECIDES, *SCHEDULER, "bench/placement/real.py", "bench/placement/heddle.py"),
    "cpu/residents.json": (
        *DECIDES,
        *(f"verl_heddle/verl_plugin/{name}.py" for name in ("client", "router", "router_pool")),
        "verl_heddle/simulate/baselines/thunder_agent.py",
        *("bench/residents/real.py", "bench/residents/peers.py", "verl_heddle/twin", "verl_heddle/report/recorded.py"),
    ),
    "cpu/router.json": (
        *(*DECIDES, "bench/router/alone.py", "bench/router/load.py"),
        *(f"verl_heddle/verl_plugin/{name}.py" for name in ("router", "router_pool", "news", "link", "outbox")),
    ),
    "cpu/schedule.json": (*SCHEDULER, "bench/schedule/pairs.py", "bench/schedule/work.py"),
    "cpu/twin.json": (*SIMULATED, "verl_heddle/twin", "verl_heddle/report/recorded.py", "bench/auto/cost.py"),
    "h200/forecast.json": (*SIMULATED, "bench/gpu/experiments"),
    "prediction.json": (*WORK, "verl_heddle/predict", "bench/prediction/experiment.py", "bench/prediction/replay.py"),
    "simulated/auto.json": (*SIMULATED, *STUDIES, "verl_heddle/twin", "bench/auto/run.py", "bench/regimes/cells.py"),
    "simulated/layout.json": (*SIMULATED, "verl_heddle/layout", "bench/layout"),
    "simulated/modes.json": (*SIMULATED, "verl_heddle/training", "bench/modes/run.py", "bench/regimes/cells.py"),
    "simulated/placement.json": (*SIMULATED, "bench/placement/run.py", "bench/placement/cases.py"),
    "simulated/placement_prices.json": ("verl_heddle/place", *TIMES, "bench/placement/scenarios.py"),
    "simulated/placement_solver.json": ("verl_heddle/place", *TIMES, "bench/placement/solver.py"),
    "simulated/published.json": (*SIMULATED, *PUBLISHED),
    "simulated/quick.json": (*SIMULATED, *STUDIES, "verl_heddle/report/quick.py", "verl_heddle/traces/index.py", "bench/quick/run.py"),
    "simulated/regimes.json": (*SIMULATED, *STUDIES, "bench/regimes/cells.py"),
    "simulated/residents.json": (*SIMULATED, *STUDIES, "bench/residents/run.py", "bench/regimes/cells.py"),
    "simulated/schedule.json": (*SIMULATED, *STUDIES, "bench/schedule/simulated.py", "bench/regimes/cells.py"),
    "simulated/shaping.json": (*SIMULATED, "bench/shaping"),
    "simulated/spare_samples.json": (
        *(*SIMULATED, *STUDIES, "verl_heddle/report/whatif.py", "verl_heddle/report/recorded.py"),
        *(f"bench/shaping/{name}.py" for name in ("forecast", "arms", "cases")),
    ),
    "simulated/speed.json": (*SIMULATED, "bench/simulate_speed/run.py"),
}
"""Result, below `FOLDER` -> files and folders whose code it measures, the bench's own included."""

PAGES: dict[str, tuple[str, ...]] = {
    "README.md": ("simulated/regimes.json", "simulated/residents.json", "simulated/modes.json", "cpu/residents.json"),
    "docs/results.md": ("simulated/residents.json", "cpu/residents.json", "cpu/fidelity.json", "cpu/fidelity_rules.json"),
    "bench/auto/README.md": ("simulated/auto.json", "cpu/twin.json"),
    "bench/fidelity/README.md": ("cpu/fidelity.json", "cpu/fidelity_rules.json"),
    "bench/layout/README.md": ("simulated/layout.json",),
    "bench/learning/README.md": ("cpu/learning.json",),
    "bench/modes/README.md": ("simulated/modes.json",),
    "bench/placement/README.md": (
        *("simulated/placement.json", "simulated/placement_prices.json", "simulated/placement_solver.json"),
        *("cpu/placement.json", "cpu/kills.json"),
    ),
    "bench/prediction/README.md": ("prediction.json",),
    "bench/published/README.md": ("simulated/published.json",),
    "bench/quick/README.md": ("simulated/quick.json",),
    "bench/residents/README.md": ("simulated/residents.json", "cpu/residents.json"),
    "bench/router/README.md": ("cpu/router.json",),
    "bench/schedule/README.md": ("simulated/schedule.json", "cpu/schedule.json"),
    "bench/shaping/README.md": ("simulated/shaping.json", "simulated/spare_samples.json"),
    "docs/gpu.md": ("h200/forecast.json",),
    "docs/regimes.md": ("simulated/regimes.json",),
}
"""Page -> results it shows. Its line stands between the marks `measured`."""

FRESH, CHANGED, UNRECORDED = "fresh", "changed", "unrecorded"


def fingerprint(paths: Iterable[str], commit: str | None = None) -> str:
    """Of the code in these files and folders, in the working tree or in a commit; what does not exist counts as nothing."""
    found = hashlib.sha256()
    for name, data in sorted(_files(paths, commit)):
        found.update(f"{name}\n".encode() + (_code(data) if name.endswith(".py") else data) + b"\n")
    return found.hexdigest()[:16]


def _files(paths: Iterable[str], commit: str | None) -> list[tuple[str, bytes]]:
    if commit:
        names = _git("ls-tree", "-r", "--name-only", commit, "--", *paths).decode().splitlines()
        return [(name, _git("show", f"{commit}:{name}")) for name in names]
    made = [file for path in paths for file in ([ROOT / path] if (ROOT / path).is_file() else (ROOT / path).rglob("*")) if file.is_file()]
    kept = {file for file in made if "__pycache__" not in file.parts}
    return [(str(file.relative_to(ROOT)), file.read_bytes()) for file in kept]


@functools.cache
def _code(source: bytes) -> bytes:
    """A module without comments, docstrings and layout."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [line for line in body if not (isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant))]
    return ast.dump(tree).encode()


def _git(*words: str) -> bytes:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, check=True).stdout


def save(path: Path, document: Any, kept: bool = False) -> None:
    """Write a result, and, below `FOLDER`, what it was measured on.

    Args:
        kept: parts of the file that was there are kept. If they measured other code, the result stays out of date until all is measured.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(document, indent=1) + "\n")
    draft.replace(path)
    record(path, kept)


def record(path: Path, kept: bool = False) -> None:
    """Note what a result that was just written is measured on; a file outside `FOLDER` has no record. See `save`."""
    name = str(path.resolve().relative_to(FOLDER)) if path.resolve().is_relative_to(FOLDER) else ""
    if name not in MEASURES:
        return
    before, code = _known().get(name, {}), fingerprint(MEASURES[name])
    older = [*before.get("older", ()), before["commit"]] if before and before["code"] != code else before.get("older", [])
    commit = _git("rev-parse", "HEAD").decode().strip()
    dirty = bool(_git("status", "--porcelain", "--", *MEASURES[name]).strip())
    _write(name, {"commit": commit, "dirty": dirty, "code": code, "data": _data(name)} | ({"older": older} if kept and older else {}))


def _write(name: str, entry: Mapping[str, Any]) -> None:
    """Into the record. `dirty` None: nobody knows whether the measured code had uncommitted changes."""
    RECORD.write_text(json.dumps(dict(sorted((_known() | {name: entry}).items())), indent=1) + "\n")


def _known() -> dict[str, dict[str, Any]]:
    return json.loads(RECORD.read_text()) if RECORD.exists() else {}


def _data(name: str) -> str:
    if not (FOLDER / name).exists():
        return ""
    return hashlib.sha256((FOLDER / name).read_bytes()).hexdigest()[:16]


def measured_again(path: Path, rows: Sequence[Any], measure: Callable[[Any], Any], number: int) -> None:
    """Measure `number` rows of a simulated result anew, spread over it, other ones for other code; if all are what they were, to the last
    digit, note that the result holds for the code of now as well. `measure`: of a row, the same row.

    Raises:
        SystemExit: a row differs.
    """
    name = str(path.resolve().relative_to(FOLDER))
    code = fingerprint(MEASURES[name])
    stride = max(1, len(rows) // number)
    picked = list(range(int(code, 16) % stride, len(rows), stride))[:number]
    for count, index in enumerate(picked, start=1):
        if json.loads(json.dumps(measure(rows[index]))) != rows[index]:
            sys.exit(f"{name}: row {index} is not what it was; measure the whole again")
        print(f"{name}: row {index} as it was ({count} of {len(picked)})", file=sys.stderr, flush=True)
    commit = _git("rev-parse", "HEAD").decode().strip()
    if _git("status", "--porcelain", "--", *MEASURES[name]).strip():
        sys.exit(f"{name}: commit the code first, so that it can be named")
    _write(name, _known()[name] | {"again": {"commit": commit, "code": code, "rows": len(picked), "of": len(rows)}})


def state(name: str) -> tuple[str, str]:
    """(`FRESH`, `CHANGED` or `UNRECORDED`; the commit, empty if unrecorded) of a result."""
    entry = _known().get(name)
    if entry is None or entry["data"] != _data(name):
        return UNRECORDED, ""
    codes = (entry["code"], entry.get("again", {}).get("code"))
    return FRESH if fingerprint(MEASURES[name]) in codes and not entry.get("older") else CHANGED, entry["commit"]


def _commit_words(name: str, commit: str) -> str:
    again = _known().get(name, {}).get("again")
    told = f" ({again['rows']} of {again['of']} rows the same on `{again['commit'][:7]}`)" if again else ""
    return f"{name} {f'`{commit[:7]}`{told}' if commit else '**without a record**'}"


def line(names: Iterable[str]) -> str:
    """What a page says of the results it shows; those that have not been made are not among them."""
    found = {name: state(name) for name in names if (FOLDER / name).exists()}
    words = ", ".join(_commit_words(name, commit) for name, (_, commit) in found.items())
    changed = [name for name, (how, _) in found.items() if how == CHANGED]
    which = "" if len(changed) == len(found) else f": {', '.join(changed)}"
    return f"*Measured on commit:* {words}." + (f" **The code measured has changed since{which}.**" if changed else "")


def block(names: Iterable[str]) -> str:
    """The line between its marks, for pages that are generated as a whole."""
    return f"<!-- measured: begin -->\n{line(names)}\n<!-- measured: end -->"


def page(name: str) -> str:
    """The text of a page with its line as it must be."""
    return filled(ROOT / name, "measured", line(PAGES[name]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adopt", nargs=2, action="append", default=[], metavar=("RESULT", "COMMIT"), help="it was measured there")
    for name, revision in parser.parse_args().adopt:
        commit = _git("rev-parse", revision).decode().strip()
        _write(name, {"commit": commit, "dirty": None, "code": fingerprint(MEASURES[name], commit), "data": _data(name)})
    for name in filter(lambda name: (FOLDER / name).exists(), MEASURES):
        found, commit = state(name)
        if found != FRESH:
            print(f"{name}: {found}{f' since {commit[:12]}' if commit else ''}")
    for name, names in PAGES.items():
        fill(ROOT / name, "measured", line(names))


if __name__ == "__main__":
    main()
