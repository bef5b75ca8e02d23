"""Each peer's rule, decision by decision."""

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulate_cases import FULL, lengths, peers, trajectory

from verl_heddle.fleet import Replica
from verl_heddle.latency.model import LatencyModel
from verl_heddle.simulate import EngineOptions, make_fleet, simulate
from verl_heddle.simulate.baselines import (
    AffinityMargin,
    DualThreshold,
    LptOracle,
    PeerReason,
    Plas,
    RoundRobin,
    Slime,
    Stock,
    TrajectoryFcfs,
    VerlStar,
)
from verl_heddle.simulate.baselines.base import Loads
from verl_heddle.traces import generate
from verl_heddle.trajectory import Reason, TrajectoryId, TurnEnd, TurnStart


def started(policy, conversation, generated=0):
    prompt, _, sample = conversation.partition("_")
    return policy.turn_started(TurnStart(TrajectoryId(prompt, prompt, int(sample or 0), 0), conversation, 0, 10, generated), 0.0)


def finished(policy, replica):
    policy.turn_finished(TurnEnd(TrajectoryId("p", "p", 0, 0), "c", replica, 0, 5), 0.0)


def fleet(policy, *names):
    policy.replicas_added(Replica(name) for name in names)
    return policy


def load(policy, replica, number):
    if isinstance(policy, Stock):
        policy.inflight[replica] += number
    else:
        policy.loads.change(replica, number)


@pytest.mark.parametrize("peer", [Stock, Slime, VerlStar, DualThreshold, AffinityMargin, Plas])
def test_new_conversations_go_to_the_least_loaded(peer):
    policy = fleet(peer(), "a", "b", "c")
    load(policy, "a", 2)
    load(policy, "b", 1)
    decision = started(policy, "x")
    assert (decision.replica, decision.reason) == ("c", Reason.LEAST_INFLIGHT)


@pytest.mark.parametrize(("peer", "stays", "leaves"), [(VerlStar, 32, 33), (DualThreshold, 64, 65), (AffinityMargin, 2, 3)])
def test_when_a_conversation_leaves_its_home(peer, stays, leaves):
    """The home has so many requests in flight, everybody else none."""
    for number, moves in ((stays, False), (leaves, True)):
        policy = fleet(peer(), "a", "b")
        home = started(policy, "x").replica
        finished(policy, home)
        load(policy, home, number)
        decision = started(policy, "x")
        assert (decision.replica != home) is moves
        assert decision.reason == (PeerReason.REBALANCED if moves else Reason.STICKY)
        if moves:
            assert policy.home["x"] == decision.replica


def test_dual_threshold_needs_both():
    policy = fleet(DualThreshold(absolute=4, relative=1.5), "a", "b")
    home = started(policy, "x").replica
    finished(policy, home)
    other = "b" if home == "a" else "a"
    load(policy, home, 25)
    load(policy, other, 20)
    assert started(policy, "x").replica == home  # 25 - 20 > 4, but 25 <= 1.5 * 20


def test_slime_and_round_robin_never_stay_for_the_cache():
    policy = fleet(Slime(), "a", "b")
    first = started(policy, "x").replica
    assert started(policy, "x").replica != first
    policy = fleet(RoundRobin(), "a", "b", "c")
    assert [started(policy, "x").replica for _ in range(4)] == ["a", "b", "c", "a"]


def test_homes_on_removed_replicas_are_given_up():
    for peer in (Stock, VerlStar, DualThreshold, AffinityMargin, Slime, RoundRobin, Plas):
        policy = fleet(peer(), "a", "b")
        home = started(policy, "x").replica
        policy.replicas_removed([home])
        assert started(policy, "x").replica != home


def test_plas_serves_the_least_served_first():
    policy = fleet(Plas(), "a")
    assert [started(policy, "x", generated).priority for generated in (0, 63, 64, 6400)] == [0, 0, 1, 100]


def test_lpt_plans_longest_first():
    work = lengths(10, 80, 30, 50, 20)
    policy = fleet(LptOracle(work), "a", "b")
    where = {name: started(policy, name).replica for name in ("p0", "p1", "p2", "p3", "p4")}
    # 80 | 50 + 30, then 20 and 10 to the lower of 80 and 80: 100 | 90
    assert where["p2"] == where["p3"] != where["p1"]
    assert where["p4"] != where["p0"]
    assert [started(policy, "p1", generated).priority for generated in (0, 70)] == [-80, -80], "the whole length, not what is left"


def test_lpt_gives_a_wider_replica_more():
    policy = LptOracle(lengths(*[10] * 30))
    policy.replicas_added([Replica("wide", tp=4), Replica("narrow", tp=1)])
    placed = [started(policy, f"p{i}").replica for i in range(30)]
    assert placed.count("wide") == 24


def test_arms_are_comparable_and_repeatable():
    work = generate("coding", 8, 4, seed=5)
    latency = LatencyModel.affine(0.01, 0.0005, 1e-8, tps=(1, 2), speedup={2: 1.6})
    fleet = make_fleet(4, 1, latency, slots=8)
    first, second = (peers(work, fleet, latency, seed=1) for _ in range(2))
    for name, result in first.items():
        assert result.summary() == second[name].summary()
        assert result.tokens == sum(item.output_tokens for item in work)
    assert first["stock"].migrations == 0 < first["round_robin"].migrations


def test_layouts():
    assert [replica.tp for replica in make_fleet(8, (4, 2, 1, 1), FULL)] == [4, 2, 1, 1]
    assert len(make_fleet(8, 2, FULL)) == 4
    assert make_fleet(4, (2, 1, 1), FULL, slots={1: 8, 2: 16})[0].slots == 16
    for gpus, layout in ((8, 3), (8, (4, 2)), (0, 1), (4, ())):
        with pytest.raises(ValueError):
            make_fleet(gpus, layout, FULL)
    with pytest.raises(ValueError, match="degree 8 does not hold"):
        make_fleet(8, 8, FULL)


def test_priority_inside_the_replica_is_the_engines_choice():
    """The same policy under both orders: FCFS ignores priorities."""
    work = [trajectory("p", i, [(0, 10 * (i + 1), 0.0)], 1) for i in range(6)]
    replica = [Replica("r", slots=2)]
    by_order = {order: simulate(work, replica, FULL, LptOracle(work), engine=EngineOptions(order)) for order in ("fcfs", "priority")}
    assert by_order["fcfs"].finish_s.argmax() == 5
    assert by_order["priority"].makespan_s < by_order["fcfs"].makespan_s


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from(["add", "remove", 1, 1, 1, -1, -1, 3])), max_size=60))
def test_loads_like_a_plain_table(events):
    loads, plain = Loads(), {}
    for name, what in events:
        if what == "add":
            loads.add(name)
            plain[name] = 0
        elif what == "remove":
            loads.remove(name)
            plain.pop(name, None)
        else:
            loads.change(name, what)
            if name in plain:
                plain[name] = max(0, plain[name] + what)
        assert {each: loads[each] for each in loads} == plain
        if plain:
            assert (loads.fewest, loads.most) == (min(plain.values()), max(plain.values()))
            assert plain[loads.least(Random(0))] == loads.fewest


def test_trajectory_fcfs_lets_the_first_go_on():
    """Two trajectories of three turns on one slot: under stock they take turns, in the order of first turns the first runs through."""
    work = [trajectory(f"p{k}", 0, [(0, 10, 0.0), (0, 10, 0.0), (0, 10, 0.0)], 1) for k in range(2)]
    fleet, latency = [Replica("r", slots=1)], LatencyModel.affine(1.0)
    stock = simulate(work, fleet, latency, Stock(), engine=EngineOptions(share_prompts=False))
    first = simulate(work, fleet, latency, TrajectoryFcfs(), engine=EngineOptions("priority", share_prompts=False))
    assert stock.finish_s.tolist() == [50.0, 60.0] and first.finish_s.tolist() == [30.0, 60.0]
    priorities = dict(zip(first.turns.column("trajectory").tolist(), first.turns.column("priority").tolist(), strict=True))
    assert priorities == {0: 0, 1: 1}, "it never changes"
