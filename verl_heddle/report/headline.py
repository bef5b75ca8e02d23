"""The answer first: what a step takes, what would help most, and what to paste."""

from __future__ import annotations

from collections.abc import Mapping
from shlex import quote

from verl_heddle.report.advice import Advice
from verl_heddle.report.explain import gain
from verl_heddle.report.study import Answer, Row, wins
from verl_heddle.report.words import listed, number, seconds

TP = "actor_rollout_ref.rollout.tensor_model_parallel_size={tp}"

HELPS: Mapping[str, tuple[str, str]] = {
    "stock_best_tp": ("tp={tp}", TP),
    "heddle": ("the plugin", "+plugin=heddle"),
    "heddle_best_tp": ("tp={tp} with the plugin", f"{TP} +plugin=heddle"),
    "stock_tier": ("KV offload to the host (as assumed below)", "+plugin=heddle heddle.offload.enable=true"),
    "heddle_place": ("the plugin with planned placement", "+plugin=heddle heddle.place.enable=true"),
}
"""Arms that a user can have: in words, and as overrides."""

COMMAND = "python -m verl.trainer.main_ppo <your overrides>"

NOTHING = "Nothing that was asked about is faster beyond chance."
NOTHING_BY_WORTH = "Nothing that was asked about is 2 % faster or more."

MOST = 3
"""Ways to help that are named."""


def headline(answer: Answer) -> list[str]:
    """Three lines at most. Only what is faster in every draw and by 2 % counts as help (`study.wins`)."""
    stock = answer.stock
    first = _takes(answer)
    found = sorted(_helping(answer), key=lambda row: -row.speedup)
    if not found:
        return [first, NOTHING if len(stock.runs) > 1 else NOTHING_BY_WORTH]
    told = [f"{HELPS[row.name][0].format(tp=row.tp)} {gain(row.speedups)}" for row in found[:MOST]]
    paste = HELPS[found[0].name][1].format(tp=found[0].tp)
    return [first, f"What helps most: {listed(told)}.", f"To try the first: {COMMAND} {paste}"]


def plan_headline(answer: Answer, advice: Advice) -> list[str]:
    """The same of a plan: of each rule its fastest row, and the advice to paste."""
    first = _takes(answer)
    fastest: dict[str, Row] = {}
    for row in answer.rows.values():
        mine = (row.rule, row.tp) == ("stock", answer.setting.tp)
        if not mine and wins(row.speedups) and (row.rule not in fastest or row.speedup > fastest[row.rule].speedup):
            fastest[row.rule] = row
    degree, plugin = fastest.get("stock"), fastest.get("heddle")
    if degree is not None and plugin is not None and plugin.tp == degree.tp and not wins(plugin.ratios(degree)):
        del fastest["heddle"]  # the degree does it alone
    found = sorted(fastest.values(), key=lambda row: -row.speedup)
    second = f"What helps most: {listed([f'{_words(row, answer)} {gain(row.speedups)}' for row in found[:MOST]])}." if found else NOTHING
    return [first, second, f"Advised: {COMMAND} {' '.join(map(quote, advice.overrides))}"]


def _takes(answer: Answer) -> str:
    stock = answer.stock
    per = "A step" if answer.source.about["steps"] == 1 else "A step, in the mean,"
    return (
        f"{per} takes {seconds(stock.typical.makespan_s)} under stock verl at tp={stock.tp} ({number(stock.gpu_hours)} GPU-hours, "
        f"{number(stock.gpu_hours_per_1000)} per thousand trajectories); no schedule can take less than {seconds(answer.bound_s)}."
    )


def _words(row: Row, answer: Answer) -> str:
    """A row of a plan."""
    if row.layout:
        return f"the plugin on degrees {row.degrees}"
    if row.rule in HELPS:
        return HELPS["heddle_best_tp" if row.rule == "heddle" and row.tp != answer.setting.tp else row.rule][0].format(tp=row.tp)
    return f"tp={row.tp}"


def _helping(answer: Answer) -> list[Row]:
    rows = [answer.rows[name] for name in HELPS if name in answer.rows and wins(answer.rows[name].speedups)]
    best = answer.rows.get("stock_best_tp")
    if best is not None:
        if best.tp == answer.stock.tp:  # one thing, not two
            return [row for row in rows if not row.name.endswith("_best_tp")]
        if "heddle_best_tp" in answer.rows and not wins(answer.rows["heddle_best_tp"].ratios(best)):  # the degree does it alone
            return [row for row in rows if row.name != "heddle_best_tp"]
    return rows
