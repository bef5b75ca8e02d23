"""What holds for all the peers' laws over programs, and for the resident set, whatever the workload."""

from functools import partial
from math import inf

import pytest
from drawn import examples
from hypothesis import given
from hypothesis import strategies as st
from simulate_cases import FULL, trajectory, workloads
from test_conservation import needed, watch

from verl_heddle.fleet import Replica
from verl_heddle.options import Options, Residents
from verl_heddle.orchestrator import Orchestrator
from verl_heddle.simulate import EngineOptions, FleetChange, simulate
from verl_heddle.simulate.baselines import Continuum, Lfs, ThunderAgent, UniBoost, WaveAdmission
from verl_heddle.simulate.baselines.programs import Programs

LAWS = {
    "thunder_agent": ThunderAgent,
    "thunder_agent, decay": partial(ThunderAgent, decay=True),
    "continuum": Continuum,
    "wave_admission": WaveAdmission,
    "wave_admission, strict": partial(WaveAdmission, max_wait_s=inf, first_wave=0),
    "lfs": Lfs,
    "lfs, not sticky": partial(Lfs, sticky=False),
    "uniboost": UniBoost,
    "residents": lambda seed: Orchestrator(Options(seed=seed, residents=Residents(enable=True))),
    "residents, by arrival": lambda seed: Orchestrator(Options(seed=seed, residents=Residents(enable=True, order="by_arrival"))),
}


def settled(policy):
    """Nothing is left in the books once everybody has ended."""
    if isinstance(policy, Orchestrator):
        assert all(abs(policy.residents.used(name)) < 1e-6 for name in policy.residents.homes()) and policy.due_s(0.0) == inf
        assert set(policy.residents.now.values()) <= {0} and not policy.holds
    if not isinstance(policy, Programs):
        assert set(policy.inflight.values()) <= {0}
        return
    assert not policy.live and not policy.waiting and policy.due_s(0.0) == inf
    for home in policy.homes.values():
        assert (home.busy, home.used, home.claims, home.programs) == (0, 0, 0, {})


@pytest.mark.parametrize("name", LAWS)
@examples(20)
@given(
    work=workloads(),
    order=st.sampled_from(["fcfs", "priority"]),
    replicas=st.integers(1, 3),
    slots=st.integers(1, 5),
    spare=st.none() | st.integers(0, 300),
    late=st.booleans(),
)
def test_everybody_ends_and_no_token_is_lost(name, work, order, replicas, slots, spare, late):
    fleet = [Replica(f"r{i}", 1, slots, None if spare is None else needed(work) + spare) for i in range(replicas)]
    arrivals = [0.37 * index * late for index in range(len(work))]

    def play(policy):
        return simulate(work, fleet, FULL, policy, engine=EngineOptions(order), arrivals_s=arrivals)

    with pytest.MonkeyPatch.context() as patch:
        watch(patch)
        policy = LAWS[name](0)
        result = play(policy)
    settled(policy)
    assert result.output_tokens.tolist() == [item.output_tokens for item in work]
    assert len(result.turns) == sum(len(item.steps) for item in work) and set(result.outcomes) == {"finished"}
    parts = result.queue_s + result.prefill_s + result.generate_s + result.tool_s + result.other_s
    assert parts == pytest.approx(result.finish_s - result.start_s, rel=1e-9)
    assert (play(LAWS[name](0)).finish_s == result.finish_s).all(), "the same seed gives the same result"
    assert play(policy).tokens == result.tokens, "the policy serves the next step"


@pytest.mark.parametrize("name", LAWS)
@examples(12)
@given(work=workloads(), spare=st.none() | st.integers(0, 100), when=st.floats(0.05, 1.0))
def test_a_fleet_that_changes(name, work, spare, when):
    kv = None if spare is None else needed(work) + spare
    fleet = [Replica("a", 1, 2, kv), Replica("b", 1, 3, kv)]
    changes = [FleetChange(when, remove=("b",), add=(Replica("c", 1, 2, kv),)), FleetChange(2 * when, remove=("a",))]
    policy = LAWS[name](0)
    result = simulate(work, fleet, FULL, policy, engine=EngineOptions("priority"), changes=changes)
    settled(policy)
    assert result.output_tokens.tolist() == [item.output_tokens for item in work]


def test_a_crowd_reads_less_under_the_laws_that_keep_contexts():
    work = [trajectory(f"p{i}", 0, [(0, 40, 0.5), (20, 40, 0.5), (20, 40, 0.0)], 60) for i in range(24)]
    fleet = [Replica("a", 1, 24, 800)]
    read = {}
    for name in ("uniboost", "thunder_agent", "continuum"):
        result = simulate(work, fleet, FULL, LAWS[name](0), engine=EngineOptions("priority", block_tokens=1))
        read[name] = sum(replica.recomputed_tokens for replica in result.replicas)
    assert read["thunder_agent"] < read["continuum"] < read["uniboost"]
