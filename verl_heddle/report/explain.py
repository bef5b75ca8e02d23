"""Explain what delayed a step and what to do about it, in at most four sentences, plus one for each user policy.

Each sentence is a rule over the numbers of an `Answer`; no sentence claims more than the draws support (`study.wins`). The sentences
describe the draw in which stock's makespan is the median, and the slowest step of that draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median_low

from verl_heddle.report.play import Run
from verl_heddle.report.rules import is_file
from verl_heddle.report.study import Answer, Row, loses, wins
from verl_heddle.report.words import count, listed, number, percent, ratio, seconds

LITTLE_LEFT = 0.9
"""Share of the lower bound from which little is left to gain: even a perfect schedule gains below 11 %, near a simulator's accuracy."""

WAITED = 0.01
"""Share of all trajectory time spent waiting for a slot below which queueing counts as absent: the queue's order then cannot matter."""


def explain(answer: Answer) -> list[str]:
    """Where the time goes, why, what to do, and what heddle and user policies gain, in this order; arms not simulated are skipped."""
    return [situation(answer), cause(answer), *_remedy(answer), *_heddle(answer), *_own(answer)]


def situation(answer: Answer) -> str:
    """How far stock is from the lower bound, and what sets the bound."""
    stock, low = answer.stock, answer.worst_bound
    reason = (
        "the longest trajectory, alone on a replica of its best tp, takes that long"
        if low.longest_s >= low.work_s
        else "the total work takes all GPUs together that long"
    )
    per_step = " a step" if answer.source.about["steps"] > 1 else ""
    return (
        f"Stock verl at tp={stock.tp} takes {seconds(stock.typical.makespan_s)}{per_step}; no schedule on these {answer.setting.gpus} GPUs "
        f"can take less than {seconds(answer.bound_s)}, because {reason}."
    )


def cause(answer: Answer) -> str:
    """How the trajectory that ended last spent its time."""
    run = answer.stock.typical
    last = run.last
    own = max(0.0, last.alone_s - last.tail["tool_s"] - last.tail["other_s"])
    parts = [
        (own, f"generating its own tokens at tp={run.tp}"),
        (last.shared_s, "slowed down by others on its replica"),
        (last.tail["queue_s"], "waiting for a slot or for KV cache"),
        (last.tail["tool_s"], "in tools"),
        (last.tail["other_s"], "between turns"),
    ]
    turns = f"{last.turns} turn{'s' if last.turns > 1 else ''}"
    where = "In the slowest step the" if answer.source.about["steps"] > 1 else "The"
    return (
        f"{where} trajectory that ended last ({last.tokens:,} tokens in {turns}) spent {spent(parts, last.makespan_s)}; meanwhile the "
        f"replicas were idle {percent(run.idle_share)} of the time."
    )


def spent(parts: Sequence[tuple[float, str]], total_s: float) -> str:
    """A split of time, for example "3.20 s generating and 1.10 s in tools"; parts below 1 % are left out."""
    shown = [f"{number(value)} s {what}" for value, what in parts if value >= 0.01 * total_s]
    return listed(shown) if shown else "no recorded time"


def _remedy(answer: Answer) -> list[str]:
    best = answer.rows.get("stock_best_tp")
    if best is None:
        return []
    setting = answer.setting
    if best.tp != setting.tp and wins(best.speedups):
        text = (
            f"Set tensor_model_parallel_size={best.tp}: stock verl alone is then {gain(best.speedups)} as fast"
            f"{_reached(best)}. This needs no plugin"
        )
    elif best.tp != setting.tp:
        text = f"A different fixed tp does not help beyond chance (the best, tp={best.tp}, gives {ratio(best.speedup)})"
    elif len(setting.tps) == 1:
        text = f"tp={setting.tp} is the only fixed degree that works here"
    else:
        text = f"tp={setting.tp} is already the best fixed degree"
    return [text + _pressure(best, answer) + _tools(best) + "."]


def _reached(row: Row) -> str:
    return f", {percent(row.bound_fraction)} of the bound" + (", so little is left to gain" if row.bound_fraction >= LITTLE_LEFT else "")


def _pressure(row: Row, answer: Answer) -> str:
    """A hint about slots or KV memory, if turns wait for them."""
    run: Run = row.typical
    if run.queue_share < 0.05:
        return ""
    waited = f"; at tp={row.tp} turns still spend {percent(run.queue_share)} of all time waiting"
    if run.preemptions or not crowded(answer, row.tp):
        detail = f", with {count(run.preemptions)} preemptions from KV pressure" if run.preemptions else " for KV cache"
        return f"{waited}{detail}: raise gpu_memory_utilization ({answer.setting.utilization:g} here)"
    return f"{waited} for one of {answer.setting.slots} slots: try a larger max_num_seqs (--slots)"


def crowded(answer: Answer, tp: int) -> bool:
    """Whether a replica of that degree gets more trajectories than it has slots; if not, waiting turns wait for KV cache."""
    largest = max(len(step) for step in answer.source.draws[answer.typical].steps)
    return largest * tp > answer.setting.slots * answer.setting.gpus


def _tools(row: Row) -> str:
    """A hint if only faster tools would help."""
    share = row.typical.last.tail["tool_s"] / row.typical.last.makespan_s
    return f"; at tp={row.tp} {percent(share)} of the step is tool time, which only faster tools shorten" if share >= 0.5 else ""


def _heddle(answer: Answer) -> list[str]:
    row = answer.rows.get("heddle_best_tp") or answer.rows.get("heddle")
    if row is None:
        return []
    base = answer.rows.get("stock_best_tp") if row.name == "heddle_best_tp" else None
    ratios = row.ratios(base)
    where = f"at tp={row.tp}"
    if wins(ratios):
        why = "contexts stay in the KV cache between turns, while stock recomputes them"
        return [f"heddle makes the step {gain(ratios)} as fast as stock {where}: {why}."]
    if loses(ratios):
        return [f"heddle is slower here: {gain(ratios)} of stock's speed {where}. Use +plugin=observe."]
    other = row.stock if base is None else base.runs
    if median_low(run.queue_share for run in other) < WAITED:
        return [f"heddle changes nothing {where}: turns do not wait for a slot or KV cache, so there is nothing to schedule."]
    limit = answer.rows.get("lpt_oracle")
    oracle = f"; with the lengths known in advance, longest first gives {ratio(limit.speedup)} at tp={limit.tp}" if limit else ""
    return [f"heddle gives {gain(ratios)} {where}, no difference beyond chance{oracle}."]


def _own(answer: Answer) -> list[str]:
    lines = []
    for name, row in answer.rows.items():
        if is_file(name):
            if wins(row.speedups):
                verdict = "faster than stock"
            elif loses(row.speedups):
                verdict = "slower than stock"
            else:
                verdict = "no difference beyond chance"
            lines.append(f"{name} gives {gain(row.speedups)} at tp={row.tp}: {verdict}.")
    return lines


def gain(ratios: list[float]) -> str:
    """For example "1.94x (1.87 to 2.09 over 3 draws)"."""
    middle, low, high = median_low(ratios), min(ratios), max(ratios)
    plain = ratio(middle)
    return plain if f"{low:.2f}" == f"{high:.2f}" else f"{plain} ({low:.2f} to {high:.2f} over {len(ratios)} draws)"
