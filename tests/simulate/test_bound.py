"""No schedule beats the bound, and where the optimum is known the bound is it."""

import pytest
from drawn import examples
from hypothesis import given
from hypothesis import strategies as st
from simulate_cases import FULL, Anything, lengths, peers, trajectory, workloads

from verl_heddle.fleet import Replica
from verl_heddle.latency import load
from verl_heddle.latency.model import LatencyModel
from verl_heddle.simulate import EngineOptions, lower_bound, make_fleet, simulate
from verl_heddle.simulate.baselines import LptOracle, Slime, Stock
from verl_heddle.traces import generate


@examples(80)
@given(
    workloads(),
    st.sampled_from([(1,), (2, 1), (4,), (1, 1, 1, 1), (4, 2, 1, 1)]),
    st.integers(1, 6),
    st.one_of(st.none(), st.integers(0, 100)),
    st.booleans(),
    st.sampled_from([0.0, 0.02]),
    st.integers(0, 9),
)
def test_no_policy_beats_it(work, layout, slots, spare, share, overhead, seed):
    """Random placement, order and pre-warming, longest first, least loaded: all above the bound for their fleet's GPUs."""
    capacity = None
    if spare is not None:
        capacity = spare + max(t.prompt_tokens + sum(s.input_tokens + s.output_tokens for s in t.steps) for t in work)
    options = EngineOptions("priority", share_prompts=share, block_tokens=4, turn_overhead_s=overhead)
    holds = dict.fromkeys((1, 2, 4), capacity)
    bound = lower_bound(work, sum(layout), FULL, (1, 2, 4), slots=slots, kv_tokens=holds, engine=options)
    fleet = make_fleet(sum(layout), layout, FULL, slots, kv_tokens=holds)
    for policy in (Anything(seed, prewarms=True), LptOracle(work), Slime(), Stock()):
        result = simulate(work, fleet, FULL, policy, engine=options)
        assert result.makespan_s >= bound.makespan_s * (1 - 1e-9)


def test_tight_for_one_trajectory():
    work = [trajectory("p", 0, [(0, 5000, 2.0), (0, 3000, 1.0)], 16)]
    latency = LatencyModel.affine(0.01, 0.001, 1e-6, prefill_per_token_s=1e-4, tps=(1, 4), speedup={4: 3.0})
    result = simulate(work, make_fleet(4, 4, latency), latency, Stock())
    bound = lower_bound(work, 4, latency, (1, 4))
    assert bound.makespan_s == bound.longest_s == pytest.approx(result.makespan_s, rel=2e-3)
    assert bound.longest_index == 0


def test_tight_for_equal_work_that_fills_the_slots():
    work = lengths(*[1000] * 64)
    latency = LatencyModel.affine(0.01, 0.001)
    result = simulate(work, make_fleet(4, 1, latency, slots=8), latency, Slime())
    bound = lower_bound(work, 4, latency, (1,), slots=8)
    assert bound.makespan_s == bound.work_s == pytest.approx(result.makespan_s, rel=1e-6)


def test_kv_limits_the_batch():
    """What does not fit cannot be batched: the bound knows."""
    work = lengths(*[100] * 40, prompt_tokens=1000)
    latency = LatencyModel.affine(0.01, 0.0001)
    free = lower_bound(work, 1, latency, (1,), slots=40)
    tight = lower_bound(work, 1, latency, (1,), slots=40, kv_tokens={1: 5000})
    assert tight.work_s > 5 * free.work_s
    result = simulate(work, [Replica("r", slots=40, kv_tokens=5000)], latency, Stock())
    assert tight.work_s <= result.makespan_s < 1.5 * tight.work_s


def test_shipped_table():
    """With measured tables, whose premises hold only nearly: the bound is below every peer, and not far below the best."""
    latency = load("h200", "Qwen3-8B")
    work = generate("coding", 16, 8, seed=2)
    bound = lower_bound(work, 8, latency, latency.tps)
    fastest = min(result.makespan_s for result in peers(work, make_fleet(8, 1, latency), latency).values())
    assert 0.1 * fastest < bound.makespan_s < fastest


def test_errors():
    with pytest.raises(ValueError, match="none of the tensor-parallel degrees"):
        lower_bound(lengths(5), 1, FULL, (2, 4))
    with pytest.raises(ValueError, match="no trajectories"):
        lower_bound([], 1, FULL, (1,))
