"""One recorded step, played as it ran and under the other rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import median

from verl_heddle.options import Options
from verl_heddle.report.recorded import Engines, Machine, calibrated, engines_of, overhead_s, ready
from verl_heddle.simulate.baselines import Stock
from verl_heddle.trajectory import Trajectory
from verl_heddle.twin import MOST_ERROR

PLAYS, LARGE = 5, 50_000
"""Draws of the random ties that a rule is played with, the median counts; from so many turns on one, as ties then hardly matter."""

MOST_TURNS = 100_000
"""Turns that are played at most: of a larger step some of its prompts, on as many of its replicas (bench/auto shows the difference)."""


def judge(step: Sequence[Trajectory]) -> dict[str, float]:
    """Numbers of one synchronous step; seconds.

    `error`: simulated over measured makespan of the step as it ran, less 1 (of what is played of it, `sampled`). Where that is at most
    `MOST_ERROR`, also `stock_s` and `heddle_s`, of which the one that ran is as measured and the other is measured times the simulated
    ratio; `speedup`, the first over the second; and `bound_s`, which no schedule on these engines could beat.

    Args:
        step: the training trajectories as recorded live, `meta` telling of the engines.

    Raises:
        ValueError: the step cannot be played: too few turns to calibrate from, no lengths, contexts that fit no replica.
    """
    whole = [item for item in step if item.meta.get("outcome", "finished") == "finished"]
    if len(whole) < len(step):
        raise ValueError("trajectories of it were cut short")
    engines = engines_of(whole)
    latency = calibrated([whole], engines.tp)
    bound_s = Machine(engines, latency, (engines.tp,)).bound(whole).makespan_s
    began_s = min(item.meta["start_s"] for item in whole)
    measured_s = max(item.meta["end_s"] for item in whole) - began_s
    whole, engines = sampled(whole, engines)
    machine = Machine(engines, latency, (engines.tp,))
    took = max(item.meta["end_s"] for item in whole) - began_s
    work, lost = ready(whole), overhead_s(whole)
    seeds = range(1 if turns_of(work) >= LARGE else PLAYS)

    def stock() -> float:
        return median(machine.run(work, Stock(seed), overhead=lost).makespan_s for seed in seeds)

    def heddle(order: str) -> float:
        return median(machine.run(work, machine.admitting(order, seed), order="priority", overhead=lost).makespan_s for seed in seeds)

    own = heddle(engines.residents) if engines.residents else machine.replayed(whole).makespan_s
    error = own / took - 1.0
    if abs(error) > MOST_ERROR:
        return {"error": error}
    plain = is_stocks(whole, engines)
    other = heddle(Options().residents.order) if plain else stock()
    scaled = measured_s * other / own
    stock_s, heddle_s = (measured_s, scaled) if plain else (scaled, measured_s)
    return {"error": error, "stock_s": stock_s, "heddle_s": heddle_s, "speedup": stock_s / heddle_s, "bound_s": bound_s}


def turns_of(step: Sequence[Trajectory]) -> int:
    """Turns of all trajectories."""
    return sum(len(item.steps) for item in step)


def is_stocks(step: Sequence[Trajectory], engines: Engines) -> bool:
    """Whether verl's own rule decided: stock, `+plugin=observe`, or resident sets that rested."""
    ordered = engines.order != "fcfs" and any(turn.priority for item in step for turn in item.steps)
    return not (engines.residents or engines.preempt or engines.per_slot or ordered)


def sampled(step: Sequence[Trajectory], engines: Engines, most_turns: int = MOST_TURNS) -> tuple[list[Trajectory], Engines]:
    """Of a step with more turns, every so many-th prompt, on that share of the replicas: what a replica has to do stays what it was."""
    replicas = max(1, min(engines.replicas, engines.replicas * most_turns // max(1, turns_of(step))))
    prompts = list(dict.fromkeys(item.prompt_id for item in step))
    share = replicas / engines.replicas
    kept = {name for number, name in enumerate(prompts) if int((number + 1) * share) > int(number * share)}
    if not kept:
        return list(step), engines
    return [item for item in step if item.prompt_id in kept], replace(engines, replicas=replicas)
