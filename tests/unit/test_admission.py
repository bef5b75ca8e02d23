"""Admission, against a plain list that is sorted anew at every event."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_heddle.schedule.admission import Admission

EVENTS = st.lists(st.tuples(st.sampled_from("aaaalllprt"), st.integers(0, 11), st.integers(-3, 0)), max_size=120)
BOUND, HOLD_S = 2, 40.0


class Slow:
    """The law, word for word."""

    def __init__(self):
        self.inside = {"r0": 0, "r1": 0}
        self.held = []  # (priority, number, request, replica, since)
        self.number = 0

    def ask(self, request, replica, priority, now):
        if self.inside[replica] < BOUND:
            self.inside[replica] += 1
            return True
        self.number += 1
        self.held.append([priority, self.number, request, replica, now])
        return False

    def left(self, request, replica):
        if any(item[2] == request for item in self.held):
            self.held = [item for item in self.held if item[2] != request]
            return []
        self.inside[replica] -= 1
        result = []
        while self.inside[replica] < BOUND and (here := sorted(item for item in self.held if item[3] == replica)):
            self.held.remove(here[0])
            self.inside[replica] += 1
            result.append(here[0][2])
        return result

    def overdue(self, now):
        late = [item for item in sorted(self.held, key=lambda item: item[1]) if now - item[4] >= HOLD_S]
        for item in late:
            self.held.remove(item)
            self.inside[item[3]] += 1
        return [item[2] for item in late]


@settings(max_examples=300)
@given(EVENTS)
def test_like_the_law_word_for_word(events):
    """a ask, l leave, p a new priority, r all priorities, t time passes."""
    fast, slow = Admission(HOLD_S), Slow()
    for name in slow.inside:
        fast.add(name, BOUND)
    open_, now, serial = {}, 0.0, 0
    for kind, number, priority in events:
        now += 1.0
        if kind == "a":
            serial += 1
            request, replica = f"q{serial}", f"r{number % 2}"
            assert fast.ask(request, replica, priority, now) == slow.ask(request, replica, priority, now)
            open_[request] = replica
        elif kind == "l" and open_:
            request = sorted(open_)[number % len(open_)]
            expected = slow.left(request, open_[request]) + slow.overdue(now)
            fast.left(request, open_.pop(request))
            assert fast.admitted(now) == expected
        elif kind in "pr" and open_:
            table = {request: priority for request in sorted(open_)[: None if kind == "r" else 1]}
            fast.reprioritise(table)
            for item in slow.held:
                item[0] = table.get(item[2], item[0])
        elif kind == "t":
            now += 25.0
            assert fast.admitted(now) == slow.overdue(now)
        assert len(fast) == len(slow.held)


def test_order_deadline_and_a_replica_that_leaves():
    admission = Admission(hold_s=10.0)
    admission.add("r", 1)
    assert admission.ask("a", "r", 0, 0.0)
    assert not admission.ask("b", "r", -1, 1.0) and not admission.ask("c", "r", -5, 2.0) and not admission.ask("d", "r", -5, 3.0)
    admission.left("c", "r")
    assert admission.admitted(3.0) == [], "it gave up waiting; nobody else may go for that"
    admission.left("a", "r")
    assert admission.admitted(4.0) == ["d"], "most urgent first"
    assert admission.admitted(10.9) == [] and admission.admitted(11.0) == ["b"] and admission.overdue == 1
    assert not admission.ask("e", "r", 0, 12.0)
    admission.remove("r")
    assert admission.admitted(12.0) == ["e"] and len(admission) == 0
    admission.left("e", "r")
    with pytest.raises(KeyError):
        admission.ask("f", "r", 0, 13.0)
