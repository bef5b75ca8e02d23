"""What selection does to the gradient: inclusion chances, importance weights and what they leave biased, measures, guard rails."""

from __future__ import annotations

from math import inf
from statistics import fmean

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_heddle.options import Shape
from verl_heddle.shape.censored import Law
from verl_heddle.shape.honesty import Account, Guard, Row, chance_of_mixed, expected_bias
from verl_heddle.shape.select import MOST, Rule, Sample, advantages, chance, choose, effective_size, weights
from verl_heddle.shape.settings import ShapeReason

LAW = Law(7.0, 0.5)


def draw(rng, shape):
    uniform = rng.random(shape)
    return np.exp(LAW.mean + LAW.spread * np.sqrt(3) / np.pi * np.log(uniform / (1 - uniform)))


@pytest.mark.parametrize(("longest", "patience"), [(0, inf), (1, inf), (2, 1800.0), (4, inf), (1, 600.0)])
def test_inclusion_chances_are_those_of_the_rule(longest, patience):
    """Against the rule itself, on sampled groups of 12 with 8 kept."""
    rule, rng = Rule(8, longest, patience), np.random.default_rng(0)
    rank = {int(x): [] for x in np.exp(LAW.mean + LAW.spread * np.array([-2.0, -0.5, 0.5, 1.2, 2.5]))}
    for x, hits in rank.items():
        for others in draw(rng, (3000, 11)):
            samples = [Sample(number, int(t)) for number, t in enumerate(others)] + [Sample(11, x)]
            hits.append(11 in choose(rule, samples))
        share = 1 / (1 + np.exp(-(np.log(x) - LAW.mean) / (LAW.spread * np.sqrt(3) / np.pi)))
        within = 1 / (1 + np.exp(-(np.log(patience) - LAW.mean) / (LAW.spread * np.sqrt(3) / np.pi))) if patience < inf else 1.0
        assert chance(rule, 12, share, within if x <= patience else -1.0) == pytest.approx(np.mean(hits), abs=0.035)


def bias_of(rule: Rule, samples: int, corrected: bool) -> tuple[float, float]:
    """Bias of the group's mean of (a reward that falls with length, log length), with and without weights."""
    rng = np.random.default_rng(4)
    found = []
    for tokens in draw(rng, (4000, samples)):
        kept = [tokens[i] for i in choose(rule, [Sample(i, t) for i, t in enumerate(tokens)])]
        given_out = weights(rule, samples, LAW, kept) if corrected else [1.0] * len(kept)
        logs = np.log(kept) - LAW.mean
        found.append((np.average(logs < 0.3, weights=given_out), np.average(logs, weights=given_out)))
    truth = 1 / (1 + np.exp(-0.3 / (LAW.spread * np.sqrt(3) / np.pi)))
    return float(np.mean([r for r, _ in found]) - truth), float(np.mean([x for _, x in found]))


def test_weights_remove_most_of_the_bias_of_dual_end_selection_and_little_of_shortest_only():
    """What remains is what the module says: clipping, and lengths that shortest-only never sees."""
    dual, short = Rule(8, 1), Rule(8, 0)
    reward, length = bias_of(dual, 12, False)
    reward_after, length_after = bias_of(dual, 12, True)
    assert reward > 0.05 and length < -0.15
    assert abs(reward_after) < 0.4 * reward and abs(length_after) < 0.4 * abs(length)
    reward, length = bias_of(short, 12, False)
    reward_after, length_after = bias_of(short, 12, True)
    assert 0.7 * reward < reward_after < 0.9 * reward and abs(length_after) < 0.95 * abs(length)


@given(st.lists(st.integers(1, 10**5), min_size=1, max_size=8), st.integers(8, 16), st.integers(0, 8), st.floats(0, 1e5))
@settings(deadline=None)
def test_weights_have_mean_one_and_a_bounded_ratio(tokens, samples, longest, patience):
    given_out = weights(Rule(8, longest, patience), samples, LAW, tokens)
    assert fmean(given_out) == pytest.approx(1.0) and min(given_out) > 0
    assert max(given_out) / min(given_out) <= MOST * (1 + 1e-9)
    assert effective_size(given_out) * (1 + 1e-9) >= 1.0 and effective_size(given_out) <= len(tokens) * (1 + 1e-9)


@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(0.2, 5)), min_size=1, max_size=16), st.booleans())
def test_weighted_advantages_are_those_of_the_samples_stood_for(group, by_deviation):
    rewards, given_out = zip(*group, strict=True)
    mean = fmean(given_out)
    found = advantages(rewards, [one / mean for one in given_out], by_deviation)
    if len(group) > 1:
        assert sum(found) == pytest.approx(0, abs=1e-6 if not by_deviation else 1e-3)
        larger = advantages([reward + 3 for reward in rewards], [one / mean for one in given_out], by_deviation)
        assert larger == pytest.approx(found, abs=1e-3), "a reward for everybody teaches nothing"
    else:
        assert found == list(rewards)


def test_a_weight_of_two_pulls_like_two_samples():
    twice = advantages([1.0, 0.0, 0.0], [1.5, 0.75, 0.75], False)
    four = advantages([1.0, 1.0, 0.0, 0.0], [1.0] * 4, False)
    assert twice == pytest.approx([1.5 * (four[0]), 0.75 * four[2], 0.75 * four[3]])


def test_plain_sampling_has_equal_weights():
    assert weights(Rule(8, 8), 8, LAW, [10, 1000, 50_000]) == [1.0, 1.0, 1.0]


def test_the_expected_bias_is_that_of_sampled_groups():
    rng = np.random.default_rng(1)
    groups = np.sort(rng.normal(size=(20_000, 16)), axis=1)
    assert expected_bias(8, 16) == pytest.approx(groups[:, :8].mean(), abs=0.01)
    assert expected_bias(8, 8) == pytest.approx(0, abs=1e-9)


def test_measures_of_a_step():
    account = Account()
    rows = [Row(100, 1.0, True), Row(200, 1.0, True), Row(400, 0.0, False), Row(800, 1.0, False)]
    account.add(rows, 2, np.log(300.0))
    account.stopped(500)
    told = account.metrics()
    assert told["tokens/kept"] == 150 and told["tokens/ended"] == 375
    assert told["reward/kept"] == 1.0 and told["reward/ended"] == 0.75
    assert told["mixed/kept"] == 0 and told["mixed/plain"] == pytest.approx(0.5) and told["mixed_loss"] == 1.0
    assert told["stopped_tokens"] == 0.25 and told["dropped_tokens"] == 0.6
    assert told["length_bias"] == pytest.approx(np.sqrt(100 * 200) / 300 - 1) and told["ess"] == 1.0
    account.add([Row(5, None, True)], 2, None)
    assert account.metrics()["short"] == 1 and "mixed/kept" in account.metrics()
    assert Account().metrics() == {"groups": 0.0, "short": 0.0}


@given(st.lists(st.sampled_from([0.0, 1.0]), min_size=2, max_size=7), st.data())
@settings(deadline=None)
def test_chance_of_mixed_is_that_of_all_draws(rewards, data):
    from itertools import combinations

    size = data.draw(st.integers(1, len(rewards)))
    draws = [len(set(one)) > 1 for one in combinations(rewards, size)]
    assert chance_of_mixed(rewards, size) == pytest.approx(fmean(draws))


def group(bias: float, rewards_kept, rewards_dropped=()) -> tuple:
    rows = [Row(100, r, True) for r in rewards_kept] + [Row(200, r, False) for r in rewards_dropped]
    return rows, len(rewards_kept), float(np.log(100) - bias)


@pytest.mark.parametrize(
    ("one", "reason"),
    [
        (group(-0.6, [1.0, 0.0], [1.0]), ShapeReason.LENGTH_BIAS),
        (group(-0.05, [1.0, 1.0], [0.0, 0.0]), ShapeReason.MIXED_LOSS),
        (group(-0.05, [1.0, 0.0], [0.0, 1.0]), None),
    ],
)
def test_a_crossed_bound_rests_the_run_and_then_tries_again(one, reason):
    guard = Guard(Shape(rest_steps=3))
    account = Account()
    for _ in range(63):
        account.add(*one)
    assert guard.step_ended(0, account) is None and guard.allows(1) is None, "too few groups to tell"
    account.add(*one)
    assert guard.step_ended(1, account) is reason
    assert [guard.allows(step) for step in (2, 4, 5)] == [reason, reason, None]
    other = Guard(Shape(rest_steps=3))
    other.restore(guard.state())
    assert other.allows(4) is reason and other.state() == guard.state()


def test_a_prompt_that_lost_its_mix_is_plain_once():
    guard = Guard(Shape())
    guard.lost("p", 0.9)
    guard.lost("q", 0.1)
    assert guard.plain("p") and not guard.plain("p") and not guard.plain("q")


def test_other_states_are_refused():
    with pytest.raises(ValueError):
        Guard(Shape()).restore({"averages": {}})
