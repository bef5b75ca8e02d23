"""Judges one recorded step: plays it as it ran and under the other rule."""

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
"""Plays of a rule with different random ties, of which the median counts. From `LARGE` turns on there is one, as ties hardly matter."""

MOST_TURNS = 100_000
"""Maximum turns to play. Of a larger step, a share of the prompts is played on that share of the replicas (bench/auto has the error)."""


def judge(step: Sequence[Trajectory]) -> dict[str, float]:
    """Makespans of one synchronous step under both rules, in seconds.

    `error`: simulated over measured makespan of the step as it ran, less 1 (of the part that is played, `sampled`). If it is at most
    `MOST_ERROR`, also: `stock_s` and `heddle_s`, one of them measured and the other the measured time multiplied by the simulated ratio;
    `speedup`, the first over the second; and `bound_s`, a lower bound for every schedule on these engines.

    Args:
        step: the training trajectories as recorded live, with the engines in `meta`.

    Raises:
        ValueError: the step cannot be played: too few turns to calibrate from, no lengths, or contexts that fit no replica.
    """
    whole = [item for item in step if item.meta.get("outcome", "finished") == "finished"]
    if len(whole) < len(step):
        raise ValueError("some of its trajectories were cut short")
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
    """Whether verl's own rule decided: stock verl, `+plugin=observe`, or resting resident sets."""
    ordered = engines.order != "fcfs" and any(turn.priority for item in step for turn in item.steps)
    return not (engines.residents or engines.preempt or engines.per_slot or ordered)


def sampled(step: Sequence[Trajectory], engines: Engines, most_turns: int = MOST_TURNS) -> tuple[list[Trajectory], Engines]:
    """The step, cut to `most_turns`: a share of its prompts at equal distances, on that share of the replicas, so the load of each stays
    the same."""
    replicas = max(1, min(engines.replicas, engines.replicas * most_turns // max(1, turns_of(step))))
    prompts = list(dict.fromkeys(item.prompt_id for item in step))
    share = replicas / engines.replicas
    kept = {name for number, name in enumerate(prompts) if int((number + 1) * share) > int(number * share)}
    if not kept:
        return list(step), engines
    return [item for item in step if item.prompt_id in kept], replace(engines, replicas=replicas)
