"""Run one experiment in this process: predict, write, measure, write. Started by `run.py`; by hand for looking into one.

python bench/gpu/one.py tau --profile rehearsal --out outputs/gpu/rehearsal --seconds 120
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.gpu import results
from bench.gpu.device import clocks, commit, device, versions
from bench.gpu.profiles import PROFILES, Profile

NAMES = ("smoke", "tau", "schedule", "place", "endtoend", "shape", "sleep", "fidelity")
"""In order of value: without an engine nothing runs; step times and the order in one engine are what the simulator rests on and what the
plugin does today; `endtoend` is what a user sees; `fidelity` needs no engine and sums the others up."""


@dataclass(slots=True)
class Run:
    """What an experiment is given. `out`: folder of the results, the earlier ones included; `scratch`: for models and logs."""

    profile: Profile
    record: results.Record
    out: Path
    scratch: Path
    until: float
    begun: float = field(default_factory=time.monotonic)

    def left_s(self) -> float:
        """Seconds until the deadline."""
        return self.until - time.monotonic()

    def put(self, name: str, measured: float | bool, unit: str | None = None, **detail: Any) -> None:
        """See `results.Record.put`."""
        self.record.put(name, measured, unit, **detail)

    def note(self, **detail: Any) -> None:
        """See `results.Record.note`."""
        self.record.note(**detail)


def experiment(name: str) -> ModuleType:
    """The module: TITLE, CAVEATS, `predict(profile)` and `async measure(run)`."""
    return import_module(f"bench.gpu.experiments.{name}")


def kind_of(profile: Profile, where: dict[str, Any]) -> str:
    """What a result on this device may be called.

    Raises:
        SystemExit: the profile is for a GPU that is not here.
    """
    if profile.name == "rehearsal":
        return results.REHEARSAL
    if where["type"] != "cuda" or profile.device.lower() not in where["name"].lower():
        raise SystemExit(f"profile {profile.name} needs an {profile.device}, here is {where['name']}; for a dry run: --profile rehearsal")
    return results.MEASURED


def perform(name: str, profile: Profile, out: Path, seconds: float) -> str:
    """The experiment; returns its status."""
    module, where, began = experiment(name), device(), time.monotonic()
    header = {
        "experiment": name,
        "title": module.TITLE,
        "kind": kind_of(profile, where),
        "profile": profile.name,
        "commit": commit(),
        "versions": versions(),
        "device": where,
        "settings": profile.settings(),
        "caveats": list(module.CAVEATS),
        "started": results.now(),
        "deadline_s": round(seconds, 1),
    }
    record = results.Record(out / f"{name}.json", header, module.predict(profile))
    scratch = Path(tempfile.gettempdir()) / f"heddle-gpu-bench-{os.getuid()}"  # models are too large for what comes back from a host
    scratch.mkdir(parents=True, exist_ok=True)
    run = Run(profile, record, out, scratch, began + seconds)
    status, error = "done", None
    try:
        asyncio.run(asyncio.wait_for(module.measure(run), seconds))
    except TimeoutError:
        status, error = "cut", f"the deadline of {seconds:.0f} s came first"
    except Exception as problem:
        traceback.print_exc()
        status, error = "failed", f"{type(problem).__name__}: {problem}"[:2000]
    record.close(status, time.monotonic() - began, error, device=where | {"clocks": {**where["clocks"], **_after()}})
    return status


def _after() -> dict[str, str]:
    return {f"{name} at the end": value for name, value in clocks().items()}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--profile", choices=list(PROFILES), default="rehearsal")
    parser.add_argument("--out", type=Path, default=Path("outputs/gpu/rehearsal"))
    parser.add_argument("--seconds", type=float, default=600.0, help="deadline (600)")
    args = parser.parse_args(argv)
    profile = PROFILES[args.profile]()
    os.environ.update(profile.environment)  # before vLLM or torch is imported; engine processes inherit it
    os.environ.setdefault("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
    status = perform(args.name, profile, args.out, args.seconds)
    sys.stdout.flush()
    os._exit(0 if status == "done" else 1)  # engine processes that hang at shutdown are ended by run.py


if __name__ == "__main__":
    main()
