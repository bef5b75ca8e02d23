"""Budget and allocation: the greedy against brute force, closed forms against sampling, and what makes redundancy pay."""

from __future__ import annotations

from itertools import product
from math import inf

import numpy as np
import pytest
from drawn import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_heddle.fleet import Replica
from verl_heddle.latency import LatencyModel
from verl_heddle.options import Shape
from verl_heddle.place.outlook import GRID
from verl_heddle.place.pace import Habit
from verl_heddle.shape.budget import Fleet, Objective, allocate, convex, costs, forecast_s, path, total
from verl_heddle.shape.censored import Law
from verl_heddle.shape.honesty import expected_bias
from verl_heddle.shape.outlook import deadline, live, tails
from verl_heddle.shape.plan import allowed, plan
from verl_heddle.shape.settings import ShapeReason, check
from verl_heddle.shape.shaper import fleet_of

BOUND = LatencyModel.affine(0.02, 0.00002)
"""Memory-bound decoding: a batch costs hardly more than one sequence, as on a GPU whose tail is idle."""
BUSY = LatencyModel.affine(0.0005, 0.001)
"""Compute-bound: every sequence costs."""


NO_BOUNDS = {"length_bias": 1.0, "prompt_bias": 1.0}


def laws_of(number: int, seed: int = 0) -> list[Law]:
    rng = np.random.default_rng(seed)
    return [Law(7 + 0.7 * a, 0.4 * np.exp(0.4 * b), 0.1) for a, b in rng.normal(size=(number, 2))]


def fleet(latency=BOUND, replicas: int = 2, samples: int = 256) -> Fleet:
    return fleet_of(latency, [Replica(f"r{i}") for i in range(replicas)], Habit(1000.0, 1.0, 1e4, 0.0), samples)


falls = st.lists(st.integers(0, 60), min_size=3, max_size=3).map(lambda steps: sorted(steps, reverse=True))


@given(st.lists(st.tuples(st.integers(0, 200), falls), min_size=1, max_size=4), st.integers(0, 12))
@examples(100)
def test_greedy_is_optimal_for_convex_costs(rows, spare):
    table = np.array([start - np.cumsum([0, *steps]) for start, steps in rows], dtype=float)
    given_out = allocate(table, spare)
    spare = min(spare, 3 * len(rows))
    assert given_out.sum() == spare
    best = min(sum(table[p, m] for p, m in enumerate(way)) for way in product(range(4), repeat=len(rows)) if sum(way) == spare)
    assert table[np.arange(len(rows)), given_out].sum() == pytest.approx(best)


@given(st.lists(st.floats(0.1, 1e4), min_size=1, max_size=5), st.integers(1, 6), st.integers(0, 12))
@settings(deadline=None)
def test_the_papers_objective_is_convex_and_its_greedy_is_the_papers(spreads, size, spare):
    """argmax of v / (m (m + 1)), ties to the lowest index, until the budget is spent or all have their bound."""
    table = np.array(spreads)[:, None] / (size + np.arange(size + 1))
    wanted = [size] * len(spreads)
    for _ in range(min(spare, size * len(spreads))):
        gains = [v / m - v / (m + 1) if m < 2 * size else -inf for v, m in zip(spreads, wanted, strict=True)]
        wanted[int(np.argmax(gains))] += 1
    cost = sum(v / m for v, m in zip(spreads, wanted, strict=True))
    found = allocate(table, spare)
    assert table[np.arange(len(spreads)), found].sum() == pytest.approx(cost)


@given(st.lists(st.floats(0, 100), min_size=1, max_size=9).map(lambda values: sorted(values, reverse=True)))
@settings(deadline=None)
def test_the_convex_minorant_is_convex_below_and_touches_at_both_ends(values):
    found = convex(np.array(values))
    assert np.all(found <= np.array(values) + 1e-9) and np.all(np.diff(found, 2) >= -1e-9)
    assert found[0] == values[0] and found[-1] == values[-1]
    assert np.allclose(convex(found), found)


@pytest.mark.parametrize(("samples", "patience"), [(4, 0.0), (6, 0.0), (6, 900.0), (8, 1500.0)])
def test_what_lives_is_the_mean_over_sampled_groups(samples, patience):
    """n = 4 of m, lengths with an uncertain prompt mean."""
    rng = np.random.default_rng(3)
    law = Law(6.5, 0.5, 0.3)
    uniform = rng.random((20_000, samples))
    scale = law.spread * np.sqrt(3) / np.pi
    logs = law.mean + law.doubt * rng.normal(size=(20_000, 1)) + scale * np.log(uniform / (1 - uniform))
    tokens = np.sort(np.exp(logs), axis=1)
    full = tokens[:, 3]
    row = live([law], 4, 8, patience)[0, samples - 4]
    for x in (200.0, 600.0, 1000.0, 1400.0, 3000.0):
        at = int(np.searchsorted(GRID, x))
        at_tokens = GRID[at]
        alive = (tokens > at_tokens).sum(axis=1) * ((full > at_tokens) | (at_tokens < patience))
        assert row[0, at] == pytest.approx(alive.mean(), abs=0.06)
        assert -np.expm1(row[1, at]) == pytest.approx((alive > 0).mean(), abs=0.015)


def test_more_samples_end_a_group_sooner_and_waiting_ends_it_later():
    rows = live(laws_of(5), 4, 8)
    assert np.all(np.diff(rows[:, :, 1], axis=1) >= -1e-12)
    assert np.all(live(laws_of(5), 4, 8, 2000.0)[:, :, 0] >= rows[:, :, 0] - 1e-9)
    assert np.all(np.diff(rows, axis=-1)[:, :, 0] <= 1e-9)


def test_what_is_minimised_bounds_what_is_waited_for():
    laws = laws_of(20)
    rng = np.random.default_rng(1)
    over = live(laws, 4, 8)[:, 2, 1]
    t = deadline(over)
    made = []
    for law in laws:
        uniform = rng.random((4000, 6))
        logs = law.mean + law.doubt * rng.normal(size=(4000, 1)) + law.spread * np.sqrt(3) / np.pi * np.log(uniform / (1 - uniform))
        made.append(np.sort(np.exp(logs), axis=1)[:, 3])
    last = np.max(made, axis=0)
    assert t == pytest.approx(np.median(last), rel=0.25)
    assert t + tails(over, t).sum() >= 0.97 * last.mean()


def test_idle_tails_buy_spares_and_busy_fleets_do_not():
    laws = laws_of(32)
    rows = live(laws, 8, 16)
    table = costs(laws, rows, 8, Objective.TAIL)
    idle, busy = total(table, rows, fleet(BOUND)), total(table, rows, fleet(BUSY))
    assert idle.spare.sum() > busy.spare.sum() and idle.step_s < 0.9 * idle.stock_s
    assert busy.step_s <= busy.stock_s and busy.saved_s - busy.cost_s == pytest.approx(busy.stock_s - busy.step_s)
    dear = total(table, rows, fleet(BOUND), price=20.0)
    assert dear.spare.sum() < idle.spare.sum()
    assert np.all(idle.spare <= 8)


def test_a_budget_is_never_forecast_to_cost_time():
    for seed in range(6):
        laws = laws_of(12, seed)
        rows = live(laws, 4, 8)
        for latency in (BOUND, BUSY):
            for objective in Objective:
                found = total(costs(laws, rows, 4, objective), rows, fleet(latency))
                assert found.step_s <= found.stock_s * (1 + 1e-9)
                chosen = rows[np.arange(12), found.spare].sum(axis=0)
                assert forecast_s(chosen, fleet(latency)) == pytest.approx(found.step_s)


def test_every_prefix_of_the_path_is_the_best_allocation_of_its_size():
    table = costs(laws_of(6), live(laws_of(6), 3, 6), 3, Objective.TAIL)
    order = path(table)
    assert sorted(order) == sorted(list(range(6)) * 3)
    for spare in range(0, 19, 3):
        assert np.array_equal(allocate(table, spare), np.bincount(order[:spare], minlength=6))


def test_the_plan_keeps_the_length_bound_before_it_is_broken():
    strict = Shape(prompt_bias=0.1, length_bias=1.0)
    assert allowed(Law(7, 0.6), 8, 16, strict) < allowed(Law(7, 0.1), 8, 16, strict) == 16
    assert allowed(Law(7, 3.0), 8, 16, Shape(prompt_bias=1.0)) == 16
    wide = plan([Law(7, 2.0)] * 4, 8, Shape(prompt_bias=0.05), fleet())
    assert [share.reason for share in wide.shares] == [ShapeReason.LENGTH_BIAS] * 4 and {share.samples for share in wide.shares} == {8}


@given(st.integers(1, 30), st.floats(0.01, 0.5), st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_the_mean_bias_over_the_prompts_is_bounded(number, bound, seed):
    laws = laws_of(number, seed)
    made = plan(laws, 8, Shape(spare=8, length_bias=bound), None)
    mean = np.mean([law.spread * expected_bias(8, share.samples) for law, share in zip(laws, made.shares, strict=True)])
    assert np.exp(mean) >= 1 - bound - 1e-9


def test_uniform_and_fixed_budgets_need_no_forecast_and_others_do():
    laws = laws_of(10)
    even = plan(laws, 8, Shape(spare=2, uniform=True, **NO_BOUNDS), None)
    assert {share.samples for share in even.shares} == {10}
    some = plan(laws, 8, Shape(spare=2.5, **NO_BOUNDS), None)
    assert sum(share.samples - 8 for share in some.shares) == 25
    assert max(share.samples for share in some.shares) <= 16
    assert plan(laws, 8, Shape(), None).counts == {"no_forecast": 10}
    for share in some.shares:
        saturated = share.samples == 16
        assert (share.reason is ShapeReason.SATURATED) == saturated == (share.rule.longest == 0 and share.samples > 8)


def test_strangers_get_nothing_unless_asked_for():
    laws, half = laws_of(20), [False, True] * 10
    some = plan(laws, 8, Shape(**NO_BOUNDS), fleet(), None, half)
    assert {share.samples for share in some.shares[1::2]} == {8} and max(share.samples for share in some.shares[::2]) > 8
    assert some.counts["unseen"] == 10
    assert "unseen" not in plan(laws, 8, Shape(unseen=True, **NO_BOUNDS), fleet(), None, half).counts
    assert "unseen" not in plan(laws, 8, Shape(spare=2, **NO_BOUNDS), None, None, half).counts


def test_patience_is_as_long_as_it_is_free():
    laws = laws_of(32)
    chosen = plan(laws, 8, Shape(**NO_BOUNDS), fleet())
    always = plan(laws, 8, Shape(**NO_BOUNDS, patience=inf), fleet())
    assert 0 < chosen.patience_tokens < inf and always.patience_tokens == inf
    assert plan(laws, 8, Shape(**NO_BOUNDS, patience=0), fleet()).patience_tokens == 0


def test_settings_say_what_is_wrong():
    assert check(Shape(), 8) == []
    assert len(check(Shape(spare=9, most=9, longest=9, patience=-1, price=-1, length_bias=0, rest_steps=0), 8)) >= 6
    assert "n)" in check(Shape(), 1)[0]
    assert check(Shape(uniform=True), 8)
