"""A FAKE verl trainer, for tests of what is around a run: seconds instead of minutes, no Ray, no engine, no training.

Takes verl's overrides, simulates each step (stock's rule, or longest first for +plugin=heddle) and writes what a run writes: verl's
metrics file, heddle's trace, Hydra's config, lines on the console. The real twin of these tests is tests/e2e/test_compare.py.

Under an asynchronous trainer mode it logs windows between batches instead of makespans.

Environment: FAKE_STEP_S (seconds a step sleeps), FAKE_FAIL (an arm's name: it exits with 3), FAKE_HANG (an arm's name: it goes silent),
FAKE_CHILD (a file: a child that ignores its parent's death is left behind, its pid written there), FAKE_PARENT (the arm that does so).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from random import Random

import yaml

from verl_heddle.latency import LatencyModel
from verl_heddle.report.attribution import metrics_of, window_metrics
from verl_heddle.report.step_metrics import Trained
from verl_heddle.simulate import PRIORITY, EngineOptions, make_fleet, simulate
from verl_heddle.simulate.baselines import LptOracle, Stock
from verl_heddle.traces import generate, replayable
from verl_heddle.traces.columns import Columns
from verl_heddle.traces.recorder import append

LATENCY = LatencyModel.affine(0.004, 0.001, 1e-6, prefill_per_token_s=2e-5, prefill_base_s=0.004)
SLOTS, REPLICAS = 4, 2
TRAINED = Trained(fresh_steps=2)


def main() -> None:
    values = dict(word.lstrip("+").split("=", 1) for word in sys.argv[1:] if "=" in word)
    values = {key: value.strip("'") for key, value in values.items()}
    arm = os.environ["WANDB_JOB_TYPE"]
    plugin, seed, steps = values.get("plugin"), int(values["data.seed"]), int(values.get("trainer.total_training_steps", 3))
    print("Started a local Ray instance.", flush=True)
    if os.environ.get("FAKE_CHILD") and os.environ["FAKE_PARENT"] == arm:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
        Path(os.environ["FAKE_CHILD"]).write_text(str(child.pid))
    if os.environ.get("FAKE_FAIL") == arm:
        print("RuntimeError: the fake was told to fail", flush=True)
        sys.exit(3)
    if os.environ.get("FAKE_HANG") == arm:
        time.sleep(600)
    hydra = Path(values["hydra.run.dir"]) / ".hydra"
    hydra.mkdir(parents=True)
    policy = "priority" if plugin == "heddle" else "fcfs"
    tree = {"actor_rollout_ref": {"rollout": {"scheduling_policy": policy, "seed": seed}}, "trainer": {"experiment_name": arm}}
    (hydra / "config.yaml").write_text(yaml.safe_dump(tree))
    print("LLMServerManager: [...]", flush=True)
    for number in range(1, steps + 1):
        time.sleep(float(os.environ.get("FAKE_STEP_S", "0.05")))
        step(number, plugin, seed, values)
        print(f"step:{number} - done", flush=True)


def step(number: int, plugin: str | None, seed: int, values: dict[str, str]) -> None:
    """One step: the same trajectories for every arm of a pair, and a slow first step as in life."""
    work = [
        replayable(item)
        for item in generate("search", 6, 4, seed=100 * seed + number, median_tokens=150, cap_tokens=1200, tool_mean_s=0.05)
    ]
    slow = LatencyModel.affine(0.012, 0.001, 1e-6, prefill_per_token_s=2e-5, prefill_base_s=0.012) if number == 1 else LATENCY
    fleet = make_fleet(REPLICAS, 1, slow, SLOTS)
    if plugin == "heddle":
        result = simulate(work, fleet, slow, LptOracle(work, seed), engine=replace(PRIORITY, turn_overhead_s=0.01), step=number)
    else:
        result = simulate(work, fleet, slow, Stock(seed), engine=EngineOptions(turn_overhead_s=0.01), step=number)
    lives = result.trajectories()
    begin = time.time() + 1000.0 * number  # as in life, no two runs overlap; steps are as long as simulated
    for life in lives:
        life.meta["start_s"] += begin
        life.meta["end_s"] += begin
        life.meta.update({"run": "r", "tp": 1, "slots": SLOTS, "replicas": REPLICAS, "order": "priority" if plugin == "heddle" else "fcfs"})
    lives = [replace(life, reward=1.0 if life.output_tokens % 3 else 0.0, source="verl") for life in lives]
    if plugin == "heddle" and number > 1:
        lives = [guessed(life, Random(f"{seed} {number} {index}")) for index, life in enumerate(lives)]
    metrics = metrics_of(lives)
    data = {"timing_s/gen": metrics["makespan_s"], "timing_s/step": metrics["makespan_s"] + 2.0, "critic/score/mean": metrics["reward"]}
    data |= {"response_length/mean": metrics["tokens"] / len(lives)}
    if number == 2:
        data["val-core/math/reward/mean@1"] = 0.25
    if values.get("trainer.v1.trainer_mode", "sync") != "sync":
        metrics = window(lives, metrics, number)
        for life in lives:
            life.meta["trainer_mode"] = values["trainer.v1.trainer_mode"]
    elif plugin is not None and number > 1:  # of the step before, as in life
        metrics |= {"twin/step": number - 1, "twin/error": -0.02, "twin/speedup": 1.25, "twin/stock_s": 10.0, "twin/heddle_s": 8.0}
    if plugin is not None:
        data |= {f"heddle/{name}": value for name, value in metrics.items()}
        append(Path(values["heddle.trace.dir"]) / "trace.jsonl", lives)
    with open(os.environ["VERL_FILE_LOGGER_PATH"], "a") as file:
        file.write(json.dumps({"step": number, "data": data}) + "\n")


def window(lives, metrics, number):
    """As if these were what ended between two batches, all of it trained on but one of four."""
    took = metrics["makespan_s"] + 1.0
    lives = [replace(life, meta=life.meta | {"uid": f"{number}u{index}"}) for index, life in enumerate(lives)]
    TRAINED.ended(Columns.of(lives))
    keys = [f"{life.meta['uid']}_{life.trial}_0" for index, life in enumerate(lives) if index % 4]
    return window_metrics(lives, took, number) | TRAINED.batch(keys, number, took)


def guessed(life, rng):
    """Predictions right within a factor of about 1.5."""
    left, turns = life.output_tokens, []
    for turn in life.steps:
        turns.append(
            replace(turn, predicted_remaining=left * rng.lognormvariate(0, 0.6), predicted_upper=left * rng.lognormvariate(0.7, 0.5))
        )
        left -= turn.output_tokens
    return replace(life, steps=tuple(turns))


if __name__ == "__main__":
    main()
