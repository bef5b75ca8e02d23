"""The page docs/regimes.md: how to read the map, what was assumed, and the tables. Every number in it is computed from the results."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.provenance import block

Cell = dict[str, Any]

PEERS = {"stock_tier": "stock with KV offload to the host", "trajectory_fcfs": "trajectory-FCFS", "thunder_agent": "ThunderAgent's law"}
"""Arms beside stock and heddle, in words."""

SAME = 1.02
"""A ratio below this is no difference."""

WAITED = 0.01
"""Share of all trajectory time spent waiting from which on turns wait at all."""

NEAR, FAR = 1.1, 1.5
"""Makespan / bound below which little is left to win, and from which on much is."""

HEAD = """\
# Where there is something to win

Written by `bench/regimes/run.py`; the numbers are in `bench/results/simulated/regimes.json`. **All of it is simulated**: no engine ran.
Each cell is a step of rollouts on one node of 8 H200. *Makespan / bound* says how far stock verl is from what no schedule can beat
(`verl_heddle/simulate/bound.py` has the proof): 1.00 is nothing to win, 2.00 is at most twice as fast. The bound allows layouts that mix
tensor-parallel degrees, knows every length and moves for nothing, so part of the distance is out of anybody's reach."""


def markdown(result: dict[str, Any]) -> str:
    """The whole page."""
    known, every = result["assumptions"], result["cells"]
    base = min(cell["utilization"] for cell in every)
    cells = [cell for cell in every if cell["utilization"] == base]
    more = [cell for cell in every if cell["utilization"] != base]
    parts = [
        HEAD,
        block(["simulated/regimes.json"]),
        "![heat maps](regimes.png)",
        "## Reading it",
        reading(cells),
        "## What was assumed",
        _assumed(known, base),
    ]
    for model in dict.fromkeys(cell["model"] for cell in cells):
        mine = [cell for cell in cells if cell["model"] == model]
        parts.append(f"## {model}")
        parts.append(f"Stock at tp={mine[0]['tp']} / bound → stock at its best fixed tp / bound (that tp):")
        parts.append(_table(known, mine, lambda c: f"{c['stock_over_bound']:.2f} → {c['best_over_bound']:.2f} ({c['best_tp']})"))
        parts.append(f"heddle over stock at tp={mine[0]['tp']}; at stock's best tp:")
        parts.append(_table(known, mine, lambda c: f"{c['heddle_speedup']:.2f}; {c['heddle_best_speedup']:.2f}"))
        parts.append(f"Others over stock at tp={mine[0]['tp']}: {'; '.join(PEERS[name] for name in mine[0]['peers'])}:")
        parts.append(_table(known, mine, lambda c: "; ".join(f"{value:.2f}" for value in c["peers"].values())))
    if more:
        parts += [f"## With gpu_memory_utilization={more[0]['utilization']:g}", _memory(known, more, cells)]
    return "\n\n".join(parts) + "\n"


def reading(cells: Sequence[Cell]) -> str:
    """The map in a few sentences."""
    return "\n".join(f"- {line}" for line in (_degree(cells), _left(cells), _heddle(cells), _tools(cells), _tails(cells)))


def _degree(cells: Sequence[Cell]) -> str:
    wrong = [c for c in cells if c["best_speedup"] >= SAME]
    stock, best = _median(cells, "stock_over_bound"), _median(cells, "best_over_bound")
    return (
        f"**The first win is the tensor-parallel degree, and it needs no plugin.** In {_of(wrong, cells)} another fixed degree than the "
        f"usual one is faster, by {_median(wrong, 'best_speedup'):.2f}x at the median and {max(c['best_speedup'] for c in wrong):.2f}x at "
        f"most. Over all cells stock is {stock:.2f} times the bound at the usual degree and {best:.2f} times at its best one (medians)."
    )


def _left(cells: Sequence[Cell]) -> str:
    near = [c for c in cells if c["best_over_bound"] < NEAR]
    far = [c for c in cells if c["best_over_bound"] >= FAR]
    by_place = {c["concurrency"]: _median([d for d in cells if d["concurrency"] == c["concurrency"]], "best_over_bound") for c in cells}
    told = ", ".join(f"{value:.2f} at {place}" for place, value in by_place.items())
    return (
        f"**What is left after that depends on how full the GPUs are.** Stock at its best degree is within 10 % of the bound in "
        f"{_of(near, cells)}, and 1.5 times the bound or more in {_of(far, cells)}; by trajectories per GPU the median is {told}. With "
        "few, the step is one long trajectory and a replica of high degree is nearly all there is to do; with many, short ones slow the "
        "long ones down, KV runs short, and where and when a trajectory runs begins to matter."
    )


def _heddle(cells: Sequence[Cell]) -> str:
    idle = [c["heddle_best_speedup"] for c in cells if c["queue_share"] < WAITED]
    text = (
        f"**heddle decides who waits, so it needs turns that wait.** In {len(idle)} of {len(cells)} cells they hardly do at the usual "
        f"degree, and at stock's best degree it gives {min(idle):.2f} to {max(idle):.2f}. "
    )
    waiting = [c for c in cells if c["queue_share"] >= WAITED]
    if not waiting:
        return text
    parts = []
    for share in sorted({c["tool_share"] for c in waiting}):
        made = sorted(c["heddle_best_speedup"] for c in waiting if c["tool_share"] == share)
        parts.append(f"{geometric_mean(made):.2f} in the mean, {made[0]:.2f} to {made[-1]:.2f}, with {share:.0%} tool time")
    speeds = [c["heddle_best_speedup"] for c in waiting]
    gain, loss = sum(x >= SAME for x in speeds), sum(x <= 1 / SAME for x in speeds)
    return text + (
        f"In the other {len(waiting)} its speedup over stock at the same degree is {'; '.join(parts)}: 2 % faster or more in {gain}, 2 % "
        f"slower or more in {loss} (medians of three draws). What the plugin's other parts are worth: "
        "[planned placement](../bench/placement/README.md), [mixed degrees](../bench/layout/README.md), "
        "[shaping](../bench/shaping/README.md). The bound knows every length."
    )


def _tools(cells: Sequence[Cell]) -> str:
    shares = sorted({c["tool_share"] for c in cells})
    told = ", ".join(
        f"{_median([c for c in cells if c['tool_share'] == share], 'best_over_bound'):.2f} with {share:.0%}" for share in shares
    )
    return f"**Tool time leaves less to schedule**: at stock's best degree makespan / bound is {told} tool time (medians)."


def _tails(cells: Sequence[Cell]) -> str:
    sigmas = sorted({c["sigma"] for c in cells})
    first = ", ".join(f"{_median([c for c in cells if c['sigma'] == s], 'stock_over_bound'):.2f} with sigma {s:g}" for s in sigmas)
    then = ", ".join(f"{_median([c for c in cells if c['sigma'] == s], 'best_over_bound'):.2f}" for s in sigmas)
    return f"**Heavier tails** put stock at the usual degree {first} times the bound, and at its best degree {then} (medians)."


def _median(cells: Sequence[Cell], key: str) -> float:
    return median(c[key] for c in cells)


def _of(some: Sequence[Cell], every: Sequence[Cell]) -> str:
    return f"{len(some)} of {len(every)} cells"


def _assumed(known: dict[str, Any], base: float) -> str:
    draws = ", ".join(f"{count} at {place}" for place, count in known["draws"].items())
    lines = (
        f"Step times: {known['latency']}, composed from operators and not measured as steps; one node, no time between steps, no network. "
        "The simulator's error, with and without KV pressure: `bench/fidelity`.",
        f"{known['gpus']} {known['gpu'].upper()}, max_num_seqs {known['slots']}, gpu_memory_utilization {base:g}: verl's defaults. The "
        "usual degree is the smallest with room for 100,000 KV tokens, and at least 2 for Qwen3-32B.",
        "Workload: synthetic, the coding law of `verl_heddle.traces` (turns, contexts, tool answers) with log-normal lengths, 70 % of the "
        f"variance of log length between prompts, {known['samples']} samples a prompt. Sigma is the standard deviation of log length; the "
        f"mean is {known['mean_tokens']:,} tokens for every sigma before the cap of {known['cap_tokens']:,}, which lowers it for heavy "
        "tails. Public agent traces have sigma 0.5 to 0.9.",
        "Tool share: of tool + generation time if all trajectories decoded together at the usual degree; one kind of tool, log-normal, a "
        "call at most 8 times the mean. Batches shrink during the step and grow smaller while others are in tools, so the share in the "
        "simulated step differs (`tool_share_stock` in the JSON).",
        "All trajectories are submitted at once and the step ends with the last. No early stop, no redundancy.",
        f"heddle: {known['heddle']}",
        *known.get("beside", ()),
        f"Draws per cell: {draws} trajectories per GPU; medians.",
    )
    return "\n".join(f"- {line}" for line in lines)


def _table(known: dict[str, Any], cells: Sequence[Cell], show: Callable[[Cell], str]) -> str:
    at = {(c["concurrency"], c["tool_share"], c["sigma"]): c for c in cells}
    places = [(share, sigma) for share in known["tool_shares"] for sigma in known["sigmas"]]
    heads = " | ".join(f"tools {share:.0%}, sigma {sigma:g}" for share, sigma in places)
    lines = [f"| per GPU | {heads} |", "|---" * (len(places) + 1) + "|"]
    for concurrency in known["concurrency"]:
        lines.append(f"| {concurrency} | " + " | ".join(show(at[concurrency, share, sigma]) for share, sigma in places) + " |")
    return "\n".join(lines)


def _memory(known: dict[str, Any], more: Sequence[Cell], base: Sequence[Cell]) -> str:
    """The repeated part: the same draws with more KV memory."""
    first = more[0]
    old = {(c["model"], c["concurrency"]): c for c in base if c["sigma"] == first["sigma"] and c["tool_share"] == first["tool_share"]}
    change = f"{base[0]['utilization']:g} → {first['utilization']:g}"
    lines = [
        f"The same draws, sigma {first['sigma']:g}, no tools: seconds of stock at its best fixed tp with {change}; their ratio.",
        "",
        "| model | " + " | ".join(f"{value} per GPU" for value in known["concurrency"]) + " |",
        "|---" * (len(known["concurrency"]) + 1) + "|",
    ]
    for model in dict.fromkeys(c["model"] for c in more):
        row = []
        for cell in (c for c in more if c["model"] == model):
            before = old[model, cell["concurrency"]]["best_s"]
            row.append(f"{before:.0f} → {cell['best_s']:.0f}; {before / cell['best_s']:.2f}x")
        lines.append(f"| {model} | " + " | ".join(row) + " |")
    return "\n".join(lines)
