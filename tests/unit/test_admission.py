"""Admission, against a plain list that is sorted anew at every event."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_heddle.schedule.admission import Admission, most_turns

EVENTS = st.lists(st.tuples(st.sampled_from("aaaaAAllllprtR"), st.integers(0, 11), st.integers(-3, 0)), max_size=120)
BOUND, MOST, HOLD_S = 2, 3, 40.0


class Slow:
    """The law, word for word."""

    def __init__(self):
        self.inside = {"r0": 0, "r1": 0}
        self.completed = {"r0": -1e9, "r1": -1e9}
        self.held = []  # (new, priority, number, request, replica, since)
        self.number = 0

    def ask(self, request, replica, priority, now, begun):
        if self.inside[replica] < (MOST if begun else BOUND):
            self.inside[replica] += 1
            return True
        self.number += 1
        self.held.append([not begun, priority, self.number, request, replica, now])
        return False

    def left(self, request, replica, completed_s):
        if any(item[3] == request for item in self.held):
            self.held = [item for item in self.held if item[3] != request]
            return []
        self.inside[replica] -= 1
        if completed_s is not None:
            self.completed[replica] = completed_s
        result = []
        while here := sorted(i for i in self.held if i[4] == replica and self.inside[replica] < (BOUND if i[0] else MOST)):
            self.held.remove(here[0])
            self.inside[replica] += 1
            result.append(here[0][3])
        return result

    def overdue(self, now):
        late = [i for i in sorted(self.held, key=lambda i: i[2]) if now - max(i[5], self.completed[i[4]]) >= HOLD_S]
        for item in late:
            self.held.remove(item)
            self.inside[item[4]] += 1
        return [item[3] for item in late]

    def gone(self, replica):
        here = [item for item in sorted(self.held, key=lambda item: item[2]) if item[4] == replica]
        self.held = [item for item in self.held if item[4] != replica]
        self.inside[replica] = 0
        self.completed[replica] = -1e9
        return [item[3] for item in here]


@settings(max_examples=300)
@given(EVENTS)
def test_like_the_law_word_for_word(events):
    """a ask for a new trajectory, A for one that has begun, l leave, p a new priority, r all priorities, t time passes, R the replica joins
    again, empty."""
    fast, slow = Admission(HOLD_S), Slow()
    for name in slow.inside:
        fast.add(name, BOUND, MOST)
    open_, now, serial = {}, 0.0, 0
    for kind, number, priority in events:
        now += 1.0
        if kind in "aA":
            serial += 1
            request, replica, begun = f"q{serial}", f"r{number % 2}", kind == "A"
            assert fast.ask(request, replica, priority, now, begun) == slow.ask(request, replica, priority, now, begun)
            open_[request] = replica
        elif kind == "l" and open_:
            request = sorted(open_)[number % len(open_)]
            completed_s = now if priority else None
            expected = slow.left(request, open_[request], completed_s) + slow.overdue(now)
            fast.left(request, open_.pop(request), completed_s)
            assert fast.admitted(now) == expected
        elif kind == "R":
            replica = f"r{number % 2}"
            expected = slow.gone(replica) + slow.overdue(now)
            fast.add(replica, BOUND, MOST)
            open_ = {request: home for request, home in open_.items() if home != replica}
            assert fast.admitted(now) == expected
        elif kind in "pr" and open_:
            table = {request: priority for request in sorted(open_)[: None if kind == "r" else 1]}
            fast.reprioritise(table)
            for item in slow.held:
                item[1] = table.get(item[3], item[1])
        elif kind == "t":
            now += 25.0
            assert fast.admitted(now) == slow.overdue(now)
        assert len(fast) == len(slow.held) and {name: fast.inside(name) for name in slow.inside} == slow.inside


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


def test_a_trajectory_that_has_begun_passes_the_new_ones_but_not_what_the_server_takes():
    admission = Admission(hold_s=10.0)
    admission.add("r", 1, most=2)
    assert admission.ask("a", "r", 0, 0.0)
    assert not admission.ask("new", "r", -9, 1.0)
    assert admission.ask("a's next", "r", 0, 2.0, begun=True), "its context is there"
    assert not admission.ask("b's next", "r", 0, 3.0, begun=True), "the server takes no more"
    admission.left("a", "r", 4.0)
    assert admission.admitted(4.0) == ["b's next"], "before the new one, however urgent"
    admission.left("b's next", "r", 5.0)
    assert admission.admitted(5.0) == []
    admission.left("a's next", "r", 6.0)
    assert admission.admitted(6.0) == ["new"]


def test_the_deadline_counts_from_the_replicas_last_sign_of_life():
    admission = Admission(hold_s=10.0)
    admission.add("r", 2)
    for name in "abc":
        admission.ask(name, "r", 0, 0.0)
    admission.ask("d", "r", 0, 0.0)
    admission.left("a", "r", 9.0)
    assert admission.admitted(9.0) == ["c"]
    admission.left("b", "r")  # cancelled: says nothing of the replica
    assert admission.admitted(18.9) == ["d"]
    admission.ask("e", "r", 0, 18.9)
    assert admission.admitted(19.0) == [], "it has not waited"
    admission.left("c", "r", 27.0)
    assert admission.admitted(28.9) == ["e"] and admission.overdue == 0


@pytest.mark.parametrize(("slots", "calls", "most"), [(256, 1000, 968), (1024, 1040, 1024), (990, 1006, 990), (2048, 1000, 984)])
def test_what_a_server_takes_leaves_room_for_control_calls(slots, calls, most):
    assert most_turns(slots, calls) == most < calls


def test_a_server_without_a_limit_takes_all():
    assert most_turns(8, None) == float("inf")
