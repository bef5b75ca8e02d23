"""Our router against verl's own: the same choices for the same events, and the whole protocol."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("verl")

from verl.workers.rollout.router import GlobalRequestLoadBalancer, get_router_handle  # noqa: F401

from verl_heddle.options import Options
from verl_heddle.place.sticky import CACHE_SIZE, StickyLeastInflight
from verl_heddle.trajectory import Outcome, Reason, TrajectoryEnd, TrajectoryId, TurnEnd, TurnStart
from verl_heddle.verl_plugin.router import HeddleRouter

EVENTS = st.lists(st.tuples(st.sampled_from("aaaaarrrARc"), st.integers(0, 11)), max_size=200)


@settings(max_examples=200, deadline=None)
@given(EVENTS, st.integers(0, 99), st.booleans())
def test_choice_for_choice_like_verl(events, seed, deterministic):
    """a acquire, r release, A add a server, R remove one, c clear the sticky cache; a table of 4 conversations, so that it overflows."""
    servers = ["s0", "s1", "s2"]
    theirs = GlobalRequestLoadBalancer(dict.fromkeys(servers), max_cache_size=4, full_determinism=deterministic)
    ours = StickyLeastInflight(random.Random(seed), deterministic, cache_size=4)
    for server in servers:
        ours.add(server)
    random.seed(seed)
    for kind, number in events:
        server = f"s{number % 5}"
        if kind == "a" and theirs.get_all_servers():
            assert ours.acquire(f"c{number}")[0] == theirs.acquire_server(f"c{number}")[0]
        elif kind == "r":
            ours.release(server)
            theirs.release_server(server)
        elif kind == "A":
            ours.add(server)
            theirs.add_servers({server: None})
        elif kind == "R" and len(theirs.get_all_servers()) > 1:
            ours.remove(server)
            theirs.remove_servers([server])
        elif kind == "c":
            assert ours.forget() == theirs.clear_sticky_cache()["cleared_entries"]
        assert ours.inflight == theirs.get_status()["servers"]


def test_same_cache_size():
    from verl.workers.rollout import router

    assert router.DEFAULT_ROUTING_CACHE_SIZE == CACHE_SIZE


def turn(sample: int, number: int = 0) -> TurnStart:
    return TurnStart(TrajectoryId("p", "u", sample, 1), f"c{sample}", number, 10, 0)


def test_the_router_serves_trajectories_and_verls_own_clients():
    router = HeddleRouter({"s0": "h0", "s1": "h1", None: None}, {"router_class": "x"})
    assert router.configure(Options(), tp=2, slots=8, deterministic=False) == {"s0": "h0", "s1": "h1"}
    decision = router.turn_started(turn(0))
    assert decision.reason is Reason.LEAST_INFLIGHT
    server, handle = router.acquire_server("somebody")
    assert server != decision.replica and handle == f"h{server[1]}", "verl's clients see our turns in flight"
    assert router.get_total_inflight() == 2
    router.turn_finished(TurnEnd(turn(0).trajectory, decision.replica, 0, 5))
    router.trajectory_ended(TrajectoryEnd(turn(0).trajectory, Outcome.FINISHED, 5, 1))
    router.release_server(server, request_id="somebody")
    assert router.get_total_inflight() == 0
    router.add_servers({"s2": "h2"})
    router.remove_servers(["s0"])
    assert router.get_all_servers() == ["s1", "s2"] and router.handles() == {"s1": "h1", "s2": "h2"}
    assert router.get_status()["active_servers"] == 2
    assert router.clear_sticky_cache()["cleared_entries"] >= 1


def test_a_raising_orchestrator_gives_way_to_verls_rule(monkeypatch, capsys):
    router = HeddleRouter({"s0": "h0", "s1": "h1"})
    home = router.turn_started(turn(0)).replica

    def broken(*args):
        raise ZeroDivisionError("policy bug")

    for method in ("turn_started", "turn_finished", "trajectory_ended"):
        monkeypatch.setattr(router._orchestrator, method, broken)
    again = router.turn_started(turn(0, 1))
    assert again.reason is Reason.FALLBACK_POLICY and again.replica == home, "still sticky"
    other = router.turn_started(turn(1))
    assert other.replica != home, "still least in flight"
    router.turn_finished(TurnEnd(turn(0).trajectory, home, 1, 5))
    router.trajectory_ended(TrajectoryEnd(turn(0).trajectory, Outcome.FINISHED, 5, 2))
    assert router.stats() == {"turn_started": 2, "turn_finished": 1, "trajectory_ended": 1}
    assert router.get_inflight_count(home) == 1
    assert capsys.readouterr().err.count("turn_started") == 1, "said once"


def test_an_empty_pool_is_verls_own_error():
    with pytest.raises(RuntimeError, match="No available servers"):
        HeddleRouter({}).turn_started(turn(0))
