"""Which layouts can be, and in which order they pack into nodes."""

from __future__ import annotations

from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layout_cases import sized

from verl_heddle.layout.feasible import degrees, packed, problems


@pytest.mark.parametrize(
    ("layout", "gpus", "node", "heads", "kv_heads", "says"),
    [
        ([], 8, 8, None, None, "is empty"),
        ([0, 8], 8, 8, None, None, "degree 0: every degree must be 1 or more"),
        ([-1, 9], 8, 8, None, None, "degree -1"),
        ([4, 2], 8, 8, None, None, "takes 6 GPUs, there are 8"),
        ([8, 8], 8, 8, None, None, "takes 16 GPUs, there are 8"),
        ([16], 16, 8, None, None, "tp=16 does not fit a node of 8 GPUs"),
        ([8], 8, 8, 12, None, "tp=8 does not divide the model's 12 attention heads"),
        ([3, 3], 6, 8, 12, 4, "tp=3 neither divides the model's 4 KV heads nor is divided by them"),
        ([4, 4, 2, 2], 12, 6, None, None, "spans two nodes of 6 GPUs; this order packs: [4, 2, 4, 2]"),
        ([1, 2, 1], 4, 2, None, None, "replica 1 (tp=2)"),
        ([3, 3], 6, 4, None, None, "no order packs"),
    ],
)
def test_bad_layouts_are_refused_with_the_reason(layout, gpus, node, heads, kv_heads, says):
    found = problems(layout, gpus, node, heads, kv_heads)
    assert any(says in one for one in found), found


@pytest.mark.parametrize(
    ("layout", "gpus", "node", "heads", "kv_heads"),
    [([4, 2, 1, 1], 8, 8, 32, 8), ([8, 8], 16, 8, 32, 4), ([1, 1, 2], 4, 4, None, None), ([2, 1], 3, 3, 2, 2), ([3, 3], 6, 3, 12, 3)],
)
def test_good_layouts_have_no_problem(layout, gpus, node, heads, kv_heads):
    assert problems(layout, gpus, node, heads, kv_heads) == []


def test_all_that_is_wrong_is_said_at_once():
    assert len(problems([16, 3], 8, 8, 32, 8)) == 4  # the sum, the node, heads, KV heads


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=6), st.integers(1, 7))
def test_an_order_that_packs_is_found_exactly_where_there_is_one(layout, node):
    packs = any(not problems(order, sum(layout), node) for order in set(permutations(layout)))
    if packs:
        order = packed(layout, node)
        assert sorted(order) == sorted(layout) and problems(order, sum(layout), node) == []
    else:
        with pytest.raises(ValueError, match="no order of the layout"):
            packed(layout, node)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from([1, 2, 4, 8]), min_size=1, max_size=40), st.sampled_from([8, 16]))
def test_powers_of_two_pack_most_gpus_first(layout, node):
    layout = [*layout, *[1] * (-sum(layout) % node)]
    assert packed(layout, node) == tuple(sorted(layout, reverse=True))


def test_degrees_lie_within_a_node_divide_the_heads_and_hold_the_model():
    assert degrees(8) == (1, 2, 4, 8)
    assert degrees(6) == (1, 2, 4)
    assert degrees(3, 14, 2) == (1, 2)
    assert degrees(8, 40, 8) == (1, 2, 4, 8)
    assert degrees(8, 28, 4) == (1, 2, 4)
    assert degrees(8, 32, 8, sized(100), 0.9) == (2, 4, 8)
    assert degrees(8, 32, 8, sized(100), 0.5) == (4, 8)
    assert degrees(0) == ()
