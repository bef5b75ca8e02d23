"""Run the GPU experiments in order of value, inside a budget, each in a process of its own.

    python bench/gpu/run.py --budget-minutes 9                  on an H200: writes bench/results/h200/<experiment>.json
    python bench/gpu/run.py --budget-minutes 9 --out DIR        the same again goes on with what is not yet done in DIR
    python bench/gpu/run.py --profile rehearsal --budget-minutes 15 --out outputs/gpu/rehearsal      on a CPU, tiny model
    python bench/gpu/run.py --forecast                          no engine: predictions only, into bench/results/h200/forecast.json

Each experiment states its predictions, writes them, measures, and writes after every row. One that fails is recorded with its error and
costs only itself; one that reaches its deadline keeps its rows. A later call repeats what failed or was cut, and skips what is done
(--again repeats that too). Exit status 0: everything asked for is done.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from bench.gpu import budget, results
from bench.gpu.device import commit, device
from bench.gpu.engines import EAGER
from bench.gpu.one import NAMES, experiment, kind_of
from bench.gpu.profiles import PROFILES, Profile
from bench.provenance import record
from verl_heddle.compare.campaign import Run, stop, tail
from verl_heddle.compare.launch import MARK

RESULTS = ROOT / "bench/results/h200"
FORECAST = RESULTS / "forecast.json"
SILENCE_S = 240.0
"""Nothing printed for so long, engine starts included: it hangs."""

KEPT = ("fidelity",)


def slots(profile: Profile, names: list[str]) -> list[budget.Slot]:
    """The experiments with their times, in order of value."""
    return [budget.Slot(name, *profile.times[name], kept=name in KEPT) for name in NAMES if name in names]


def environment(profile: Profile, out: Path, name: str) -> dict[str, str]:
    """Of an experiment's process: where to import from, the mark by which left-overs are found, and what the smoke test found out."""
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    told = {**os.environ, "PYTHONPATH": paths, MARK: str((out / name).resolve()), "PYTHONUNBUFFERED": "1"}
    told.pop("RAY_ADDRESS", None)
    try:
        if results.read(out / "smoke.json")["detail"].get("eager"):
            told[EAGER] = "1"
    except (OSError, ValueError):
        pass
    return told | profile.environment


def perform(profile: Profile, out: Path, name: str, seconds: float) -> str:
    """One experiment in its own process, which is stopped with all its children `GRACE_S` after its deadline at the latest."""
    print(f"\n== {name}: {experiment(name).TITLE} (at most {seconds:.0f} s)", flush=True)
    log, variables = out / "logs" / f"{name}.log", environment(profile, out, name)
    log.parent.mkdir(parents=True, exist_ok=True)
    here = Path(__file__).with_name("one.py")
    command = [sys.executable, str(here), name, "--profile", profile.name, "--out", str(out), "--seconds", f"{seconds:.0f}"]
    run = Run(command, variables, log)
    at = 0

    def watch() -> None:
        nonlocal at
        with open(log, errors="replace") as file:
            file.seek(at)
            for line in file:
                if "(predicted" in line or line.startswith("engine "):
                    print(f"   {line.rstrip()}", flush=True)
            at = file.tell()
        if run.elapsed_s > seconds + budget.GRACE_S:
            run.stop()

    code = run.wait(SILENCE_S, watch)
    stop(variables[MARK])
    return settle(out / f"{name}.json", name, code, log)


def settle(path: Path, name: str, code: int | None, log: Path) -> str:
    """The status of an experiment whose process has ended; one that died without a word is recorded as failed, its rows kept."""
    words = " | ".join(tail(log, 8))[-1500:] or "no output"
    try:
        told = json.loads(path.read_text())
    except (OSError, ValueError):
        return f"failed before it began: {words}"
    if told["status"] not in results.OVER:
        why = "silent, stopped" if code is None else f"ended with status {code}"
        told |= {"status": "failed", "error": f"{why}: {words}", "finished": results.now()}
        results.store(path, told)
    problem = next(iter(results.problems(told)), None)
    if problem is not None:
        raise ValueError(f"{path} does not fit the schema: {problem}")
    return str(told["status"]) + (f": {told['error'][:300]}" if told["status"] != "done" else "")


def forecast() -> None:
    """Predictions of every experiment on the H200, for the page."""
    profile, told = PROFILES["h200"](), []
    for name in NAMES:
        module = experiment(name)
        made = module.predict(profile)
        entry = {"experiment": name, "title": module.TITLE, "caveats": list(module.CAVEATS), "source": made.source}
        told.append(entry | {"settings": profile.settings(), "rows": [row.as_json() for row in made.rows]})
        print(f"{name}: {len(made.rows)} rows", flush=True)
    document = {"schema": 1, "kind": results.FORECAST, "profile": "h200", "made": results.now(), "commit": commit(), "experiments": told}
    results.store(FORECAST, document)
    record(FORECAST)
    print(FORECAST)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget-minutes", type=float, default=9.0, help="everything ends within this time (9)")
    parser.add_argument("--profile", choices=list(PROFILES), default="h200")
    parser.add_argument("--out", type=Path, help="folder of results (bench/results/h200; rehearsal: outputs/gpu/rehearsal)")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=list(NAMES), metavar="NAME", help=f"some of {', '.join(NAMES)}")
    parser.add_argument("--again", action="store_true", help="repeat what is done")
    parser.add_argument("--forecast", action="store_true", help="write the predictions for the H200, and end")
    args = parser.parse_args(argv)
    if args.forecast:
        return forecast()
    if not 0 < args.budget_minutes <= 24 * 60:
        parser.error(f"--budget-minutes must lie in 0 to 1440, got {args.budget_minutes:g}")
    profile = PROFILES[args.profile]()
    kind_of(profile, device())  # the wrong machine ends here
    out = (args.out or (RESULTS if args.profile == "h200" else ROOT / "outputs/gpu/rehearsal")).resolve()
    out.mkdir(parents=True, exist_ok=True)
    if args.profile == "rehearsal" and out == RESULTS:
        parser.error("a rehearsal does not belong into bench/results/h200: choose another --out")
    done = budget.drive(
        slots(profile, args.only),
        60.0 * args.budget_minutes,
        time.monotonic,
        lambda name, seconds: perform(profile, out, name, seconds),
        lambda name: not args.again and results.is_over(out / f"{name}.json"),
    )
    print()
    for one in done:
        print(f"{one.name:10} {one.took_s:6.0f} s  {one.status}")
    print(f"results: {out}")
    raise SystemExit(0 if all(one.status in ("done", "there") for one in done) else 1)


if __name__ == "__main__":
    main()
