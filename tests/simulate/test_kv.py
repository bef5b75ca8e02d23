"""KV capacity and the prefix cache: vLLM's rules, one at a time."""

import pytest
from simulate_cases import lengths, trajectory

from verl_heddle.fleet import Replica
from verl_heddle.latency.model import LatencyModel
from verl_heddle.simulate import EngineOptions, simulate
from verl_heddle.simulate.baselines import RoundRobin, Stock
from verl_heddle.simulate.cache import PrefixCache
from verl_heddle.simulate.workload import Request, states
from verl_heddle.trajectory import Decision, Reason, Trajectory, Turn

STEP = LatencyModel.affine(1.0)
"""One second a step, whatever is in it; prefill is free."""

PREFILL = LatencyModel.affine(1.0, prefill_per_token_s=0.1)
OPEN = EngineOptions(block_tokens=1, share_prompts=False)


class ByPrompt(Stock):
    """Priority = number in the prompt's name, `p<number>`."""

    def turn_started(self, turn, now):
        return Decision(super().turn_started(turn, now).replica, int(turn.trajectory.prompt[1:]), Reason.STICKY)


def test_fcfs_throws_out_the_last_admitted_and_takes_it_back_first():
    """Three of 10 + up to 20 tokens in 60: the last admitted leaves when the cache is full, and returns before the fourth."""
    work = lengths(20, 20, 20, 5, prompt_tokens=10)
    result = simulate(work, [Replica("r", slots=3, kv_tokens=60)], STEP, Stock(), engine=OPEN)
    assert result.turns.column("preemptions")[result.turns.column("trajectory").argsort()].tolist() == [0, 0, 1, 0]
    # step 11 would need 3 x 20 + 3 tokens: trajectory 2 leaves after its 11th token, the others end at 20
    assert result.finish_s.tolist() == [20.0, 20.0, 29.0, 25.0]
    assert result.queue_s.tolist() == [0.0, 0.0, 9.0, 20.0]


def test_priority_throws_out_the_worst():
    work = lengths(20, 20, 20, prompt_tokens=10)
    work = [trajectory(f"p{rank}", 0, [(0, 20, 0.0)], 10) for rank in (5, 9, 1)]
    result = simulate(work, [Replica("r", slots=3, kv_tokens=60)], STEP, ByPrompt(), engine=EngineOptions("priority", block_tokens=1))
    assert result.preemptions == 1
    assert result.finish_s.argmax() == 1


def test_recomputation_costs_what_was_evicted():
    """What a victim had computed stays in the cache until others need the room; the rest is prefilled again."""
    work = lengths(20, 20, 20, prompt_tokens=10)
    result = simulate(work, [Replica("r", slots=3, kv_tokens=60)], PREFILL, Stock(), engine=OPEN)
    again = result.turns.column("recomputed_tokens")
    assert again.sum() == result.recomputed_tokens > 0
    # victim: 10 + 11 tokens at step 11, KV of 20 of them; the others hold 2 x 29 of 60 when they end, and their last tokens are counted too
    assert 18 <= again[-1] <= 20
    roomy = simulate(work, [Replica("r", slots=3, kv_tokens=60)], PREFILL, Stock(), engine=EngineOptions(prefix_cache=False))
    assert roomy.recomputed_tokens == 20


def test_a_turn_finds_its_prefix_where_it_ran_and_pays_elsewhere():
    work = [trajectory("p", 0, [(0, 100, 1.0), (7, 5, 1.0), (7, 5, 0.0)], 50)]
    stay = simulate(work, [Replica("a"), Replica("b")], PREFILL, Stock(), engine=OPEN)
    assert stay.turns.column("cached_tokens").tolist() == [0, 149, 161]
    assert stay.migrations == 0 and stay.recomputed_tokens == 0
    move = simulate(work, [Replica("a"), Replica("b")], PREFILL, RoundRobin(), engine=OPEN)
    assert move.turns.column("cached_tokens").tolist() == [0, 0, 149]  # the third is back where the first was
    assert move.migrations == 2 and move.recomputed_tokens == 149 + 12
    assert move.makespan_s - stay.makespan_s == pytest.approx((149 + 12) * 0.1)


def test_blocks_are_reused_whole():
    work = [trajectory("p", 0, [(0, 30, 1.0), (7, 5, 0.0)], 50)]
    result = simulate(work, [Replica("a")], PREFILL, Stock(), engine=EngineOptions(block_tokens=32))
    assert result.turns.column("cached_tokens").tolist() == [0, 64]


def test_least_recently_used_goes_first_from_its_end():
    work = states(lengths(1, 1, 1), OPEN, 0)
    cache = PrefixCache(100, 10, True)
    for state, context in zip(work, (40, 40, 50), strict=True):
        request = Request(state, context, 1, 0)
        cache.acquire(request)
        cache.release(request, context)
    assert cache.in_use == 0 and cache.held == 100
    kept = [cache.hit(Request(state, 60, 1, 0)) for state in work]
    assert kept == [(10, 0), (40, 0), (50, 0)]


def test_a_group_computes_its_prompt_once():
    work = [trajectory("p", trial, [(0, 5, 0.0)], 100) for trial in range(4)]
    shared = simulate(work, [Replica("a", kv_tokens=140)], PREFILL, Stock())
    assert shared.turns.column("cached_tokens").tolist() == [0, 96, 96, 96]
    assert shared.queue_s.max() == 0  # 96 + 4 x 4 tokens, and 4 x 5 that they generate
    alone = simulate(work, [Replica("a", kv_tokens=140)], PREFILL, Stock(), engine=EngineOptions(share_prompts=False))
    assert alone.queue_s.max() > 0 and alone.replicas[0].prefilled_tokens == 400


def test_a_context_that_shrank_keeps_its_unchanged_prefix():
    def with_contexts(*turns):
        steps = tuple(Turn(0, out, "t", 1.0, ctx_tokens=ctx, ctx_reset=reset) for ctx, out, reset in turns)
        return [Trajectory("t", "t", "p", 0, turns[0][0], steps)]

    dropped = simulate(with_contexts((50, 30, False), (60, 5, False)), [Replica("a")], PREFILL, Stock(), engine=OPEN)
    assert dropped.turns.column("cached_tokens").tolist() == [0, 50]  # the output's reasoning is gone, what it followed is not
    compact = simulate(with_contexts((50, 200, False), (300, 5, False), (90, 5, True)), [Replica("a")], PREFILL, Stock(), engine=OPEN)
    assert compact.turns.column("cached_tokens").tolist() == [0, 249, 50]  # only the prompt survives compaction


def test_admission_waits_for_room_for_the_whole_context():
    work = lengths(10, 10, prompt_tokens=30)
    result = simulate(work, [Replica("r", kv_tokens=50)], STEP, Stock(), engine=OPEN)
    assert result.finish_s.tolist() == [10.0, 20.0]
    assert result.preemptions == 0
