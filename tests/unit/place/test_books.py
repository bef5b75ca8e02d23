"""The books of who is where, the first placement of a batch made from them, and the bounds by which replicas are chosen."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_heddle.fleet import Replica
from verl_heddle.latency import LatencyModel
from verl_heddle.place.books import Books, reading_s, soon, soonest
from verl_heddle.place.first import Batch, place_batch
from verl_heddle.place.outlook import curves
from verl_heddle.place.pace import Habit

LATENCY = LatencyModel.affine(0.01, 0.001, prefill_per_token_s=1e-5, tps=(1, 2), speedup={2: 1.6})


def test_books_know_who_is_where():
    books = Books(LATENCY)
    for name in ("a", "b"):
        books.add(Replica(name))
    rows = curves(1000.0, 0.3)
    books.put("k", "a", rows, "g")
    assert books.homes_of("g") == [0] and books.drains()[0] > 0 == books.drains()[1]
    books.put("k", "b", rows)
    assert books.homes_of("g") == [1] and books.drains()[1] > 0 == books.drains()[0]
    books.remove("b")
    assert not books.residents and books.names == ["a"]


def apart(medians, scale: float, replicas: int) -> Batch:
    """A batch without prompts."""
    return Batch(medians, curves(medians, scale, 40_960), np.zeros((len(medians), replicas)), [str(i) for i in range(len(medians))])


def test_a_batch_keeps_siblings_together_where_prompts_are_long():
    books = Books(LATENCY)
    for number in range(4):
        books.add(Replica(f"r{number}"))
    books.tune(64, Habit())
    medians, groups = np.full(32, 300.0), [f"g{number // 4}" for number in range(32)]
    rows = curves(medians, 0.3, 40_960)
    assert place_batch(books, Batch(medians, rows, np.zeros((32, 4)), groups)) is None, "stock's rule"
    where = place_batch(books, Batch(medians, rows, np.full((32, 4), 5.0), groups))
    assert where is not None and len(set(zip(groups, where, strict=True))) <= 12


@pytest.mark.parametrize(("scale", "sizes"), [(0.02, "unequal"), (0.9, "even")])
def test_a_batch_is_planned_where_lengths_are_known_and_left_to_stocks_rule_where_they_are_not(scale, sizes):
    books = Books(LATENCY)
    for number in range(4):
        books.add(Replica(f"r{number}"))
    books.tune(200, Habit())
    medians = np.exp(np.random.default_rng(0).normal(8, 1 if scale < 0.5 else 0.05, 120))
    where = place_batch(books, apart(medians, scale, 4))
    if sizes == "even":
        assert where is None
    else:
        assert where is not None and len(where) == 120
        counts = np.bincount(where, minlength=4)
        assert counts[where[int(medians.argmax())]] < 20 and counts.max() > 35


def test_a_batch_is_placed_on_unequal_replicas_too():
    books = Books(LATENCY)
    for number, (tp, slots) in enumerate([(1, 8), (1, 256), (2, 256)]):
        books.add(Replica(f"r{number}", tp, slots))
    books.tune(100, Habit())
    medians = np.full(60, 4000.0)
    counts = np.bincount(place_batch(books, apart(medians, 0.4, 3)), minlength=3)
    assert counts.sum() == 60 and counts[0] < counts[1] <= counts[2]


@given(
    st.lists(st.tuples(st.integers(0, 3), st.floats(1.0, 1e5), st.floats(0.02, 2.0)), max_size=40),
    st.floats(1e-3, 1e5),
    st.floats(0.02, 2.0),
)
@settings(max_examples=100, deadline=None)
def test_bounds_find_what_asking_every_replica_finds(residents, tokens, scale):
    """The choices of `choice` against all drain times; residents live on one or two kinds of replicas, some with short KV cache."""
    books = Books(LATENCY)
    for number in range(4):
        books.add(Replica(f"r{number}", tp=1 + number % 2, kv_tokens=20_000 if number < 2 else None))
    books.tune(64, Habit(turn_tokens=300.0, growth=1.5))
    for number, (home, median, spread) in enumerate(residents):
        books.put(str(number), f"r{home}", curves(median, spread))
    rows, reading = curves(tokens, scale), reading_s(books, LATENCY, 5000, [1])
    every = books.drains_with(rows, range(4)) + reading
    assert every[soonest(books, rows, reading)] <= every.min() * (1 + 1e-9)
    assert (books.drains_with(rows, range(4)) >= books.drains() * (1 - 1e-9)).all(), "one more makes nothing shorter"
    order = [number for number in np.argsort(every, kind="stable") if number != 2 and every[number] <= 0.9 * every[2]]
    assert soon(books, rows, reading, 2, 0.9 * every[2]).tolist() == order
