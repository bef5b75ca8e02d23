"""Dual-end selection: the rule itself, and that every online decision is exactly what the rule says of all possible completions."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from math import inf
from random import Random

import pytest
from drawn import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_heddle.shape.select import Fate, Group, Rule, Sample, Standing, choose

TOP = 4
"""Longest length in the exhaustive tests."""


@st.composite
def rules(draw, most: int = 4) -> Rule:
    size = draw(st.integers(1, most))
    patience = draw(st.sampled_from([0.0, 1.0, 2.0, 2.5, 3.0, inf]))
    return Rule(size, draw(st.integers(0, size)), patience, draw(st.sampled_from([None, TOP])))


fates = st.sampled_from([Fate.VALID] * 4 + [Fate.CUT, Fate.USELESS])


def spelled_out(rule: Rule, samples: list[Sample]) -> list[int]:
    """The rule said again, one sample at a time."""
    valid = [one for one in samples if one.fate is Fate.VALID]
    cut = [one for one in samples if one.fate is Fate.CUT]

    def before(one, others):
        return sum((other.tokens, other.number) < (one.tokens, one.number) for other in others)

    kept = []
    for one in valid:
        eligible = [o for o in valid if o.tokens <= rule.patience_tokens or before(o, valid) < rule.size]
        longer = len(eligible) - 1 - before(one, eligible)
        short = before(one, valid) < rule.size - rule.longest
        if len(valid) < rule.size or short or (one in eligible and longer < rule.longest):
            kept.append(one.number)
    for one in cut:
        if before(one, cut) < rule.size - len(valid):
            kept.append(one.number)
    return sorted(kept)


@given(rules(8), st.lists(st.tuples(st.integers(0, 9), fates), min_size=1, max_size=16))
@settings(deadline=None)
def test_the_rule(rule, ends):
    samples = [Sample(number, tokens, fate) for number, (tokens, fate) in enumerate(ends)]
    kept = choose(rule, samples)
    assert kept == spelled_out(rule, samples)
    assert len(kept) == min(rule.size, sum(fate is not Fate.USELESS for _, fate in ends))


def test_seven_short_and_one_long_and_what_patience_does():
    samples = [Sample(number, tokens) for number, tokens in enumerate([10, 90, 20, 80, 30, 70, 40, 60, 50, 95])]
    assert choose(Rule(8, 1), samples) == [0, 2, 4, 5, 6, 7, 8, 9]
    assert choose(Rule(8, 1, 85), samples) == [0, 2, 3, 4, 5, 6, 7, 8]
    assert choose(Rule(8, 0), samples) == choose(Rule(8, 4, 0), samples) == [0, 2, 3, 4, 5, 6, 7, 8]


def completions(group: Group, top: int):
    """Every way in which the runners may end."""
    numbers = list(group.running)
    ways = []
    for number in numbers:
        reach = range(group.running[number], top + 1)
        ways.append([Sample(number, x, fate) for fate in (Fate.VALID, Fate.CUT) for x in reach] + [Sample(number, 0, Fate.USELESS)])
    for made in product(*ways):
        yield [*group.ended.values(), *made]


@given(rules(), st.integers(0, 2), st.data())
@examples(150)
def test_in_out_and_open_are_exact(rule, spares, data):
    """Nothing is said too early, and nothing too late: against all completions of up to three runners."""
    group = Group(rule, rule.size + spares)
    limit = TOP if rule.cap_tokens else TOP + 2  # without a cap, two tokens beyond all marks stand for infinity
    for number in range(group.samples):
        if len(group.running) > 3 or data.draw(st.booleans()):
            group.end(Sample(number, data.draw(st.integers(0, TOP)), data.draw(fates)))
        else:
            group.progress(number, data.draw(st.integers(0, TOP)))
    outcomes = [set(choose(rule, samples)) for samples in completions(group, limit)]
    for number in range(group.samples):
        share = sum(number in kept for kept in outcomes) / len(outcomes)
        if number in group.running:
            assert (group.standing(number) is Standing.OUT) == (share == 0), (group, number)
        else:
            wanted = Standing.IN if share == 1 else Standing.OUT if share == 0 else Standing.OPEN
            assert group.standing(number) is wanted, (group, number)


@given(
    rules(8),
    st.lists(st.tuples(st.integers(1, 12), fates), min_size=1, max_size=16),
    st.integers(0, 2**32),
)
@examples(150)
def test_every_order_of_events_keeps_what_the_rule_keeps(rule, ends, seed):
    """Tokens and ends come in any order; what is out is stopped at once, and its true end is never looked at."""
    rng = Random(seed)
    rule = replace(rule, size=min(rule.size, len(ends)), longest=min(rule.longest, rule.size, len(ends)))
    if rule.cap_tokens:
        ends = [(min(tokens, TOP), fate) for tokens, fate in ends]
    group = Group(rule, len(ends))
    final = [Sample(number, tokens, fate) for number, (tokens, fate) in enumerate(ends)]
    wanted = choose(rule, final)
    said: dict[int, Standing] = {}
    limits = dict.fromkeys(range(len(ends)), inf)
    while group.running:
        number = rng.choice(sorted(group.running))
        tokens = group.running[number]
        if tokens < ends[number][0] and rng.random() < 0.7:
            group.progress(number, rng.randint(tokens, ends[number][0]))
        else:
            group.end(final[number])
        for other in group.stop():
            assert other not in wanted
        assert not group.stop()
        for other in range(len(ends)):
            standing = group.standing(other)
            assert said.get(other, Standing.OPEN) in (Standing.OPEN, standing), "a verdict was taken back"
            assert standing is Standing.OPEN or (standing is Standing.IN) == (other in wanted)
            said[other] = standing
            if other in group.running:
                assert group.stop_tokens(other) <= limits[other]
                limits[other] = group.stop_tokens(other)
    assert group.settled and group.kept() == wanted
    assert [number for number, standing in said.items() if standing is Standing.IN] == wanted


def test_shortest_only_stops_each_sibling_at_the_length_of_the_nth_not_when_the_nth_ends():
    """Siblings on slower replicas may still be shorter, so the order of arrival is not the order of lengths."""
    group = Group(Rule(2, 0), 4)
    group.progress(2, 60)
    group.end(Sample(0, 40))
    group.end(Sample(1, 50))
    assert group.stop() == [2]
    assert group.stop_tokens(3) == 50 and group.standing(1) is Standing.OPEN and group.standing(0) is Standing.IN
    group.end(Sample(3, 30))
    assert group.kept() == [0, 3]


def test_a_tie_goes_to_the_lower_number_whoever_ends_first():
    group = Group(Rule(1, 0), 2)
    group.end(Sample(1, 50))
    assert group.stop_tokens(0) == 51
    group.end(Sample(0, 50))
    assert group.kept() == [0]


def test_failures_use_up_spares_and_never_stop_a_sibling():
    group = Group(Rule(2, 0), 4)
    for number in (0, 1):
        group.end(Sample(number, 10, Fate.USELESS))
    group.progress(2, 1000)
    group.end(Sample(3, 20))
    assert group.stop() == [] and group.stop_tokens(2) == inf
    group.end(Sample(2, 2000, Fate.CUT))
    assert group.kept() == [2, 3] and group.standing(2) is Standing.IN


def test_a_group_is_short_only_when_too_few_can_be_trained_on():
    group = Group(Rule(3, 1), 4)
    for number, fate in enumerate([Fate.USELESS, Fate.VALID, Fate.USELESS, Fate.CUT]):
        group.end(Sample(number, 10, fate))
    assert group.settled and group.kept() == [1, 3]


def test_news_of_the_dead_changes_nothing():
    group = Group(Rule(1, 0), 2)
    group.end(Sample(0, 5))
    group.progress(1, 7)
    assert group.stop() == [1]
    group.progress(1, 9)
    group.end(Sample(1, 1))
    group.end(Sample(0, 1))
    assert group.kept() == [0] and group.stopped == {1: 7} and group.ended[0].tokens == 5


@pytest.mark.parametrize("arguments", [(0,), (2, 3), (2, -1), (2, 1, -1.0), (2, 1, float("nan")), (2, 1, 5.0, 0)])
def test_impossible_rules_are_refused(arguments):
    with pytest.raises(ValueError):
        Rule(*arguments)


def test_a_group_smaller_than_what_it_keeps_is_refused():
    with pytest.raises(ValueError, match="cannot keep"):
        Group(Rule(4), 3)
