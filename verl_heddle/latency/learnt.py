"""Step times learnt from a run under way: what `calibrate` makes of its last records, bounded in cost, and refused where wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from verl_heddle.latency.calibrate import calibrate
from verl_heddle.latency.model import LatencyModel
from verl_heddle.trajectory import Trajectory

ENOUGH_TURNS = 4000
"""A second of fitting; four unknowns need far fewer. Whole replicas are taken, because a turn is explained by those beside it."""

WORST_ERROR = 0.5
"""Median error of a turn's time above which a plan made with it is no better than none; seen: 0.02 on a GPU, 0.05 to 0.2 on a CPU."""


def step_times(records: Sequence[Trajectory], tps: Mapping[str, int], known: LatencyModel | None = None) -> LatencyModel:
    """The latency model of the replicas, from what trajectories recorded live tell of their turns.

    Args:
        tps: tensor-parallel degree by replica; turns on other replicas are not looked at.
        known: where the times of degrees come from that are not among them.

    Raises:
        ValueError: of some degree there are too few usable turns, or the model explains them badly.
    """
    turns = Counter(turn.replica for record in records for turn in record.steps if turn.replica in tps)
    chosen: dict[str, int] = {}
    for replica, _ in turns.most_common():
        if replica is not None and sum(turns[name] for name, tp in chosen.items() if tp == tps[replica]) < ENOUGH_TURNS:
            chosen[replica] = tps[replica]
    told = [replace(one, steps=tuple(turn for turn in one.steps if turn.replica in chosen)) for one in records]
    model = calibrate(told, chosen, base=known, name="learnt from this run")
    for tp in set(chosen.values()):
        fit = model.engines[tp].fit
        if fit is None or not fit.median_error <= WORST_ERROR:
            error = "?" if fit is None else f"{fit.median_error:.0%}"
            raise ValueError(f"turns take {error} more or less than the model of them says")
    return model
