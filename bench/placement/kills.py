"""Replicas killed at random moments of real runs: does every group complete, is every trajectory trained once?

    python bench/placement/kills.py --runs 10               # two deaths a run, about two minutes each; no GPU

Real verl, three real vLLM engines on the CPU, the math recipe, placement planned. In two of three steps, at a tool call drawn at random, a
replica drawn at random dies: its server process, or the engine behind it. Exits with 1 at the first run that lost or doubled anything.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from engines import prepared, runner

from bench.provenance import save
from verl_heddle.traces.io import read

STEPS, PROMPTS, SAMPLES, REPLICAS = 3, 12, 4, 3
CALLS = 100
"""Tool calls of a step, about: a death is drawn among them."""
TOOLS = ROOT / "tests/faults/replica_killer.py"
RESULT = ROOT / "bench/results/cpu/kills.json"


def drawn(seed: int) -> list[tuple[int, int, int, str]]:
    """Two deaths: (step, tool call, replica, what)."""
    chance = Random(seed)
    steps, victims = sorted(chance.sample(range(1, STEPS + 1), 2)), chance.sample(range(REPLICAS), 2)
    pairs = zip(steps, victims, strict=True)
    return [(step, chance.randrange(1, CALLS), victim, chance.choice(["server", "engine"])) for step, victim in pairs]


def one(folder: Path, seed: int) -> dict[str, Any]:
    """A run, and what is wrong with it."""
    kills = drawn(seed)
    sizes = [f"data.train_batch_size={PROMPTS}", f"actor_rollout_ref.actor.ppo_mini_batch_size={PROMPTS}"]
    tools = f"actor_rollout_ref.rollout.multi_turn.function_tool_path={TOOLS}"
    words = " ".join(":".join(map(str, kill)) for kill in kills)
    run = runner("math", folder)(
        f"kills{seed}",
        "+plugin=heddle",
        "heddle.place.enable=true",
        tools,
        *sizes,
        steps=STEPS,
        replicas=REPLICAS,
        env={"HEDDLE_KILLS": words},
    )
    wrong = []
    if run.code:
        wrong.append(f"exit code {run.code}")
    for step in range(1, STEPS + 1):
        if step not in run.steps or len(run.rollouts(step)) != PROMPTS * SAMPLES:
            wrong.append(f"step {step} has not {PROMPTS * SAMPLES} rows")
    lives = Counter((item.meta["step"], item.prompt_id, item.trial) for item in read(run.trace)) if run.trace.exists() else Counter()
    if len(lives) != STEPS * PROMPTS * SAMPLES or set(lives.values()) != {1}:
        wrong.append(f"{len(lives)} trajectories, {max(lives.values(), default=0)} times at most")
    struck = run.log.count("REPLICA KILLED")
    return {"seed": seed, "kills": kills, "struck": struck, "wrong": wrong, "log": "" if not wrong else run.log[-4000:]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--first", type=int, default=0, help="first seed: later calls add to the JSON")
    parser.add_argument("--json", type=Path, default=RESULT)
    args = parser.parse_args()
    told = json.loads(args.json.read_text()) if args.first and args.json.exists() else []
    with tempfile.TemporaryDirectory() as folder:
        prepared("math", Path(folder))
        for seed in range(args.first, args.first + args.runs):
            found = one(Path(folder), seed)
            log = found.pop("log")
            told.append(found)
            save(args.json, told, kept=args.first > 0)
            print(seed, found["kills"], f"{found['struck']} died;", "; ".join(found["wrong"]) or "nothing lost, nothing twice", flush=True)
            if found["wrong"]:
                sys.exit(log)
    print(f"{sum(run['struck'] for run in told)} deaths in {len(told)} runs, {sum(bool(run['wrong']) for run in told)} runs with a fault")


if __name__ == "__main__":
    main()
