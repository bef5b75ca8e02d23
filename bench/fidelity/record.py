"""Record every run of the experiment on real engines, in rounds, and repeat the disturbed ones.

Order: one round per seed, in it the calibration runs first and then each configuration once. Each later round begins with the very first
run once more, to see how far reality agrees with itself. Before a run the machine may calm down, for a while; a run during which others
used more than `DISTURBED` of the machine is repeated at once. Neither looks at predictions. Of the attempts of a run the least
disturbed one counts; all are kept.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from bench.fidelity.configurations import BATCH_TOKENS, BLOCK_TOKENS, CALIBRATION, MAX_SLOTS, Configuration
from bench.fidelity.disturbance import Mark, wait_for_calm
from bench.fidelity.model import make_model
from bench.fidelity.replay import Engines
from bench.fidelity.server import EngineArguments
from verl_heddle.options import Options
from verl_heddle.traces import write
from verl_heddle.trajectory import Trajectory, TrajectoryEnd, Turn

DISTURBED = 0.10
"""Share of the machine. Two engines that work all the time lose at least that much speed to others then."""

ATTEMPTS = 3
PREEMPT = "preempt"
"""As `scheduler.PREEMPT`, which only engines can import."""

PATIENCE_S = 300.0
"""How long to wait for a calm machine and to repeat runs, over the whole experiment; one that stays busy is recorded busy."""

PAIRS = 5
ALONE_TOKENS = 150
INDEX = "runs.json"


class Recording:
    """The runs of one start of the engines, in a folder: a trace for each, and `runs.json`."""

    def __init__(self, engines: Engines, folder: Path, patience_s: float = PATIENCE_S) -> None:
        self.engines, self.folder = engines, folder
        self.runs: list[dict[str, Any]] = []
        self.steps = 0
        self.patience_s = patience_s

    def replay(
        self,
        work: Sequence[Trajectory],
        options: Options,
        slots: int,
        order: str,
        history: Iterable[TrajectoryEnd] = (),
        kv_tokens: int | None = None,
    ) -> list[Trajectory]:
        """One replay with token ids of its own."""
        self.steps += 1
        return self.engines.replay(work, options, slots, order, history, step=self.steps, kv_tokens=kv_tokens)

    def run(self, role: str, configuration: Configuration, seed: int) -> None:
        """Record one run as `calibration`, `predicted` or `again`, and again if it was disturbed and there is patience left."""
        for _attempt in range(ATTEMPTS):
            self.patience_s -= wait_for_calm(DISTURBED, self.patience_s) if self.patience_s > 0 else 0.0
            began = time.monotonic()
            foreign = self.attempt(role, configuration, seed)
            if foreign <= DISTURBED or self.patience_s <= 0:
                return
            self.patience_s -= time.monotonic() - began

    def attempt(self, role: str, configuration: Configuration, seed: int) -> float:
        """Record one run; returns the share of the machine that others used meanwhile."""
        work, history = configuration.work(seed)
        load, before = os.getloadavg()[0], Mark.now()
        order, kv_tokens = PREEMPT if configuration.preempt else configuration.order, configuration.kv_tokens(seed)
        records = self.replay(work, configuration.options(seed), configuration.slots, order, history, kv_tokens)
        foreign = Mark.now().foreign_since(before)
        file = f"{len(self.runs):03d}-{configuration.name}-seed{seed}.jsonl.gz"
        write(self.folder / file, records)
        run = {"role": role, "configuration": configuration.name, "seed": seed, "file": file, "foreign": round(foreign, 4), "load": load}
        self.runs.append(run)
        (self.folder / INDEX).write_text(json.dumps({"runs": self.runs}, indent=1))
        makespan = max(item.meta["end_s"] for item in records) - min(item.meta["start_s"] for item in records)
        print(f"{role:11s} {configuration.name:26s} seed {seed}  {makespan:6.2f} s  foreign {foreign:4.0%}  load {load:.1f}", flush=True)
        return foreign

    def neighbour(self) -> dict[str, float]:
        """Seconds per token of one sequence on a replica, while the other replica idles and while it does the same; medians."""
        seconds: dict[int, list[float]] = {1: [], 2: []}
        for _ in range(PAIRS):
            for number, found in seconds.items():
                work = [Trajectory("fidelity", "alone", str(i), 0, 100, (Turn(0, ALONE_TOKENS),)) for i in range(number)]
                records = self.replay(work, Options(observe=True), 1, "fcfs")
                found += [(record.steps[0].gen_s or 0.0) / ALONE_TOKENS for record in records]
        return {"alone_s": median(seconds[1]), "together_s": median(seconds[2])}


def record(folder: Path, configurations: Sequence[Configuration], seeds: Sequence[int], patience_s: float = PATIENCE_S) -> dict[str, Any]:
    """Record all configurations, and the calibration runs, with all seeds into `folder`; returns what `runs.json` holds.

    Raises:
        RuntimeError: the plugin fell back to verl's rule during a run, which is then no run of that policy.
    """
    folder.mkdir(parents=True, exist_ok=True)
    arguments = EngineArguments(str(make_model(folder / "model")), MAX_SLOTS, BATCH_TOKENS, BLOCK_TOKENS)
    began = time.monotonic()
    with Engines(arguments) as engines:
        start_s, recording = time.monotonic() - began, Recording(engines, folder, patience_s)
        warm_up = replace(CALIBRATION[0], prompts=8)
        recording.replay(warm_up.work(len(seeds))[0], Options(observe=True), MAX_SLOTS, "fcfs")
        neighbour = recording.neighbour()
        for seed in seeds:
            if seed != seeds[0]:
                recording.run("again", configurations[0], seeds[0])
            for one in CALIBRATION:
                recording.run("calibration", one, seed)
            for one in configurations:
                recording.run("predicted", one, seed)
        index = {"engine_start_s": start_s, "total_s": time.monotonic() - began, "neighbour": neighbour, "runs": recording.runs}
    (folder / INDEX).write_text(json.dumps(index, indent=1))
    return index
