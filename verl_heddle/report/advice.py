"""Choose the tensor-parallel degree and settings from a `study.ranking`, for `verl-heddle plan`.

The user's degree stays unless a different one wins (`study.wins`: faster in every draw, and by enough). Heddle is recommended on the same
terms, and so are mixed degrees, against the fastest row with a single degree. If turns wait in the chosen arm, more slots or more KV memory
are tried as well.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import median_low

from verl_heddle.report.explain import cause, crowded, gain, situation
from verl_heddle.report.pool import Pool
from verl_heddle.report.setting import Setting
from verl_heddle.report.study import MIXED, Answer, Row, loses, wins
from verl_heddle.report.words import percent, ratio, seconds

WAITS = 0.05
"""Share of all trajectory time spent waiting from which more slots or KV memory are worth a trial."""

MORE_MEMORY = 0.8
"""gpu_memory_utilization to try, as in many verl recipes; only the user knows whether the trainer leaves that much."""

ROLLOUT = "actor_rollout_ref.rollout"


@dataclass(frozen=True)
class Trial:
    """The chosen arm with one setting changed. `ratios`: step time of the chosen arm over that of the trial, by draw."""

    name: str
    value: str
    ratios: list[float]
    safe: bool
    """Whether it can be recommended without knowing the rest of the job."""


@dataclass(frozen=True)
class Advice:
    """The recommendation. `row`: the chosen arm; `heddle`: whether heddle is recommended."""

    row: Row
    heddle: bool
    trials: tuple[Trial, ...]

    @property
    def settings(self) -> dict[str, str]:
        """Keys and values to set, without the plugin's own override."""
        if self.row.layout:
            degrees = f"[{','.join(map(str, self.row.layout))}]"
            chosen = {f"{ROLLOUT}.tensor_model_parallel_size": "1", "heddle.place.enable": "true"}  # required by a layout
            chosen |= {"heddle.layout.enable": "true", "heddle.layout.fixed": degrees}
        else:
            chosen = {f"{ROLLOUT}.tensor_model_parallel_size": str(self.row.tp)}
        return chosen | {f"{ROLLOUT}.{trial.name}": trial.value for trial in self.trials if trial.safe and wins(trial.ratios)}

    @property
    def overrides(self) -> list[str]:
        """Overrides to append to a verl command."""
        return [*(f"{key}={value}" for key, value in self.settings.items()), f"+plugin={'heddle' if self.heddle else 'observe'}"]


def advise(answer: Answer, jobs: int | None = None) -> Advice:
    """Choose from the rows of a `ranking`, and try more slots or memory if turns wait."""
    stocks = [row for row in answer.rows.values() if row.rule == "stock" and row.name != "stock"]
    heddles = {row.tp: row for row in answer.rows.values() if row.rule == "heddle"}
    stock = min(stocks, key=lambda row: (row.typical.makespan_s, row.tp))
    if not wins(stock.speedups):
        stock = next(row for row in stocks if row.tp == answer.setting.tp)
    best = min(heddles.values(), key=lambda row: (row.typical.makespan_s, row.tp))
    chosen, heddle = (best, True) if wins(best.ratios(stock)) else (stock, False)
    mixed = answer.rows.get(MIXED)
    if mixed is not None and wins(mixed.ratios(_fastest(answer))):
        chosen, heddle = mixed, True
    return Advice(chosen, heddle, tuple(_trials(answer, chosen, jobs)))


def _fastest(answer: Answer) -> Row:
    """The fastest row with a single degree under stock or heddle."""
    fixed = [row for row in answer.rows.values() if row.rule in ("stock", "heddle")]
    return min(fixed, key=lambda row: row.typical.makespan_s)


def told(answer: Answer, advice: Advice) -> list[str]:
    """The advice as sentences, reasons first."""
    row, tp = advice.row, answer.setting.tp
    lines = [situation(answer), cause(answer)]
    if row.layout:
        best = _fastest(answer)
        lines.append(
            f"Mix degrees, {row.degrees}: {gain(row.speedups)} as fast as stock at tp={tp}, {gain(row.ratios(best))} as fast as the best "
            f"fixed degree ({best.rule}, tp={best.tp}), {percent(row.bound_fraction)} of the bound. With "
            f"heddle.layout.times={answer.setting.model.replace(' on ', '/').lower()} instead of heddle.layout.fixed the plugin chooses "
            "a layout between steps."
        )
        return lines + [_trial_sentence(trial, answer.setting) for trial in advice.trials]
    if row.tp != tp:
        lines.append(f"Use tp={row.tp}: {gain(row.speedups)} as fast as stock at tp={tp}, {percent(row.bound_fraction)} of the bound.")
    else:
        lines.append(f"Stay at tp={tp}: no other fixed degree is faster beyond chance.")
    stock = answer.rows[f"stock_tp{row.tp}"]
    ratios = answer.rows[f"heddle_tp{row.tp}"].ratios(stock)
    if advice.heddle:
        lines.append(f"Switch heddle on: at tp={row.tp} it makes the step {gain(ratios)} as fast as stock.")
    else:
        verdict = "is slower than stock" if loses(ratios) else "makes no difference beyond chance"
        lines.append(f"heddle {verdict} at tp={row.tp}: {gain(ratios)}. +plugin=observe keeps verl's decisions and shows the step.")
    lines += _mixed_reason(answer)
    return lines + [_trial_sentence(trial, answer.setting) for trial in advice.trials]


def _mixed_reason(answer: Answer) -> list[str]:
    """Why mixing degrees is not recommended; empty if there is only one degree."""
    mixed = answer.rows.get(MIXED)
    if mixed is None:
        return ["Do not mix degrees: a single degree is forecast to be as good."] if len(answer.setting.bound_tps) > 1 else []
    best = _fastest(answer)
    ratios = mixed.ratios(best)
    verdict = "is slower than" if loses(ratios) else "makes no difference beyond chance to"
    return [f"Do not mix degrees: {mixed.degrees} {verdict} the best fixed degree ({best.rule}, tp={best.tp}): {gain(ratios)}."]


def why(row: Row) -> str:
    """The two largest shares of the last trajectory's time, for a column of the ranking."""
    last = row.typical.last
    own = max(0.0, last.alone_s - last.tail["tool_s"] - last.tail["other_s"])
    parts = {
        f"its own tokens at tp={row.tp}" if not row.layout else "its own tokens": own,
        "sharing a replica": last.shared_s,
        "waiting": last.tail["queue_s"],
        "tools": last.tail["tool_s"],
        "between turns": last.tail["other_s"],
    }
    most = sorted(parts.items(), key=lambda part: -part[1])[:2]
    return ", ".join(f"{percent(value / last.makespan_s)} {name}" for name, value in most if value > 0.01 * last.makespan_s)


def _trials(answer: Answer, chosen: Row, jobs: int | None) -> list[Trial]:
    setting, run = answer.setting, chosen.typical
    if run.queue_share < WAITS:
        return []
    tried: list[tuple[str, str, Setting, bool]] = []
    short = bool(run.preemptions) or not crowded(answer, chosen.tp)
    if crowded(answer, chosen.tp):
        tried.append(("max_num_seqs", str(2 * setting.slots), replace(setting, slots=2 * setting.slots), True))
    if short and setting.utilization < MORE_MEMORY:
        tried.append(("gpu_memory_utilization", f"{MORE_MEMORY:g}", replace(setting, utilization=MORE_MEMORY), False))
    trials = []
    for name, value, changed, safe in tried:
        with Pool(changed, answer.source.draws, 1, jobs) as pool:
            runs = pool.runs([(chosen.rule, chosen.tp)])[chosen.rule, chosen.tp]
        ratios = [before.step_s / after.step_s for before, after in zip(chosen.runs, runs, strict=True)]
        trials.append(Trial(name, value, ratios, safe))
    return trials


def _trial_sentence(trial: Trial, setting: Setting) -> str:
    old = setting.slots if trial.name == "max_num_seqs" else f"{setting.utilization:g}"
    if not wins(trial.ratios):
        return f"{trial.name}={trial.value} instead of {old} does not help beyond chance ({ratio(median_low(trial.ratios))})."
    condition = "" if trial.safe else ", if the trainer's memory allows it"
    return f"With {trial.name}={trial.value} instead of {old} the step is a further {gain(trial.ratios)} as fast{condition}."


def forecast(answer: Answer, advice: Advice) -> str:
    """One line: step time now and with the recommendation, weight sync included."""
    now, then = answer.stock.typical.step_s, advice.row.typical.step_s
    return f"forecast: {seconds(now)} now (stock, tp={answer.setting.tp}), {seconds(then)} as recommended ({ratio(advice.row.speedup)})"
