"""What held a step up and what to do about it, in at most four plain sentences, and one for each policy of the user's own.

Every sentence is a rule over the numbers of an `Answer`; none says more than the draws support (`study.wins`). They tell of the draw in
which stock's makespan is the median, and of the slowest step in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median_low

from verl_heddle.report.play import Run
from verl_heddle.report.rules import is_file
from verl_heddle.report.study import Answer, Row, loses, wins
from verl_heddle.report.words import count, listed, number, percent, ratio, seconds

LITTLE_LEFT = 0.9
"""From this share of the lower bound on, "little to win": below 11 % even for a perfect schedule, near what a simulator can tell."""

WAITED = 0.01
"""Share of all trajectory time spent waiting for a slot below which nobody waited: the order of the queue cannot matter then."""


def explain(answer: Answer) -> list[str]:
    """Where the time goes, why, what to do, what heddle and one's own policies do: in this order, as far as the arms are there."""
    return [situation(answer), cause(answer), *_remedy(answer), *_heddle(answer), *_own(answer)]


def situation(answer: Answer) -> str:
    """How far stock is from the bound, and what the bound is."""
    stock, low = answer.stock, answer.worst_bound
    reason = (
        "the longest trajectory, alone on a replica of its best tp, takes that long"
        if low.longest_s >= low.work_s
        else "there is that much work for all GPUs together"
    )
    per_step = " a step" if answer.source.about["steps"] > 1 else ""
    return (
        f"Stock verl at tp={stock.tp} takes {seconds(stock.typical.makespan_s)}{per_step}; no schedule on these {answer.setting.gpus} GPUs "
        f"can take less than {seconds(answer.bound_s)}, because {reason}."
    )


def cause(answer: Answer) -> str:
    """What the trajectory that ended last did with its time."""
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
        f"replicas had nothing to do {percent(run.idle_share)} of the time."
    )


def spent(parts: Sequence[tuple[float, str]], total_s: float) -> str:
    """Where somebody's time went, for example "3.20 s generating and 1.10 s in tools"; parts below 1 % are left out."""
    told = [f"{number(value)} s {what}" for value, what in parts if value >= 0.01 * total_s]
    return listed(told) if told else "nothing on record"


def _remedy(answer: Answer) -> list[str]:
    best = answer.rows.get("stock_best_tp")
    if best is None:
        return []
    setting = answer.setting
    if best.tp != setting.tp and wins(best.speedups):
        text = (
            f"Set tensor_model_parallel_size={best.tp}: stock verl alone is then {gain(best.speedups)} as fast"
            f"{_reached(best)}. No plugin is needed for that"
        )
    elif best.tp != setting.tp:
        text = f"Another fixed tp does not help beyond chance (the best, tp={best.tp}, gives {ratio(best.speedup)})"
    elif len(setting.tps) == 1:
        text = f"tp={setting.tp} is the only fixed degree that works here"
    else:
        text = f"tp={setting.tp} is already the best fixed degree"
    return [text + _pressure(best, answer) + _tools(best) + "."]


def _reached(row: Row) -> str:
    return f", {percent(row.bound_fraction)} of the bound" + (", so little is left to win" if row.bound_fraction >= LITTLE_LEFT else "")


def _pressure(row: Row, answer: Answer) -> str:
    """A hint at slots or KV memory where turns wait for them."""
    run: Run = row.typical
    if run.queue_share < 0.05:
        return ""
    waited = f"; at tp={row.tp} turns still spend {percent(run.queue_share)} of all time waiting"
    if run.preemptions or not crowded(answer, row.tp):
        lost = f", and {count(run.preemptions)} lost their slot to KV pressure" if run.preemptions else " for KV cache"
        return f"{waited}{lost}: raise gpu_memory_utilization ({answer.setting.utilization:g} here)"
    return f"{waited} for one of {answer.setting.slots} slots: try a larger max_num_seqs (--slots)"


def crowded(answer: Answer, tp: int) -> bool:
    """Whether a replica of that degree gets more trajectories than it has slots; if not, whoever waits waits for KV cache."""
    largest = max(len(step) for step in answer.source.draws[answer.typical].steps)
    return largest * tp > answer.setting.slots * answer.setting.gpus


def _tools(row: Row) -> str:
    """A hint where nothing but faster tools would help."""
    share = row.typical.last.tail["tool_s"] / row.typical.last.makespan_s
    return f"; {percent(share)} of its length at tp={row.tp} is tool time, which only faster tools shorten" if share >= 0.5 else ""


def _heddle(answer: Answer) -> list[str]:
    row = answer.rows.get("heddle_best_tp") or answer.rows.get("heddle")
    if row is None:
        return []
    base = answer.rows.get("stock_best_tp") if row.name == "heddle_best_tp" else None
    ratios = row.ratios(base)
    where = f"at tp={row.tp}"
    if wins(ratios):
        why = "contexts stay in the KV cache between turns, where stock reads them again"
        return [f"heddle makes the step {gain(ratios)} as fast as stock {where}: {why}."]
    if loses(ratios):
        return [f"heddle loses here: {gain(ratios)} of stock's speed {where}. Use +plugin=observe."]
    other = row.stock if base is None else base.runs
    if median_low(run.queue_share for run in other) < WAITED:
        return [f"heddle changes nothing {where}: every turn finds room, and only where turns wait is there something to decide."]
    limit = answer.rows.get("lpt_oracle")
    hope = f"; with the lengths known in advance, longest first gives {ratio(limit.speedup)} at tp={limit.tp}" if limit else ""
    return [f"heddle gives {gain(ratios)} {where}, no difference beyond chance{hope}."]


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
