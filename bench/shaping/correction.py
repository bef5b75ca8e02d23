"""What selection does to what a group teaches, and what importance weights leave of it. Pure computation.

    python bench/shaping/correction.py --json FILE        # three minutes on one core

Groups of 8 from m samples, log-logistic lengths of spread 0.5 (of the log), prompts 0.7 apart. Reward of a sample of standardised log
length z:

    short   right with chance 1 / (1 + exp(z))        shorter is likelier right: DARTS's pattern I
    long    right with chance 1 / (1 + exp(-z))       pattern II
    none    1 / 2

Told per rule, raw and with `shape.weights`: bias of the mean reward, bias of the mean log length over its spread, and how the gradient's
pull on length comes out: mean over groups of sum_i w_i A_i z_i / n with A the group's advantage (weighted mean and deviation), over that
of plain sampling (1: the same pull; for `none`, where it is 0 under plain sampling, the value itself). In place of the true law `learnt`
has what `shape.budget` knows after one earlier visit of as many samples and this one, `first` after this one alone; what was stopped
counts as longer. ESS: effective sample size over n.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from math import exp, inf, sqrt
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from bench.provenance import save
from verl_heddle.predict.quantities import LOGISTIC
from verl_heddle.shape.budget import Spreads
from verl_heddle.shape.censored import Law
from verl_heddle.shape.select import Rule, Sample, choose, effective_size, weights

SIZE, GROUPS, LAW = 8, 4000, Law(7.0, 0.5)
BETWEEN, POOL = 0.7, 400
"""Spread between prompts; visits of other prompts that the pool has seen."""
RULES = {
    "plain": (8, 8, inf),
    "7:1 of 10": (10, 1, inf),
    "7:1 of 12": (12, 1, inf),
    "7:1 of 16": (16, 1, inf),
    "4:4 of 12": (12, 4, inf),
    "7:1 of 12, patience 1.5 medians": (12, 1, 1.5),
    "8:0 of 10": (10, 0, inf),
    "8:0 of 12": (12, 0, inf),
    "8:0 of 16": (16, 0, inf),
}
REWARDS: dict[str, Callable[[float], float]] = {
    "short": lambda z: 1 / (1 + exp(z)),
    "long": lambda z: 1 / (1 + exp(-z)),
    "none": lambda z: 0.5,
}


def lengths(rng: np.random.Generator, mean: float, samples: int) -> np.ndarray:
    """Tokens of a prompt's samples."""
    uniform = np.clip(rng.random(samples), 1e-6, 1 - 1e-6)
    return np.maximum(1, np.exp(mean + LAW.spread * LOGISTIC * np.log(uniform / (1 - uniform)))).astype(int)


def measure(samples: int, shape: tuple[int, float], reward: Callable[[float], float], mode: str) -> dict[str, float]:
    """Means over `GROUPS` groups. `shape`: long slots, and patience in medians of the prompt."""
    rng = np.random.default_rng(11)
    rewards, logs, pulls, sizes = [], [], [], []
    known = Spreads()
    for number in range(POOL):
        known.observe(f"other {number}", [(int(one), False) for one in lengths(rng, rng.normal(LAW.mean, BETWEEN), SIZE)])
    for number in range(GROUPS):
        mean = rng.normal(LAW.mean, BETWEEN)
        rule = Rule(SIZE, shape[0], shape[1] * exp(mean))
        tokens, earlier = lengths(rng, mean, samples), lengths(rng, mean, samples)
        z = (np.log(tokens) - mean) / LAW.spread
        right = rng.random(samples) < [reward(float(min(8.0, max(-8.0, one)))) for one in z]
        kept = choose(rule, [Sample(place, int(one)) for place, one in enumerate(tokens)])
        law = Law(mean, LAW.spread)
        if mode in ("learnt", "first"):
            if mode == "learnt":
                known.observe(f"prompt {number}", [(int(one), False) for one in earlier])
            stop = max(int(tokens[one]) for one in kept)
            stop = max(stop, rule.patience_tokens) if rule.longest else stop
            known.observe(f"prompt {number}", [(int(min(one, stop)), bool(one > stop)) for one in tokens])
            law = known.law(f"prompt {number}")
        w = np.array([1.0] * SIZE if mode == "raw" else weights(rule, samples, law, [int(tokens[i]) for i in kept]))
        r, x = right[kept].astype(float), z[kept]
        mean_r = np.average(r, weights=w)
        deviation = sqrt(max(0.0, np.average((r - mean_r) ** 2, weights=w)))
        rewards.append(mean_r)
        logs.append(np.average(x, weights=w))
        pulls.append(float((w * (r - mean_r) * x).mean() / deviation) if deviation > 0 else 0.0)
        sizes.append(effective_size(w.tolist()) / SIZE)
    return {
        "reward": float(np.mean(rewards)),
        "length": float(np.mean(logs)),
        "pull": float(np.mean(pulls)),
        "ess": float(np.mean(sizes)),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="put the numbers into this file of bench/shaping/run.py, under `correction`")
    args = parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    for pattern, reward in REWARDS.items():
        plain = measure(SIZE, (SIZE, inf), reward, "raw")
        for name, (samples, longest, patience) in RULES.items():
            row: dict[str, Any] = {"pattern": pattern, "rule": name}
            for mode in ("raw", "true", "learnt", "first"):
                found = measure(samples, (longest, patience), reward, mode)
                pull = found["pull"] / plain["pull"] if pattern != "none" else found["pull"]
                row[mode] = {"reward": found["reward"] - plain["reward"], "length": found["length"], "pull": pull, "ess": found["ess"]}
            rows.append(row)
            told = "  ".join(
                f"{mode}: reward {v['reward']:+.3f} length {v['length']:+.2f} pull {v['pull']:.2f} ess {v['ess']:.2f}"
                for mode, v in row.items()
                if isinstance(v, dict)
            )
            print(f"{pattern:<6}{name:<34}{told}", flush=True)
    if args.json:
        document = json.loads(args.json.read_text()) if args.json.exists() else {"kind": "simulated", "cases": []}
        save(args.json, document | {"correction": rows}, kept=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
