"""KV cache kept in the host's memory: what was evicted is read back, at its price, within its room."""

from dataclasses import replace
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st
from simulate_cases import lengths, trajectory, workloads

from verl_heddle.fleet import Replica
from verl_heddle.latency.model import Engine, LatencyModel, Memory
from verl_heddle.simulate import EngineOptions, HostTier, Outage, simulate
from verl_heddle.simulate.baselines import Stock
from verl_heddle.simulate.cache import PrefixCache
from verl_heddle.simulate.workload import Request, states, walk

BYTES = 1000
PREFILL = LatencyModel.affine(1.0, prefill_per_token_s=0.1, memory=Memory(10**9, 0, BYTES, 0))
"""One second a step, a tenth of one for a token computed."""

OPEN = EngineOptions(block_tokens=1, share_prompts=False)
TIER = replace(OPEN, tier=HostTier(bytes_per_s=100 * BYTES))
"""A hundredth of a second for a token read back."""


def pushed_out():
    """p0 is in a tool of a hundred seconds while p1 needs most of the KV cache."""
    return [
        trajectory("p0", 0, [(0, 10, 100.0), (5, 5, 0.0)], 50),
        trajectory("p1", 0, [(0, 30, 0.0)], 60),
    ]


def test_what_was_evicted_is_read_back_and_not_computed():
    fleet = [Replica("r", kv_tokens=100)]
    lost = simulate(pushed_out(), fleet, PREFILL, Stock(), engine=OPEN)
    kept = simulate(pushed_out(), fleet, PREFILL, Stock(), engine=TIER)
    again = lost.recomputed_tokens
    assert again > 0 and kept.recomputed_tokens == 0
    assert kept.summary()["restored_tokens"] == again
    assert kept.summary()["prefilled_tokens"] == lost.summary()["prefilled_tokens"] - again
    assert lost.makespan_s - kept.makespan_s == pytest.approx(again * (0.1 - 0.01))
    assert kept.turns.column("cached_tokens").tolist()[-1] == 59  # all but the last token, which has no KV yet


def test_the_tier_has_only_its_room():
    """Half of what was evicted fits; the rest is computed."""
    fleet = [Replica("r", kv_tokens=100)]
    again = simulate(pushed_out(), fleet, PREFILL, Stock(), engine=OPEN).recomputed_tokens
    half = replace(OPEN, tier=HostTier(bytes_per_s=100 * BYTES, host_bytes=BYTES * (again // 2), gpus_per_host=1))
    result = simulate(pushed_out(), fleet, PREFILL, Stock(), engine=half)
    assert result.summary()["restored_tokens"] == again // 2
    assert result.recomputed_tokens == again - again // 2


def test_a_replica_has_its_gpus_share_of_the_host():
    """A token's bytes are spread over a replica's GPUs, so each GPU's share of the host counts."""
    tier = HostTier(host_bytes=800 * BYTES, gpus_per_host=8)
    assert tier.tokens(BYTES) == 100 and tier.tokens(BYTES // 2) == 200
    assert HostTier().tokens(BYTES) == inf


def test_the_longest_evicted_leaves_the_tier_first_from_its_end():
    work = states(lengths(1, 1, 1), OPEN, 0)
    cache = PrefixCache(50, 10, True, tier=60)
    for state in work:
        request = Request(state, 40, 1, 0)
        cache.acquire(request)
        cache.release(request, 40)
    # 10 of the second and all 40 of the third are held; the first's 40 and 30 of the second were evicted, the tier took 60 of these 70
    assert [cache.hit(Request(state, 60, 1, 0)) for state in work] == [(30, 30), (40, 30), (40, 0)]
    assert cache.tiered == 60
    cache.trim(1, 20)
    assert cache.hit(Request(work[1], 60, 1, 0)) == (20, 10) and cache.tiered == 40
    cache.clear()
    assert [cache.hit(Request(state, 60, 1, 0)) for state in work] == [(0, 0)] * 3 and cache.tiered == 0


def test_a_shared_prompt_is_kept_too():
    options = EngineOptions(block_tokens=10)
    first, second = states([trajectory("p", trial, [(0, 5, 0.0)], 41) for trial in range(2)], options, 0)
    (other,) = states(lengths(1), OPEN, 0)
    other.index = 7
    cache = PrefixCache(60, 10, True, tier=inf)
    for state, context in ((first, 51), (other, 60)):
        request = Request(state, context, 1, 0)
        cache.acquire(request)
        cache.release(request, context)
    assert cache.hit(Request(second, 51, 1, 0)) == (40, 40)
    assert cache.hit(Request(first, 61, 1, 0)) == (50, 50)


def test_new_weights_find_nothing_of_the_old():
    """An outage without the cache, a weight sync, forgets the tier as well."""
    fleet = [Replica("r", kv_tokens=100)]
    outage = Outage("r", 90.0, 95.0, keep_cache=False)
    result = simulate(pushed_out(), fleet, PREFILL, Stock(), engine=TIER, changes=[outage])
    assert result.summary()["restored_tokens"] == 0


def test_a_tier_needs_to_know_what_a_token_weighs():
    nameless = LatencyModel("nameless", {1: Engine(PREFILL.engines[1].decode, PREFILL.engines[1].prefill)})
    with pytest.raises(ValueError, match="bytes of a token"):
        simulate(pushed_out(), [Replica("r", kv_tokens=100)], nameless, Stock(), engine=TIER)
    assert simulate(pushed_out(), [Replica("r")], nameless, Stock(), engine=TIER).recomputed_tokens == 0


@given(workloads(), st.integers(0, 60), st.one_of(st.just(inf), st.integers(1, 200)))
def test_the_tier_only_turns_computing_into_reading(work, spare, room):
    """Whatever the load: no token is lost or found twice, and an unlimited tier leaves nothing to compute again."""
    fleet = [Replica("r", slots=4, kv_tokens=max(context + output for item in work for context, _, output in walk(item)) + spare)]
    tier = HostTier(bytes_per_s=inf, host_bytes=room * BYTES, gpus_per_host=1)
    for options in (EngineOptions(block_tokens=1), EngineOptions(block_tokens=8)):
        result = simulate(work, fleet, PREFILL, Stock(), engine=replace(options, tier=tier))
        assert result.output_tokens.tolist() == [item.output_tokens for item in work]
        if room == inf and options.block_tokens == 1:
            assert result.recomputed_tokens == 0
