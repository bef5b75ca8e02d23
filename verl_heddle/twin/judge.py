"""One recorded step, played as it ran and under the other rule."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from verl_heddle.options import Options
from verl_heddle.report.recorded import Machine, calibrated, engines_of, overhead_s, ready
from verl_heddle.simulate.baselines import Stock
from verl_heddle.trajectory import Trajectory
from verl_heddle.twin import MOST_ERROR

PLAYS, LARGE = 5, 50_000
"""Draws of the random ties that a rule is played with, the median counts; from so many turns on one, as ties then hardly matter."""


def judge(step: Sequence[Trajectory]) -> dict[str, float]:
    """Numbers of one synchronous step; seconds.

    `error`: simulated over measured makespan of the step as it ran, less 1. Where that is at most `MOST_ERROR`, also `stock_s` and
    `heddle_s`, of which the one that ran is as measured and the other is measured times the simulated ratio; `speedup`, the first over the
    second; and `bound_s`, which no schedule on these engines could beat.

    Args:
        step: the training trajectories as recorded live, `meta` telling of the engines.

    Raises:
        ValueError: the step cannot be played: too few turns to calibrate from, no lengths, contexts that fit no replica.
    """
    whole = [item for item in step if item.meta.get("outcome", "finished") == "finished"]
    if len(whole) < len(step):
        raise ValueError("trajectories of it were cut short")
    engines = engines_of(whole)
    machine = Machine(engines, calibrated([whole], engines.tp), (engines.tp,))
    took = max(item.meta["end_s"] for item in whole) - min(item.meta["start_s"] for item in whole)
    work, lost = ready(whole), overhead_s(whole)
    seeds = range(1 if sum(len(item.steps) for item in work) >= LARGE else PLAYS)

    def stock() -> float:
        return median(machine.run(work, Stock(seed), overhead=lost).makespan_s for seed in seeds)

    def heddle(order: str) -> float:
        return median(machine.run(work, machine.admitting(order, seed), order="priority", overhead=lost).makespan_s for seed in seeds)

    own = heddle(engines.residents) if engines.residents else machine.replayed(whole).makespan_s
    error = own / took - 1.0
    if abs(error) > MOST_ERROR:
        return {"error": error}
    stocks = engines.order == "fcfs" and not engines.residents
    other = heddle(Options().residents.order) if stocks else stock()
    scaled = took * other / own
    stock_s, heddle_s = (took, scaled) if stocks else (scaled, took)
    bound = machine.bound(whole).makespan_s
    return {"error": error, "stock_s": stock_s, "heddle_s": heddle_s, "speedup": stock_s / heddle_s, "bound_s": bound}
