"""The event-driven engine against closed forms and against a simulator that takes one step at a time."""

import pytest
from drawn import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from simulate_cases import FLAT, FULL, lengths, step_by_step, trajectory, workloads

from verl_heddle.fleet import Replica
from verl_heddle.latency.model import LatencyModel
from verl_heddle.simulate import EngineOptions, simulate
from verl_heddle.simulate.baselines import LptOracle, Stock
from verl_heddle.trajectory import Decision, Reason

PLAIN = EngineOptions(batch_tokens=None, share_prompts=False)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 5000), min_size=1, max_size=60), st.floats(1e-4, 1), st.floats(0, 0.1))
def test_staircase(tokens, base, per_seq):
    """One replica, no tools, no prefill, all at once: sum of L_k (tau(k) - tau(k-1)), lengths descending (heddle.md 5.3)."""
    latency = LatencyModel.affine(base, per_seq)
    result = simulate(lengths(*tokens), [Replica("r", slots=len(tokens))], latency, Stock(), engine=PLAIN)
    tau = [0.0] + [latency.decode_s(1, k, 0) for k in range(1, len(tokens) + 1)]
    falling = sorted(tokens, reverse=True)
    expected = sum(length * (tau[k + 1] - tau[k]) for k, length in enumerate(falling))
    assert result.makespan_s == pytest.approx(expected, rel=1e-9)
    assert result.queue_s.max() == 0 and result.prefill_s.max() == 0
    assert result.generate_s == pytest.approx(result.finish_s, rel=1e-9)


def test_staircase_of_a_table():
    """The same with any step times by batch: nothing depends on the formula being linear."""
    tau = [0.0, 5.0, 5.5, 9.0, 9.25, 20.0]

    class Table:
        def decode_s(self, tp, batch, context):
            return tau[batch]

        def prefill_s(self, tp, new, context=0):
            return 0.0

    result = simulate(lengths(7, 3, 9, 9, 1), [Replica("r", slots=5)], Table(), Stock(), engine=PLAIN)
    expected = sum(n * (tau[k + 1] - tau[k]) for k, n in enumerate([9, 9, 7, 3, 1]))
    assert result.makespan_s == pytest.approx(expected, rel=1e-12)


def test_one_trajectory_by_hand():
    """Prefill of the prompt, later of what the cache lacks, growing context, tools: every second accounted for."""
    work = [trajectory("p", 0, [(0, 40, 1.5), (25, 30, 0.25), (5, 1, 0.0)], prompt_tokens=33)]
    result = simulate(work, [Replica("r")], FULL, Stock(), engine=PLAIN)
    decode = lambda c: 0.01 + 0.0007 + 3e-7 * c  # noqa: E731
    prefill = lambda n, c: FULL.prefill_s(1, n, c) - FULL.prefill_s(1, 1, c)  # noqa: E731
    context, generate, filled, cached = 33, 0.0, 0.0, 0
    for fresh, output in ((0, 40), (25, 30), (5, 1)):
        context += fresh
        filled += prefill(context - cached, cached)
        generate += sum(decode(context + i) for i in range(output))
        context += output
        cached = (context - 1) // 16 * 16
    assert result.generate_s[0] == pytest.approx(generate, rel=1e-9)
    assert result.prefill_s[0] == pytest.approx(filled, rel=1e-9)
    assert result.tool_s[0] == 1.75
    assert result.makespan_s == pytest.approx(generate + filled + 1.75, rel=1e-9)
    assert result.turns.column("cached_tokens").tolist() == [0, 64, 112]


def test_chunked_prefill_slows_the_others():
    """1000 new tokens in a budget of 101 beside one decode: ten steps of 100, in which the decode gets ten tokens."""
    work = [trajectory("a", 0, [(0, 50, 0.0)], 1), trajectory("b", 0, [(0, 5, 0.0)], 1000)]
    latency = LatencyModel.affine(0.01, prefill_per_token_s=0.001)
    options = EngineOptions(batch_tokens=101, share_prompts=False)
    result = simulate(work, [Replica("r", slots=8)], latency, Stock(), engine=options, arrivals_s=[0.0, 0.1])
    # a: 10 steps alone, then 10 steps with 100 tokens of prefill each, then 30 more
    filling = latency.prefill_s(1, 1000) - latency.prefill_s(1, 1)
    assert result.finish_s[0] == pytest.approx(0.5 + filling)
    assert result.prefill_s[1] == pytest.approx(9 * 0.01 + filling)
    assert result.finish_s[1] == pytest.approx(0.1 + 0.14 + filling)


def test_a_begun_step_takes_no_newcomer():
    work = lengths(10, 10)
    result = simulate(work, [Replica("r")], LatencyModel.affine(1.0), Stock(), engine=PLAIN, arrivals_s=[0.0, 2.5])
    assert result.queue_s.tolist() == [0.0, 0.5]
    assert result.finish_s.tolist() == [10.0, 13.0]


def test_overhead_is_paid_by_every_turn():
    work = [trajectory("p", 0, [(0, 10, 2.0), (0, 10, 0.0)], 1)]
    result = simulate(work, [Replica("r")], LatencyModel.affine(0.1), Stock(), engine=EngineOptions(turn_overhead_s=0.25))
    assert result.makespan_s == pytest.approx(4.5)
    assert result.other_s[0] == 0.5
    assert sum(result.split(0).values()) == pytest.approx(4.5)


class Ranked(Stock):
    """Stock with a fixed priority for each prompt."""

    def __init__(self, ranks):
        super().__init__()
        self.ranks = ranks

    def turn_started(self, turn, now):
        replica = super().turn_started(turn, now).replica
        return Decision(replica, self.ranks[turn.trajectory.prompt, turn.trajectory.sample], Reason.STICKY)


@examples(80)
@given(
    workloads(),
    st.integers(1, 6),
    st.sampled_from(["fcfs", "priority"]),
    st.sampled_from([None, 8, 24, 64]),
    st.sampled_from([1, 16]),
    st.one_of(st.none(), st.integers(0, 200)),
    st.integers(0, 2**16),
)
def test_like_step_by_step(work, slots, order, batch_tokens, block, spare, salt):
    """Finish times equal those of the slow simulator: queues, priorities, KV pressure, chunked prefill, prefix cache, tools."""
    capacity = None
    if spare is not None:
        capacity = spare + max(t.prompt_tokens + sum(s.input_tokens + s.output_tokens for s in t.steps) for t in work)
    options = EngineOptions(order, batch_tokens, block, prefix_cache=capacity is None, share_prompts=False)
    ranks = {(item.prompt_id, item.trial): (salt >> i) % 4 for i, item in enumerate(work)}
    result = simulate(work, [Replica("r", slots=slots, kv_tokens=capacity)], FULL, Ranked(ranks), engine=options)
    expected = step_by_step(work, slots, FULL, options, capacity, [ranks[item.prompt_id, item.trial] for item in work])
    assert result.finish_s.tolist() == pytest.approx(expected, rel=1e-9)


def test_long_leaps_on_a_bent_table():
    """LEAP bounds what a chord may miss where the step time bends along the context."""
    points = [0, 2048, 8192, 32768]

    class Bent:
        def decode_s(self, tp, batch, context):
            values = [0.005, 0.0052, 0.0064, 0.0227]
            for left, right, low, high in zip(points, points[1:], values, values[1:], strict=False):
                if context <= right:
                    return low + (high - low) * (context - left) / (right - left)
            return values[-1]

        def prefill_s(self, tp, new, context=0):
            return 0.0

    work = lengths(30000)
    exact = sum(Bent().decode_s(1, 1, 1 + i) for i in range(30000))
    assert simulate(work, [Replica("r")], Bent(), Stock(), engine=PLAIN).makespan_s == pytest.approx(exact, rel=1e-3)


def test_longest_first_helps_a_single_slot_queue():
    """Sanity of direction: with few slots, the true longest first beats arrival order when the longest arrives last."""
    work = lengths(*[100] * 8, 400)
    fleet = [Replica("r", slots=2)]
    stock = simulate(work, fleet, FLAT, Stock(), engine=PLAIN)
    lpt = simulate(work, fleet, FLAT, LptOracle(work), engine=EngineOptions(order="priority", batch_tokens=None))
    assert lpt.makespan_s < stock.makespan_s
