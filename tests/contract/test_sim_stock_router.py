"""The simulator's stock arm and verl's own router object, each driving the same simulated cluster: turn for turn the same choices."""

import random

import pytest

pytest.importorskip("verl")

from verl.workers.rollout.router import GlobalRequestLoadBalancer

from verl_heddle.latency.model import LatencyModel
from verl_heddle.options import Options
from verl_heddle.orchestrator import Orchestrator
from verl_heddle.simulate import EngineOptions, FleetChange, make_fleet, simulate
from verl_heddle.simulate.baselines import Stock
from verl_heddle.traces import generate
from verl_heddle.trajectory import Decision, Reason

LATENCY = LatencyModel.affine(0.01, 0.0005, 1e-8, prefill_per_token_s=1e-4)


class Verl:
    """verl's `GlobalRequestLoadBalancer` as a policy; `calls` is what it was asked and what it answered."""

    def __init__(self):
        self.router = GlobalRequestLoadBalancer({})
        self.calls = []

    def replicas_added(self, replicas):
        self.router.add_servers({replica.name: None for replica in replicas})

    def replicas_removed(self, names):
        self.router.remove_servers(list(names))

    def turn_started(self, turn, now):
        replica, _ = self.router.acquire_server(turn.conversation)
        self.calls.append((turn.conversation, replica, now))
        return Decision(replica, 0, Reason.STICKY)

    def turn_finished(self, turn, now):
        self.router.release_server(turn.replica)

    def trajectory_ended(self, end, now):
        pass


class Recorded:
    """A policy of ours that notes its decisions like `Verl`."""

    def __init__(self, policy):
        self.policy = policy
        self.calls = []

    def __getattr__(self, name):
        return getattr(self.policy, name)

    def turn_started(self, turn, now):
        decision = self.policy.turn_started(turn, now)
        self.calls.append((turn.conversation, decision.replica, now))
        return decision


@pytest.mark.parametrize("seed", [0, 1, 7])
@pytest.mark.parametrize("make", [Stock, lambda seed: Orchestrator(Options(seed=seed, observe=True))], ids=["stock", "observe"])
def test_same_choices_as_verl(seed, make):
    work = generate("search", 20, 8, seed=seed)
    fleet = make_fleet(8, 1, LATENCY, slots=16)
    added = tuple(make_fleet(8, (4, 4), LatencyModel.affine(1.0, tps=(4,))))
    changes = [FleetChange(30.0, remove=(fleet[0].name, fleet[3].name), add=added[:1], ready_s=31.0)]
    both = LatencyModel.affine(0.01, 0.0005, 1e-8, prefill_per_token_s=1e-4, tps=(1, 4))
    options = EngineOptions(turn_overhead_s=0.003)
    verl, ours = Verl(), Recorded(make(seed))
    random.seed(seed)
    theirs = simulate(work, fleet, both, verl, engine=options, changes=changes)
    mine = simulate(work, fleet, both, ours, engine=options, changes=changes)
    assert len(verl.calls) >= sum(len(item.steps) for item in work)
    assert ours.calls == verl.calls
    assert (mine.finish_s == theirs.finish_s).all()
    assert verl.router.get_total_inflight() == 0
