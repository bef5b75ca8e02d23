"""The choice between resident sets and verl's own rule, played against makespans and twins that are made up."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_heddle.options import Options, Place, Shape, Twin
from verl_heddle.twin import MOST_ERROR
from verl_heddle.twin.choice import ENOUGH, Choice

STEPS = 50


def run(gain, sees=1.0, noise=0.0, steps=STEPS, seed=0, late=1):
    """Total seconds of a run, of the same under either rule and under the better one of each step; the choice and its lines.

    `gain`: stock's seconds over resident sets', a number or a function of the step; `sees`: the twin makes stock's seconds so many times as
    long as they are; `noise`: standard deviation of its relative errors; `late`: steps until an answer comes.
    """
    rng, choice, lines, waiting = Random(seed), Choice(), [], []
    total = {"auto": 0.0, "stock": 0.0, "kept": 0.0, "best": 0.0}
    for step in range(1, steps + 1):
        stock_s = 100.0 * rng.uniform(0.8, 1.2)
        kept_s = stock_s / (gain(step) if callable(gain) else gain)
        took = stock_s if choice.rests else kept_s
        for name, seconds in {"auto": took, "stock": stock_s, "kept": kept_s, "best": min(stock_s, kept_s)}.items():
            total[name] += seconds
        twin = {rests: seconds * (1 + rng.gauss(0, noise)) for rests, seconds in ((True, stock_s * sees), (False, kept_s))}
        own, other = twin[choice.rests], twin[not choice.rests]
        answer = {"step": step, "error": own / took - 1}
        if abs(answer["error"]) <= MOST_ERROR:
            told = (took, took * other / own) if choice.rests else (took * other / own, took)
            answer |= {"stock_s": told[0], "heddle_s": told[1], "speedup": told[0] / told[1]}
        choice.ran(step)
        waiting.append(answer)
        if len(waiting) > late:
            lines.append(choice.judged(waiting.pop(0)))
    return total, choice, [line for line in lines if line]


def test_where_resident_sets_pay_nothing_changes():
    total, choice, lines = run(1.3)
    assert lines == [] and not choice.rests and total["auto"] == total["kept"]
    assert choice.metrics()["gain"] == pytest.approx(1.3) and choice.metrics()["margin"] == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("late", [1, 2])
def test_where_they_lose_they_rest_from_the_first_steps_on(late):
    total, choice, lines = run(0.9, late=late)
    assert choice.rests and len(lines) == 1 and f"after step {ENOUGH} resident sets rest" in lines[0]
    assert total["stock"] / total["auto"] > 0.985


def test_it_follows_a_policy_that_changes():
    total, choice, lines = run(lambda step: 0.9 if step < 20 else 1.2)
    assert not choice.rests and len(lines) == 2 and "decide again" in lines[1]
    assert total["auto"] < 1.04 * total["best"]


@settings(max_examples=150, deadline=None)
@given(st.floats(0.9, 1.6), st.floats(0.95, 1.05), st.floats(0.0, 0.06), st.integers(0, 10_000), st.integers(1, 2))
def test_with_a_twin_as_good_as_on_real_engines_no_run_is_much_slower_than_the_better_rule(gain, sees, noise, seed, late):
    total, _, lines = run(gain, sees, noise, seed=seed, late=late)
    assert total["auto"] <= 1.05 * min(total["stock"], total["kept"]) and len(lines) <= 6


@settings(max_examples=150, deadline=None)
@given(st.floats(1.0, 1.6), st.floats(0.5, 2.0), st.floats(0.0, 0.2), st.integers(0, 10_000), st.integers(1, 2))
def test_whatever_the_twin_believes_no_run_is_much_slower_than_resident_sets_or_verls_rule(gain, sees, noise, seed, late):
    total, _, lines = run(gain, sees, noise, seed=seed, late=late)
    assert total["auto"] <= total["stock"] * (1 + 1e-9), "resident sets gain: neither rule is slower than verl's"
    assert len(lines) <= 6


@pytest.mark.parametrize("gain", [1.1, 1.3, 1.6])
def test_a_twin_that_flatters_verls_rule_is_found_out(gain):
    total, choice, lines = run(gain, sees=0.95 / gain)
    assert not choice.rests and len(lines) == 2, "one try"
    assert total["auto"] < (1 + 2.5 / STEPS * (gain - 1)) * total["kept"], "that took two steps"


def test_a_twin_that_cannot_judge_leaves_resident_sets_alone():
    _, choice, _ = run(0.9, steps=10)
    assert choice.rests
    choice.ran(11)
    line = choice.judged({"step": 11, "error": 1.0})
    assert not choice.rests and "cannot judge" in line


def test_answers_of_unknown_steps_are_passed_over():
    choice = Choice()
    assert choice.judged({"step": 7, "error": 0.0, "speedup": 0.5, "stock_s": 1.0, "heddle_s": 2.0}) is None
    assert choice.metrics() == {"rests": 0.0}


@pytest.mark.parametrize(
    ("options", "chooses"),
    [
        (Options(), True),
        (Options(auto=False), False),
        (Options(twin=Twin(enable=False)), False),
        (Options(observe=True), False),
        (Options(place=Place(enable=True)), False),
        (Options(shape=Shape(enable=True)), False),
        (Options.longest(), False),
    ],
)
def test_when_there_is_something_to_choose(options, chooses):
    assert options.chooses == chooses
    assert options.decisions(rests=True)["residents"] is False
