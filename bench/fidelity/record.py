"""Record every run of the experiment on real engines, interleaved, and repeat the disturbed ones.

Order: one round per seed, in it the calibration runs first and then each configuration once, so that slow changes of the machine meet
all of them alike. Each later round begins with the very first run once more, to see how far reality agrees with itself. A run counts
as disturbed by the rule of `DISTURBED`, which does not look at predictions; disturbed runs are repeated after the last round. Of the
attempts of a run the least disturbed one counts; all are kept.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from bench.fidelity.configurations import BATCH_TOKENS, BLOCK_TOKENS, CALIBRATION, MAX_SLOTS, Configuration
from bench.fidelity.disturbance import cpu_s, disturbed
from bench.fidelity.model import make_model
from bench.fidelity.replay import Engines
from bench.fidelity.server import EngineArguments
from verl_heddle.options import Options
from verl_heddle.traces import write
from verl_heddle.trajectory import Trajectory, Turn

DISTURBED = 0.15
"""A run is disturbed if one of its replicas did not compute for more than this share of its busy time; up to 0.08 is its own hand-overs."""

ATTEMPTS = 3
BUDGET_S = 900.0
"""No more repeats after this much time; a machine that busy will not become better."""

PAIRS = 5
ALONE_TOKENS = 150
INDEX = "runs.json"


class Recording:
    """The runs of one start of the engines, in a folder: a trace for each, and `runs.json`."""

    def __init__(self, engines: Engines, folder: Path) -> None:
        self.engines, self.folder = engines, folder
        self.runs: list[dict[str, Any]] = []
        self.steps = 0

    def replay(self, work: Sequence[Trajectory], options: Options, slots: int, order: str, history: Any = ()) -> list[Trajectory]:
        """One replay with token ids of its own."""
        self.steps += 1
        return self.engines.replay(work, options, slots, order, history, step=self.steps)

    def run(self, role: str, configuration: Configuration, seed: int) -> float:
        """Record one run as `calibration`, `predicted` or `again`; returns how disturbed it was."""
        work, history = configuration.work(seed)
        load, before = os.getloadavg()[0], [cpu_s(pid) for pid in self.engines.processes]
        records = self.replay(work, configuration.options(seed), configuration.slots, configuration.order, history)
        used = {name: cpu_s(pid) - was for name, pid, was in zip(self.engines.servers, self.engines.processes, before, strict=True)}
        shares = disturbed(records, used)
        file = f"{len(self.runs):03d}-{configuration.name}-seed{seed}.jsonl.gz"
        write(self.folder / file, records)
        run = {"role": role, "configuration": configuration.name, "seed": seed, "file": file}
        self.runs.append(run | {"disturbed": {name: round(share, 4) for name, share in shares.items()}, "load": load})
        (self.folder / INDEX).write_text(json.dumps({"runs": self.runs}, indent=1))
        worst = max(shares.values())
        makespan = max(item.meta["end_s"] for item in records) - min(item.meta["start_s"] for item in records)
        print(f"{configuration.name:28s} seed {seed}  {makespan:6.2f} s  disturbed {worst:.0%}  load {load:.1f}", flush=True)
        return worst

    def neighbour(self) -> dict[str, float]:
        """Seconds per token of one sequence on a replica, while the other replica idles and while it does the same; medians."""
        seconds: dict[int, list[float]] = {1: [], 2: []}
        for _ in range(PAIRS):
            for number, found in seconds.items():
                work = [Trajectory("fidelity", "alone", str(i), 0, 100, (Turn(0, ALONE_TOKENS),)) for i in range(number)]
                records = self.replay(work, Options(observe=True), 1, "fcfs")
                found += [(record.steps[0].gen_s or 0.0) / ALONE_TOKENS for record in records]
        return {"alone_s": median(seconds[1]), "together_s": median(seconds[2])}


def record(folder: Path, configurations: Sequence[Configuration], seeds: Sequence[int]) -> dict[str, Any]:
    """Record all configurations, and the calibration runs, with all seeds into `folder`; returns what `runs.json` holds.

    Raises:
        RuntimeError: the plugin fell back to verl's rule during a run, which is then no run of that policy.
    """
    folder.mkdir(parents=True, exist_ok=True)
    arguments = EngineArguments(str(make_model(folder / "model")), MAX_SLOTS, BATCH_TOKENS, BLOCK_TOKENS)
    began = time.monotonic()
    with Engines(arguments) as engines:
        start_s, recording = time.monotonic() - began, Recording(engines, folder)
        warm_up = replace(CALIBRATION[0], prompts=8)
        recording.replay(warm_up.work(len(seeds))[0], Options(observe=True), MAX_SLOTS, "fcfs")
        neighbour = recording.neighbour()
        plan: list[tuple[str, Configuration, int]] = []
        for seed in seeds:
            plan += [("again", configurations[0], seeds[0])] * (seed != seeds[0])
            plan += [("calibration", one, seed) for one in CALIBRATION] + [("predicted", one, seed) for one in configurations]
        for _attempt in range(ATTEMPTS):
            plan = [run for run in plan if recording.run(*run) > DISTURBED and time.monotonic() - began < BUDGET_S]
        index = {"engine_start_s": start_s, "total_s": time.monotonic() - began, "neighbour": neighbour, "runs": recording.runs}
    (folder / INDEX).write_text(json.dumps(index, indent=1))
    return index
