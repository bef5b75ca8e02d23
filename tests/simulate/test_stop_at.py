"""`StopAt`: an early stop that the engine keeps by itself, and shaping on top of it."""

from __future__ import annotations

import pytest
from drawn import examples
from hypothesis import given
from hypothesis import strategies as st
from simulate_cases import FLAT, FULL, lengths, trajectory, workloads

from verl_heddle.fleet import Replica
from verl_heddle.latency.model import LatencyModel
from verl_heddle.options import Shape
from verl_heddle.shape.plan import Share, StepPlan
from verl_heddle.shape.select import Fate, Rule, Sample, choose
from verl_heddle.shape.settings import ShapeReason
from verl_heddle.shape.shaper import Shaper
from verl_heddle.simulate import EngineOptions, StopAt, simulate
from verl_heddle.simulate.baselines import Stock
from verl_heddle.simulate.shaped import Shaped, started

STEP = LatencyModel.affine(1.0)
A_STEP_S = 0.05
"""More than any step of `FULL` here takes."""


class Limits(Stock):
    """Sets limits when the first trajectory has ended, or with each turn's end."""

    def __init__(self, limits: dict[str, int], each_turn: bool = False) -> None:
        super().__init__()
        self.limits, self.each_turn, self.told_s = limits, each_turn, float("inf")

    def turn_finished(self, turn, now):
        super().turn_finished(turn, now)
        self.told_s = min(self.told_s, now) if self.each_turn else self.told_s
        return [StopAt(key, tokens) for key, tokens in self.limits.items()] if self.each_turn else []

    def trajectory_ended(self, end, now):
        self.told_s = min(self.told_s, now)
        return [StopAt(key, tokens) for key, tokens in self.limits.items()]


def test_running_waiting_past_it_and_in_a_tool():
    work = [*lengths(3, 10, 10, 10), trajectory("p4", 0, [(0, 2, 100.0), (0, 9, 0.0)], 1)]
    limits = {"0:p1_0": 5, "0:p2_0": 2, "0:p3_0": 4, "0:p4_0": 2, "unknown": 1}
    slots = [Replica("r", slots=4)]
    options = EngineOptions(share_prompts=False)
    result = simulate(work, slots, STEP, Limits(limits), engine=options, arrivals_s=[0.0, 0.0, 0.0, 2.5, 0.0])
    # at 3: p1 has 3 and goes on to 5, p2 is past its limit, p3 is new and stops at 4, p4 in its tool has its 2
    assert result.outcomes == ("finished", "cancelled", "cancelled", "cancelled", "cancelled")
    assert result.output_tokens.tolist() == [3, 5, 3, 4, 2]
    assert result.finish_s.tolist() == [3.0, 5.0, 3.0, 7.0, 3.0]


def test_a_limit_counts_over_all_turns_and_lets_go_who_ends_by_it():
    work = [
        *lengths(1),
        trajectory("p1", 0, [(0, 4, 5.0), (0, 4, 5.0), (0, 4, 0.0)], 1),
        trajectory("p2", 0, [(0, 4, 5.0), (0, 2, 0.0)], 1),
    ]
    result = simulate(work, [Replica("r")], STEP, Limits({"0:p1_0": 6, "0:p2_0": 6}), engine=EngineOptions(share_prompts=False))
    assert result.outcomes == ("finished", "cancelled", "finished") and result.output_tokens.tolist() == [1, 6, 6]


def test_a_turn_that_ends_on_the_limit_starts_no_tool():
    work = [*lengths(1), trajectory("p1", 0, [(0, 4, 50.0), (0, 4, 0.0)], 1)]
    result = simulate(work, [Replica("r")], STEP, Limits({"0:p1_0": 4}), engine=EngineOptions(share_prompts=False))
    assert result.outcomes[1] == "cancelled" and result.finish_s.tolist() == [1.0, 4.0] and result.tool_s[1] == 0.0


@given(workloads(), st.integers(1, 60), st.booleans(), st.sampled_from([None, 60, 200]))
@examples(50)
def test_nobody_passes_a_limit_and_nobody_below_it_is_stopped(work, limit, each_turn, kv):
    """Whatever KV pressure and preemption do to the turn meanwhile."""
    if kv is not None:
        kv = max(kv, max(sum((t.input_tokens or 0) + (t.output_tokens or 0) for t in item.steps) + item.prompt_tokens for item in work))
    keys = {f"0:{item.prompt_id}_{item.trial}": limit for item in work}
    fleet = [Replica("a", 1, 3, kv), Replica("b", 1, 2, kv)]
    policy = Limits(keys, each_turn)
    result = simulate(work, fleet, FULL, policy, engine=EngineOptions(block_tokens=4))
    whole = [item.output_tokens for item in work]
    assert sum(policy.inflight.values()) == 0
    for made, asked, outcome, end_s in zip(result.output_tokens, whole, result.outcomes, result.finish_s, strict=True):
        assert (made == asked) if outcome == "finished" else limit <= made <= asked
        if outcome == "cancelled" and made > limit:  # it was past the limit when that was told, and left with the step under way
            assert end_s <= policy.told_s + A_STEP_S


@given(st.lists(st.lists(st.integers(1, 90), min_size=4, max_size=6), min_size=1, max_size=4), st.integers(0, 3), st.floats(0, 100))
@examples(50)
def test_shaped_keeps_what_the_rule_keeps_whatever_the_speeds(groups, longest, patience):
    """Replicas of different load finish siblings in another order than their lengths; the kept are the same."""
    rule = Rule(3, longest, patience)
    work = [trajectory(f"p{g}", i, [(0, n, 0.0)], 1) for g, group in enumerate(groups) for i, n in enumerate(group)]
    prompts = [f"p{g}" for g in range(len(groups))]
    plan = StepPlan(tuple(Share(len(group), rule, ShapeReason.SHAPED) for group in groups))
    policy = Shaped(Stock(), Shaper(Shape(), 3), plan, prompts, work)
    result = simulate(work, [Replica("a", slots=2), Replica("b", slots=9)], FLAT, policy)
    at = 0
    for prompt, group in zip(prompts, groups, strict=True):
        kept = choose(rule, [Sample(i, n, Fate.VALID) for i, n in enumerate(group)])
        assert sorted(policy.kept[f"0:{prompt}"]) == [f"0:{prompt}_{i}" for i in kept]
        assert all(result.outcomes[at + i] == "finished" for i in kept)
        at += len(group)


def test_shortest_only_stops_siblings_at_the_length_of_the_nth():
    work = [trajectory("p", i, [(0, n, 0.0)], 1) for i, n in enumerate([30, 10, 50, 20])]
    plan = StepPlan((Share(4, Rule(2, 0), ShapeReason.SATURATED),))
    policy = Shaped(Stock(), Shaper(Shape(), 2), plan, ["p"], work)
    result = simulate(work, [Replica("r")], STEP, policy)
    assert result.output_tokens.tolist() == [21, 10, 21, 20]  # lower numbers would win a tie at 20, so they get to show that there is none
    assert result.makespan_s == pytest.approx(21.0)


def test_started_takes_the_first_samples_and_refuses_a_pool_that_is_too_small():
    pool = {"p": [trajectory("p", i, [(0, 5, 0.0)]) for i in range(3)], "q": [trajectory("q", i, [(0, 5, 0.0)]) for i in range(2)]}
    plan = StepPlan(tuple(Share(number, Rule(2, 0), ShapeReason.SHAPED) for number in (3, 2)))
    assert [(item.prompt_id, item.trial) for item in started(plan, ["p", "q"], pool)] == [("p", 0), ("p", 1), ("p", 2), ("q", 0), ("q", 1)]
    with pytest.raises(ValueError, match="3 samples planned"):
        started(plan, ["q", "p"], pool)
