"""Step times learnt from a run under way: what `calibrate` makes of its last records, bounded in cost, and refused where wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from verl_heddle.latency.calibrate import calibrate
from verl_heddle.latency.model import LatencyModel
from verl_heddle.trajectory import Trajectory

ENOUGH_TURNS = 4000
"""A second of fitting; four unknowns need far fewer. Whole replicas are taken, because a turn is explained by those beside it."""

WORST_ERROR = 0.5
"""Median error of a turn's time above which a plan made with it is no better than none; seen: 0.02 on a GPU, 0.05 to 0.2 on a CPU."""


def step_times(records: Sequence[Trajectory], tp: int) -> LatencyModel:
    """The latency model of replicas of one degree, from what trajectories recorded live tell of their turns.

    Raises:
        ValueError: there are too few usable turns, or the model explains them badly.
    """
    turns = Counter(turn.replica for record in records for turn in record.steps if turn.replica is not None)
    chosen: set[str] = set()
    for replica, _ in turns.most_common():
        if sum(turns[name] for name in chosen) < ENOUGH_TURNS:
            chosen.add(replica)
    told = [record for record in records if any(turn.replica in chosen for turn in record.steps)]
    model = calibrate(told, tp, name="learnt from this run")
    fit = model.engines[tp].fit
    if fit is None or not fit.median_error <= WORST_ERROR:
        raise ValueError(f"turns take {'?' if fit is None else format(fit.median_error, '.0%')} more or less than the model of them says")
    return model
