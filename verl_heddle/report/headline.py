"""The answer first: what a step takes, what would help most, and what to paste."""

from __future__ import annotations

from collections.abc import Mapping

from verl_heddle.report.explain import gain
from verl_heddle.report.study import Answer, Row, wins
from verl_heddle.report.words import listed, seconds

TP = "actor_rollout_ref.rollout.tensor_model_parallel_size={tp}"

HELPS: Mapping[str, tuple[str, str]] = {
    "stock_best_tp": ("tp={tp}", TP),
    "heddle": ("the plugin", "+plugin=heddle"),
    "heddle_best_tp": ("tp={tp} with the plugin", f"{TP} +plugin=heddle"),
    "stock_tier": ("KV offload to the host, as assumed below", "+plugin=heddle heddle.offload.enable=true"),
    "heddle_place": ("the plugin with planned placement", "+plugin=heddle heddle.place.enable=true"),
}
"""Arms that a user can have: in words, and as overrides."""

MOST = 3
"""Ways to help that are named."""


def headline(answer: Answer) -> list[str]:
    """Three lines at most. Only what is faster in every draw and by 2 % counts as help (`study.wins`)."""
    stock = answer.stock
    per = "A step" if answer.source.about["steps"] == 1 else "A step, in the mean,"
    least = seconds(answer.bound_s)
    first = f"{per} takes {seconds(stock.typical.makespan_s)} under stock verl at tp={stock.tp}; no schedule can take less than {least}."
    found = sorted(_helping(answer), key=lambda row: -row.speedup)
    if not found:
        return [first, "Nothing that was asked about is faster beyond chance."]
    told = [f"{HELPS[row.name][0].format(tp=row.tp)} {gain(row.speedups)}" for row in found[:MOST]]
    paste = HELPS[found[0].name][1].format(tp=found[0].tp)
    return [first, f"What helps most: {listed(told)}.", f"To try the first: python -m verl.trainer.main_ppo <your overrides> {paste}"]


def _helping(answer: Answer) -> list[Row]:
    rows = [answer.rows[name] for name in HELPS if name in answer.rows and wins(answer.rows[name].speedups)]
    same = {"stock_best_tp": "stock", "heddle_best_tp": "heddle"}  # where the best degree is the user's, they are one thing
    return [row for row in rows if row.name not in same or row.tp != answer.stock.tp]
