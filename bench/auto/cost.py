"""What the twin costs the trainer: updates of a small transformer on all cores, with and without the twin judging a step beside them.

    python bench/auto/cost.py               pairs, alternating; 7 minutes; writes bench/results/cpu/twin.json and the README's table
    python bench/auto/cost.py --quick       one pair of half a second and a small step, printed only

The load is the update of a policy in torch, as verl's trainer has it: on every core of this machine, which is the hardest case, and on all
but one, since a trainer whose work is on GPUs leaves cores free. The twin is the plugin's own process, judging a recorded step again and
again while the load runs.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from bench.marked import fill
from bench.provenance import FOLDER, save
from verl_heddle.latency import LatencyModel
from verl_heddle.options import Options
from verl_heddle.orchestrator import Orchestrator
from verl_heddle.simulate import EngineOptions, make_fleet, simulate
from verl_heddle.simulate.workload import most_kv
from verl_heddle.traces import generate, replayable
from verl_heddle.traces.columns import Columns

RESULT = FOLDER / "cpu" / "twin.json"
TWIN = (sys.executable, "-m", "verl_heddle.twin", "600")
PAIRS, SECONDS = 5, 20.0
SLOTS, REPLICAS = 64, 8
LATENCY = LatencyModel.affine(0.01, 0.0005, 1e-8, prefill_per_token_s=2e-5, prefill_base_s=0.01)


def recorded(prompts: int) -> bytes:
    """A step as the sampler hands it to the twin, with KV for a third of its contexts."""
    work = [replayable(item) for item in generate("coding", prompts, 8, seed=0)]
    kv = max(2 * most_kv(work), SLOTS * most_kv(work) // 6)
    policy = Orchestrator(Options())
    policy.step_times_known(LATENCY)
    engine = EngineOptions(order="priority", turn_overhead_s=0.01)
    lives = simulate(work, make_fleet(REPLICAS, 1, LATENCY, SLOTS, {1: kv}), LATENCY, policy, engine=engine).trajectories()
    meta = {"tp": 1, "slots": SLOTS, "replicas": REPLICAS, "kv_tokens": kv, "order": "priority", **Options().decisions()}
    return pickle.dumps((Columns.of(lives), meta), protocol=pickle.HIGHEST_PROTOCOL)


class Beside:
    """Judges the step again and again until it is left; a context manager."""

    def __init__(self, step: bytes) -> None:
        self._step, self._over = step, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.judged = 0
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Beside:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._over.set()
        if self._process is not None:
            self._process.kill()
        self._thread.join(30.0)

    def _run(self) -> None:
        while not self._over.is_set():
            with tempfile.TemporaryFile() as told:
                told.write(self._step)
                told.seek(0)
                self._process = subprocess.Popen(TWIN, stdin=told, stdout=subprocess.DEVNULL, cwd=ROOT)
                self.judged += self._process.wait() == 0


def updates(seconds: float, cores: int) -> float:
    """Updates a second."""
    import torch

    torch.set_num_threads(cores)
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(128, 4, 512, batch_first=True)
    model = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    optimizer = torch.optim.AdamW(model.parameters())
    batch = torch.randn(4, 128, 128)
    model(batch)
    begun, done = time.perf_counter(), 0
    while time.perf_counter() - begun < seconds:
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()
        done += 1
    return done / (time.perf_counter() - begun)


def pairs_on(cores: int, pairs: int, seconds: float, step: bytes) -> list[dict[str, float]]:
    """Updates on so many cores: pairs, each with the twin first or last in turn."""
    updates(min(5.0, seconds), cores)
    rows = []
    for pair in range(pairs):
        rates, judged = {}, 0
        for twin in (pair % 2 == 0, pair % 2 == 1):
            if twin:
                with Beside(step) as beside:
                    rates[twin] = updates(seconds, cores)
                judged = beside.judged
            else:
                rates[twin] = updates(seconds, cores)
        rows.append({"without_per_s": rates[False], "with_per_s": rates[True], "longer": rates[False] / rates[True] - 1, "judged": judged})
        print(f"{cores} cores, pair {pair + 1} of {pairs}: {100 * rows[-1]['longer']:+.2f} % longer", file=sys.stderr, flush=True)
    return rows


def measure(pairs: int, seconds: float, prompts: int) -> dict[str, Any]:
    """Both cases."""
    step = recorded(prompts)
    columns, _ = pickle.loads(step)
    alone_s = time.perf_counter()
    subprocess.run(TWIN, input=step, stdout=subprocess.DEVNULL, cwd=ROOT, check=True)
    alone_s = time.perf_counter() - alone_s
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    machine = os.cpu_count() or 1
    cases = {str(cores): pairs_on(cores, pairs, seconds, step) for cores in sorted({machine, max(1, machine - 1)}, reverse=True)}
    turns = sum(len(item.steps) for item in columns.records())
    about = {"kind": "measured", "cores": machine, "seconds": seconds, "trajectories": len(columns), "turns": turns}
    return {**about, "alone_s": alone_s, "memory_bytes": memory, "pairs": cases}


def table(told: dict[str, Any]) -> str:
    """A line for each case."""
    lines = ["| updates on | take longer, median (least to most) | steps judged meanwhile |", "|---|---|---|"]
    for cores, rows in told["pairs"].items():
        longer, judged = sorted(100 * row["longer"] for row in rows), [row["judged"] for row in rows]
        lines.append(
            f"| {cores} of {told['cores']} cores | {median(longer):+.1f} % ({longer[0]:+.1f} to {longer[-1]:+.1f}) | "
            f"{min(judged)} to {max(judged)} |"
        )
    return "\n".join(lines) + (
        f"\n\nThe step has {told['trajectories']:,} trajectories and {told['turns']:,} turns; alone the twin judges it in "
        f"{told['alone_s']:.0f} s, in {told['memory_bytes'] / 2**20:.0f} MiB. {len(rows)} pairs a line, {told['seconds']:g} s each."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one pair of half a second and a small step, printed only")
    parser.add_argument("--table", action="store_true", help="write the README's table from the results that are there")
    arguments = parser.parse_args()
    if arguments.quick:
        print(json.dumps(measure(1, 0.5, 4), indent=1))
        return
    if not arguments.table:
        save(RESULT, measure(PAIRS, SECONDS, 128))
    fill(Path(__file__).with_name("README.md"), "cost", table(json.loads(RESULT.read_text())))


if __name__ == "__main__":
    main()
