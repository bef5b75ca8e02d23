"""The planner between steps: never a layout that cannot be, never back and forth, and as good as trying everything."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layout_cases import DENSE, HABIT, SPARSE, best_cut, site, sized, tempos

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from bench.layout.exhaustive import layouts
from verl_heddle.latency import LatencyModel
from verl_heddle.layout.feasible import problems
from verl_heddle.layout.planner import LayoutReason, choose
from verl_heddle.layout.price import coming, grouped_s, priced
from verl_heddle.place.outlook import drain_s
from verl_heddle.place.robust import plan

STEP = coming(np.exp(np.random.default_rng(0).normal(8, 1, 60)), 0.2, 40_960)
TAIL = coming([40_000.0] + [2000.0] * 500, 0.02, 40_960)
"""One long trajectory and a crowd: mixed degrees by construction, with degrees of falling efficiency."""

WASTEFUL = LatencyModel.affine(0.01, 0.0005, tps=(1, 2, 4, 8), speedup={2: 1.5, 4: 2.6, 8: 3.0}, weight_load_s=2.0)

steps = st.builds(
    coming,
    st.lists(st.floats(50, 3e4), min_size=1, max_size=7),
    st.floats(0, 1.0),
    st.just(40_960.0),
)


@settings(max_examples=60, deadline=None)
@given(steps, st.integers(1, 5), st.sampled_from([(1,), (1, 2), (1, 2, 4), (2, 4)]))
def test_free_layout_is_as_good_as_every_layout_and_cut(step, gpus, tps):
    tps = [tp for tp in tps if tp <= gpus]
    every = layouts(tps, gpus)
    if not every:
        return
    times = tempos(DENSE, tps, 8)
    best = min(best_cut(step, one, times) for one in every)
    found = plan(step.medians, step.rows, times, gpus=gpus)
    assert sorted(i for group in found.groups for i in group) == list(range(len(step.medians)))
    assert sum(found.layout) <= gpus
    assert best * (1 - 1e-9) <= found.forecast_s <= best * 1.05 + 1e-6


@settings(max_examples=40, deadline=None)
@given(steps, st.sampled_from([(2, 1), (1, 1, 1), (4, 2, 1), (2, 2, 1)]))
def test_a_given_layout_is_as_good_as_every_cut(step, layout):
    times = tempos(DENSE, sorted(set(layout)), 8)
    found = plan(step.medians, step.rows, times, layout=layout)
    best = best_cut(step, layout, times)
    assert found.layout == layout
    assert best * (1 - 1e-9) <= found.forecast_s <= best * 1.05 + 1e-6
    costs = [drain_s(step.rows[list(group)].sum(axis=0), times[tp]) for group, tp in zip(found.groups, layout, strict=True) if group]
    assert found.forecast_s == pytest.approx(max(costs))


@settings(max_examples=40, deadline=None)
@given(
    steps,
    st.integers(0, 2**31),
    st.sampled_from([(4, 4), (8, 8), (8, 4), (6, 3)]),
    st.floats(0, 0.2),
    st.floats(0, 20),
    st.floats(0, 1e3),
    st.sampled_from([DENSE, SPARSE]),
)
def test_what_is_returned_can_be_and_stays(step, seed, shape, margin, horizon, cost, latency):
    gpus, node = shape
    where = site(latency, gpus, node)
    every = layouts([tp for tp in (1, 2, 4) if node % tp == 0], gpus)
    here = every[seed % len(every)]
    seen = [sorted(here)]
    for _ in range(6):
        choice = choose(step, where, HABIT, here, reshard_s=cost, horizon=horizon, margin=margin)
        assert problems(choice.layout, gpus, node) == []
        if not choice.changes:
            assert choice.layout == tuple(here) and choice.forecast_s == choice.current_s
            break
        assert choice.gain_s == pytest.approx(choice.current_s - choice.forecast_s)
        assert choice.gain_s > margin * choice.current_s and horizon * choice.gain_s > choice.cost_s
        assert sorted(choice.layout) not in seen, "back and forth"
        here = choice.layout
        seen.append(sorted(here))
    else:
        pytest.fail(f"never comes to rest: {seen}")


def test_a_long_tail_gets_mixed_degrees_where_it_pays():
    where = site(WASTEFUL, 8, slots=1024)
    choice = choose(TAIL, where, HABIT, (1,) * 8, reshard_s=10.0)
    assert choice.reason is LayoutReason.MIXED and max(choice.layout) > min(choice.layout)
    times = {tp: where.tempo(tp, 501, HABIT) for tp in (1, 2, 4, 8)}
    uniform = min(priced(TAIL, (tp,) * (8 // tp), times).seconds for tp in times)
    assert choice.forecast_s < 0.98 * uniform
    again = choose(TAIL, where, HABIT, choice.layout, reshard_s=10.0)
    assert again.reason is LayoutReason.NO_BETTER and again.layout == choice.layout and not again.changes


def test_staying_says_why():
    where, here = site(WASTEFUL, 8), (1,) * 8
    free = choose(TAIL, where, HABIT, here, reshard_s=0.0)
    assert choose(TAIL, where, HABIT, here, reshard_s=free.gain_s * 4 + 1, horizon=4).reason is LayoutReason.BELOW_COST
    assert choose(TAIL, where, HABIT, here, reshard_s=0.0, horizon=0).reason is LayoutReason.BELOW_COST
    below = choose(TAIL, where, HABIT, here, reshard_s=0.0, margin=0.99)
    assert (below.reason, below.layout, below.offered) == (LayoutReason.BELOW_MARGIN, here, free.layout)
    assert choose(coming([], []), where, HABIT, here).reason is LayoutReason.NOTHING_COMING


def test_a_small_active_mixture_of_experts_stays_and_says_so():
    """Degrees 4 to 8 % apart, as many trajectories as GPUs: by the numbers there is nothing to win."""
    choice = choose(STEP, site(SPARSE, 8), HABIT, (1,) * 8)
    assert (choice.reason, choice.layout) == (LayoutReason.DEGREES_ALIKE, (1,) * 8)


def test_a_model_never_gets_a_degree_that_does_not_hold_it():
    where = site(sized(100), 8, utilization=0.9)
    assert where.degrees() == (2, 4, 8)
    choice = choose(STEP, where, HABIT, (1,) * 8)
    assert choice.reason is LayoutReason.MUST_LEAVE and min(choice.layout) >= 2 and sum(choice.layout) == 8
    assert choose(coming([], []), where, HABIT, (1,) * 8).layout == (2, 2, 2, 2)
    with pytest.raises(ValueError, match="no tensor-parallel degree holds the model"):
        choose(STEP, site(sized(1000), 8), HABIT, (8,))


def test_a_degree_whose_cache_is_too_short_for_the_longest_context_is_not_used():
    where = site(sized(100), 8, utilization=0.9, longest_context=300_000)
    assert where.degrees() == (4, 8)
    assert where._replace(kv_tokens={2: 400_000, 4: 400_000, 8: 1000}).degrees() == (2, 4)


def test_a_layout_that_cannot_be_is_left():
    choice = choose(STEP, site(gpus=8, gpus_per_node=4), HABIT, (8,))
    assert choice.reason is LayoutReason.MUST_LEAVE and max(choice.layout) <= 4


def test_unknown_lengths_are_not_paid_for_isolation():
    """Two of unknown length on one replica or on two: the expected makespan of the fleet hardly differs."""
    times = tempos(DENSE, (1, 2), 8)
    vague = coming([5000.0, 5000.0], 0.8, 40_960)
    both = grouped_s(vague, plan(vague.medians, vague.rows, times, layout=(1, 1)), times)
    slowest_mean = plan(vague.medians, vague.rows, times, layout=(1, 1)).forecast_s
    assert both > 1.2 * slowest_mean


def test_the_price_of_a_layout_depends_on_its_degrees_only():
    times = tempos(DENSE, (1, 2, 4), 60)
    prices = {priced(STEP, order, times).seconds for order in ((4, 2, 1, 1), (1, 1, 2, 4), (1, 4, 1, 2))}
    assert len(prices) == 1


def test_bad_numbers_are_refused():
    with pytest.raises(ValueError, match="must not be negative"):
        choose(STEP, site(), HABIT, (1,) * 4, margin=-0.1)
    with pytest.raises(ValueError, match="finite"):
        coming([1.0, float("nan")], 0.1)
