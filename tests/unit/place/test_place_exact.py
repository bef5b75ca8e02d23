"""The placement solver against trying everything, and what its answers must satisfy."""

from __future__ import annotations

import numpy as np
import pytest
from drawn import examples
from hypothesis import given
from hypothesis import strategies as st
from place_cases import contiguous, everything, layouts, random_case

from verl_heddle.place.cost import Cost, Degree, price, work
from verl_heddle.place.exact import Placement, solve, solve_layout

SAME = 1 + 1e-9


def valid(answer: Placement, items, degrees, cost) -> None:
    """Every trajectory once, within slots and KV, at the price said, between the bounds."""
    by_tp = {degree.tp: degree for degree in degrees}
    assert sorted(int(i) for group in answer.groups for i in group.members) == list(range(len(items)))
    for group in answer.groups:
        assert group.cost_s == price(items, group.members, by_tp[group.tp], cost) < np.inf
    assert answer.makespan_s == max(group.cost_s for group in answer.groups)
    assert answer.bound_s <= answer.makespan_s <= answer.bound_s * SAME


@pytest.mark.parametrize("block", range(10))
def test_free_layout_equals_brute_force_over_all_layouts_and_assignments(block):
    """1,000 cases; a third with tools, a third with a KV demand that is the same for all."""
    for seed in range(100 * block, 100 * (block + 1)):
        items, degrees, gpus = random_case(seed, tools=seed % 3 == 0, kv=seed % 3 == 1)
        best = min(everything(items, degrees, one, Cost.LONGEST) for one in layouts([d.tp for d in degrees], gpus))
        if best == np.inf:
            with pytest.raises(ValueError, match="exceed"):
                solve(items, degrees, gpus)
            continue
        answer = solve(items, degrees, gpus)
        valid(answer, items, degrees, Cost.LONGEST)
        assert answer.makespan_s == pytest.approx(best, rel=1e-9), seed
        assert sum(answer.layout) <= gpus


def test_given_layout_equals_brute_force():
    for seed in range(1000, 1200):
        items, degrees, gpus = random_case(seed, tools=seed % 2 == 0)
        for layout in layouts([d.tp for d in degrees], gpus):
            best = everything(items, degrees, layout, Cost.LONGEST)
            if best < np.inf:
                answer = solve_layout(items, degrees, layout[::-1])
                valid(answer, items, degrees, Cost.LONGEST)
                assert answer.layout == layout[::-1]
                assert answer.makespan_s == pytest.approx(best, rel=1e-9), seed


def test_staircase_equals_the_best_contiguous_cut():
    for seed in range(2000, 2200):
        items, degrees, gpus = random_case(seed, tools=seed % 3 == 0, kv=seed % 3 == 1)
        all_layouts = layouts([d.tp for d in degrees], gpus)
        best = min(contiguous(items, degrees, one, Cost.STAIRCASE) for one in all_layouts)
        if best < np.inf:
            answer = solve(items, degrees, gpus, Cost.STAIRCASE)
            valid(answer, items, degrees, Cost.STAIRCASE)
            assert answer.makespan_s == pytest.approx(best, rel=1e-9), seed


def test_staircase_is_the_drain_time():
    """Against a replica played trajectory by trajectory: all decode together until the shortest ends, then the rest go on."""
    rng = np.random.default_rng(0)
    for _ in range(100):
        tokens = rng.integers(1, 100, int(rng.integers(1, 9))).astype(float)
        tau = np.cumsum(rng.random(9))
        left, played = np.sort(tokens), 0.0
        while len(left):
            played += left[0] * tau[len(left) - 1]
            left = left[left > left[0]] - left[0]
        assert price(work(tokens), range(len(tokens)), Degree(1, tau), Cost.STAIRCASE) == pytest.approx(played)


@examples(30)
@given(
    st.lists(st.just(0.0) | st.floats(1e-3, 1e5), min_size=1, max_size=60),
    st.integers(1, 16),
    st.sampled_from([(1,), (2,), (1, 2), (1, 2, 4, 8), (2, 8)]),
    st.sampled_from(list(Cost)),
    st.integers(0, 2**32 - 1),
)
def test_answers_are_valid_deterministic_and_never_beaten_by_random_ones(tokens, gpus, tps, cost, seed):
    rng = np.random.default_rng(seed)
    items = work(tokens, np.where(rng.random(len(tokens)) < 0.3, 1e3, 0.0))
    degrees = [Degree(tp, (1 + np.arange(60) * rng.random()) / tp ** rng.uniform(0.3, 1)) for tp in tps]
    if min(tps) > gpus:
        with pytest.raises(ValueError, match="no tensor-parallel degree fits"):
            solve(items, degrees, gpus, cost)
        return
    answer = solve(items, degrees, gpus, cost)
    valid(answer, items, degrees, cost)
    again = solve(items, degrees[::-1], gpus, cost)
    assert [(g.tp, g.members.tolist()) for g in again.groups] == [(g.tp, g.members.tolist()) for g in answer.groups]
    fixed = solve_layout(items, degrees, answer.layout, cost)
    assert fixed.makespan_s <= answer.makespan_s * SAME
    if cost is Cost.LONGEST:
        by_tp = {degree.tp: degree for degree in degrees}
        where = rng.integers(0, len(answer.layout), len(tokens))
        other = max(price(items, np.flatnonzero(where == i), by_tp[tp], cost) for i, tp in enumerate(answer.layout))
        assert answer.makespan_s <= other * SAME


def test_leftover_gpus_become_empty_replicas():
    answer = solve(work([5.0]), [Degree(1, [1.0, 1.5])], 3)
    assert answer.layout == (1, 1, 1)
    assert [len(group.members) for group in answer.groups] == [1, 0, 0]


def test_the_longest_does_not_always_belong_on_the_largest_replica():
    """Heddle's order "highest degree for the longest" costs 10.5 here: the large one is needed for the crowd."""
    items = work([10.0, 8.0, 8.0, 8.0])
    answer = solve_layout(items, [Degree(1, [1.0, 5.0]), Degree(2, [0.9, 0.9, 1.05])], (2, 1))
    assert answer.makespan_s == pytest.approx(10.0)
    assert [group.members.tolist() for group in answer.groups] == [[1, 2, 3], [0]]


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: solve(work([]), [Degree(1, [1.0])], 1), "no trajectories"),
        (lambda: solve(work([1.0, 1.0]), [Degree(1, [1.0])], 1), "exceed the slots"),
        (lambda: solve(work([1.0], kv_tokens=[5.0]), [Degree(1, [1.0], 4.0)], 1), "KV tokens"),
        (lambda: solve(work([1.0]), [Degree(2, [1.0])], 1), "no tensor-parallel degree fits"),
        (lambda: solve(work([1.0]), [Degree(1, [1.0]), Degree(1, [2.0])], 1), "twice"),
        (lambda: solve_layout(work([1.0]), [Degree(1, [1.0])], (1, 2)), "needs times for tp=\\[2\\]"),
        (lambda: solve_layout(work([1.0]), [Degree(1, [1.0])], ()), "at least one replica"),
        (lambda: Degree(1, [2.0, 1.0]), "not decreasing"),
        (lambda: Degree(1, []), "at least one slot"),
        (lambda: work([-1.0]), "not negative"),
        (lambda: work([1.0, 2.0], tool_s=[1.0]), "one number per trajectory"),
    ],
)
def test_bad_input_is_refused_in_plain_words(build, says):
    with pytest.raises(ValueError, match=says):
        build()


def test_a_layout_with_too_many_states_is_refused():
    degrees = [Degree(tp, [1.0]) for tp in (1, 2, 4)]
    with pytest.raises(ValueError, match="states"):
        solve_layout(work([1.0]), degrees, (1,) * 200 + (2,) * 200 + (4,) * 200)
