"""verl's rule, by itself: invariants over random event sequences. The twin against verl's own class is tests/contract/test_router.py."""

from random import Random

from hypothesis import given
from hypothesis import strategies as st

from verl_heddle.place.sticky import StickyLeastInflight
from verl_heddle.trajectory import Reason

EVENTS = st.lists(st.tuples(st.sampled_from(["acquire", "release", "add", "remove", "forget"]), st.integers(0, 5)), max_size=80)


@given(EVENTS, st.integers(0, 3))
def test_inflight_is_acquisitions_less_releases(events, seed):
    rule = StickyLeastInflight(Random(seed), cache_size=4)
    rule.add("r0")
    expected = {"r0": 0}
    for kind, number in events:
        name = f"r{number % 3}"
        if kind == "acquire" and expected:
            replica, reason = rule.acquire(f"c{number}")
            if reason is Reason.LEAST_INFLIGHT:
                assert expected[replica] == min(expected.values())
            expected[replica] += 1
        elif kind == "release":
            rule.release(name)
            if expected.get(name, 0):
                expected[name] -= 1
        elif kind == "add":
            rule.add(name)
            expected[name] = 0
        elif kind == "remove" and len(expected) > 1:
            rule.remove(name)
            expected.pop(name, None)
        elif kind == "forget":
            rule.forget()
        assert rule.inflight == expected


def test_a_conversation_stays_until_its_replica_leaves():
    rule = StickyLeastInflight(Random(0))
    rule.add("a")
    rule.add("b")
    home, first = rule.acquire("c")
    assert first is Reason.LEAST_INFLIGHT
    assert all(rule.acquire("c") == (home, Reason.STICKY) for _ in range(5))
    rule.remove(home)
    assert rule.acquire("c")[0] != home


def test_an_empty_fleet_speaks_verls_words():
    import pytest

    with pytest.raises(RuntimeError, match="No available servers in load balancer"):
        StickyLeastInflight(Random(0)).acquire("c")
