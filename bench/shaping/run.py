"""Shaping against stock verl, one synchronous step at a time: time, tokens, and what the kept samples are. All simulated.

    python bench/shaping/run.py --quick                              # one case, one seed, under a minute
    python bench/shaping/run.py --traces FOLDER --json FILE          # everything, about 20 minutes on one core
    python bench/shaping/run.py --cases math --json FILE             # names that contain one of these; the rest of the file stays

Ratios are stock's / the arm's, same prompts, same samples (the first n of each prompt's), same seed; above 1 the arm is better. Placement
is stock's in every arm, engines first come, first served. Statistics of lengths come from other samples of the same prompts (of a trace:
of other prompts), but for `unseen`. A step of fixed lengths cannot show what selection does to the policy over many steps.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from bench.provenance import save
from bench.shaping.arms import ARMS, play
from bench.shaping.cases import Case, regimes, traces
from bench.shaping.orders import arrival

TOLD = ("samples", "kept_length", "length_bias", "mixed/kept", "mixed/plain", "reward_all", "reward_kept", "stopped_tokens", "ess")


def measure(case: Case, seeds: int) -> dict[str, Any]:
    """One case, every arm; medians over the seeds; JSON-ready."""
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in ARMS}
    orders = []
    for seed in range(seeds):
        (pool, before), (_, other) = case.draw(seed), case.draw(seed + 1000)
        stock: dict[str, float] = {}
        for name, arm in ARMS.items():
            _, told = play(case, arm, pool, before, other)
            stock = stock or told
            rows[name].append(told | {what: stock[f"{what}"] / told[what] for what in ("makespan_s", "tokens")})
        orders.append(arrival(case, pool))
    arms = {}
    for name, found in rows.items():
        ratios = [one["makespan_s"] for one in found]
        arms[name] = {
            "speedup": median(ratios),
            "worst": min(ratios),
            "best": max(ratios),
            "tokens": median(1 / x["tokens"] for x in found),
        }
        arms[name] |= {what: median(values) for what in TOLD if (values := [one[what] for one in found if what in one])}
    about = {"case": case.name, "tp": case.where.tp, "n": case.size, "most": case.most, "seeds": seeds, "recorded": case.recorded}
    return about | {"arrival_order": {name: median(one[name] for one in orders) for name in orders[0]}, "arms": arms}


def table(found: dict[str, Any]) -> str:
    """One case as text."""
    lines = [f"{found['case']} (tp={found['tp']}, n={found['n']}, {found['seeds']} seeds); arrival order: {found['arrival_order']}"]
    for name, one in found["arms"].items():
        reward = f"  reward {one['reward_kept']:.3f} of {one['reward_all']:.3f}" if "reward_kept" in one else ""
        lines.append(
            f"    {name:<46}{one['speedup']:.2f}x ({one['worst']:.2f}..{one['best']:.2f})  tokens {one['tokens']:.2f}  "
            f"samples {one['samples']:.1f}  kept length {one['kept_length']:.2f}{reward}"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one case, one seed")
    parser.add_argument("--traces", type=Path, help="folder of open traces; what it lacks is skipped")
    parser.add_argument("--cases", nargs="+", default=[], help="only those whose name contains one of these words")
    parser.add_argument("--seeds", type=int, default=3, help="draws of each case (3)")
    parser.add_argument("--json", type=Path, help="write the numbers here; cases that are in the file and not measured again stay")
    args = parser.parse_args(argv)
    cases = regimes() + (traces(args.traces) if args.traces else [])
    if args.quick:
        cases, args.seeds = cases[:1], 1
    document: dict[str, Any] = {"kind": "simulated", "cases": []}
    if args.json and args.json.exists():
        document = json.loads(args.json.read_text())
    results = {one["case"]: one for one in document["cases"]}
    for case in cases:
        if args.cases and not any(word in case.name for word in args.cases):
            continue
        begun = time.process_time()
        results[case.name] = measure(case, args.seeds)
        print(table(results[case.name]), f"   ({time.process_time() - begun:.0f} s)", sep="\n", flush=True)
        if args.json:
            save(args.json, document | {"cases": list(results.values())}, kept=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
