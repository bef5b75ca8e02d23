"""The door: a whole step told event by event, what a caller may rely on, and what survives a checkpoint."""

from __future__ import annotations

import json
from collections import Counter
from math import inf

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_heddle.fleet import Replica
from verl_heddle.latency import LatencyModel
from verl_heddle.options import Shape
from verl_heddle.place.pace import Habit
from verl_heddle.shape.groups import NOTHING, Groups
from verl_heddle.shape.plan import Share
from verl_heddle.shape.select import Fate, Rule, Sample, choose
from verl_heddle.shape.settings import ShapeReason
from verl_heddle.shape.shaper import Shaper, fleet_of

FLEET = fleet_of(LatencyModel.affine(0.02, 0.00002), [Replica("a"), Replica("b")], Habit(1000.0, 1.0, 1e4, 0.0), 256)
LOOSE = Shape(length_bias=1.0, prompt_bias=1.0, mixed_loss=1.0)
fates = st.sampled_from([Fate.VALID] * 5 + [Fate.CUT, Fate.USELESS])


def keys(uid: str, number: int) -> list[str]:
    return [f"{uid}_{sample}" for sample in range(number)]


def shared(samples: int, size: int = 2, longest: int = 0, patience: float = inf) -> Share:
    return Share(samples, Rule(size, longest, patience), ShapeReason.SHAPED)


@given(
    st.lists(st.lists(st.tuples(st.integers(1, 30), fates), min_size=3, max_size=6), min_size=1, max_size=4),
    st.integers(0, 3),
    st.sampled_from([0.0, 10.0, inf]),
    st.integers(0, 2**32),
)
@settings(max_examples=200, deadline=None)
def test_every_sample_is_told_once_and_every_group_is_full_if_it_can_be(groups, longest, patience, seed):
    """Samples grow in any order, obey `stop` and `limits` at once, and the kept are those of the rule on true lengths."""
    rng = np.random.default_rng(seed)
    shaper = Shaper(LOOSE, 3)
    under_way = Groups(3)
    told: Counter[str] = Counter()
    kept: dict[str, list[str]] = {}
    live: dict[str, int] = {}
    limits: dict[str, float] = {}
    true: dict[str, tuple[int, Fate]] = {}
    for number, group in enumerate(groups):
        names = keys(f"u{number}", len(group))
        under_way.opened(f"u{number}", "p", shared(len(group), 3, longest, patience), names)
        kept[f"u{number}"] = []
        live |= dict.fromkeys(names, 0)
        true |= dict(zip(names, group, strict=True))

    def obey(uid: str, verdict) -> None:
        told.update(verdict.stop + verdict.keep + verdict.drop)
        kept[uid] += verdict.keep
        limits.update(verdict.limits)
        for name in verdict.stop:
            live.pop(name, None)
        if verdict.closed:
            assert not any(name.startswith(f"{uid}_") for name in live)
            assert verdict.short == (len(kept[uid]) < 3)

    while live:
        name = str(rng.choice(sorted(live)))
        uid, (tokens, fate) = name.split("_")[0], true[name]
        live[name] += int(rng.integers(1, 8))
        if live[name] >= min(tokens, limits.get(name, inf)):
            if limits.get(name, inf) <= tokens:
                del live[name]
                obey(uid, under_way.progress(name, int(limits[name])))
                under_way.stopped(name, int(limits[name]) + 1)
            else:
                del live[name]
                obey(uid, under_way.finished(name, tokens, fate, 1.0))
        elif rng.random() < 0.3:
            obey(uid, under_way.progress(name, live[name]))
    for number, group in enumerate(groups):
        wanted = choose(Rule(3, longest, patience), [Sample(i, t, f) for i, (t, f) in enumerate(group)])
        assert sorted(kept[f"u{number}"]) == [f"u{number}_{i}" for i in wanted]
    assert set(told) == set(true) and set(told.values()) == {1}
    metrics = shaper.step_ended(0, under_way.take())
    assert metrics["groups"] == len(groups) and len(shaper.spreads) == 1
    assert under_way.finished("u0_0", 1) is NOTHING


def test_a_step_from_plan_to_metrics():
    """Two epochs of 30 prompts: the first is plain, for nothing is known; the second gives spares to those that need them."""
    rng = np.random.default_rng(0)
    prompts = [f"p{i}" for i in range(30)]
    middle = dict(zip(prompts, rng.normal(7, 0.8, 30), strict=True))
    shaper = Shaper(Shape(), 4, 40_000)
    under_way = Groups(4)
    seen = []
    for step in range(2):
        plan = shaper.plan(step, prompts, FLEET)
        for prompt, share in zip(prompts, plan.shares, strict=True):
            uid = f"{step}:{prompt}"
            names = keys(uid, share.samples)
            under_way.opened(uid, prompt, share, names)
            lengths = np.exp(rng.normal(middle[prompt], 0.5, share.samples)).astype(int)
            for number in np.argsort(lengths):
                tokens, limit = int(lengths[number]), under_way._open[uid].group.stop_tokens(int(number))
                if tokens >= limit:
                    under_way.progress(names[number], int(limit))
                else:
                    under_way.finished(names[number], tokens, Fate.VALID, float(rng.random() < 0.5))
        seen.append(shaper.step_ended(step, under_way.take()))
    first, second = seen
    assert first["prompts/no_forecast"] == 30 and first["spare"] == 0 and "length_bias" not in first
    assert second["spare"] > 0.3 and second["forecast/saved_s"] > second["forecast/cost_s"]
    assert -0.25 < second["length_bias"] < 0 and second["short"] == 0
    assert 0 < second["stopped_tokens"] < 0.5 and second["ess"] == 1.0


@pytest.mark.parametrize("corrected", [True, False])
def test_corrected_mode_weights_the_kept_of_the_groups_of_a_step(corrected):
    shaper = Shaper(Shape(corrected=corrected), 2)
    under_way = Groups(2)
    under_way.opened("u", "p", shared(4, 2, 1), keys("u", 4))
    under_way.opened("plain", "q", shared(2), keys("plain", 2))
    for number, tokens in enumerate([900, 300, 1000, 850]):
        under_way.finished(f"u_{number}", tokens, Fate.VALID, 1.0)
    for number, tokens in enumerate([900, 500]):
        under_way.finished(f"plain_{number}", tokens, Fate.VALID, 1.0)
    told = shaper.step_ended(0, under_way.take())
    short, long = shaper.weights("u", [300, 1000])
    assert short + long == pytest.approx(2) and (short < 1 < long if corrected else short == long == 1.0)
    assert shaper.weights("plain", [500, 900]) == shaper.weights("nobody", [500, 900]) == [1.0, 1.0]
    assert told["ess"] == pytest.approx(4 / (short**2 + long**2) / 2)
    shaper.step_ended(1, [])
    assert shaper.weights("u", [300, 1000]) == [short, long], "a buffer may hand a group out late"
    shaper.step_ended(2, [])
    assert shaper.weights("u", [300, 1000]) == [1.0, 1.0]


def test_a_run_whose_selection_loses_the_mix_rests():
    shaper = Shaper(Shape(spare=2, uniform=True, length_bias=1.0, rest_steps=2), 2)
    under_way = Groups(2)
    for number in range(70):
        uid = f"u{number}"
        under_way.opened(uid, f"p{number}", shared(4, 2, 0, inf), keys(uid, 4))
        for sample, (tokens, reward) in enumerate([(10, 1.0), (11, 1.0), (10, 0.0), (12, 0.0)]):
            under_way.progress(f"{uid}_{sample}", 1)
            under_way.finished(f"{uid}_{sample}", tokens, Fate.VALID, reward)
    told = shaper.step_ended(0, under_way.take())
    assert told["mixed/kept"] == 1.0 and told["resting"] == 0.0  # 10 and 10: one of each
    for number in range(70):
        uid = f"v{number}"
        under_way.opened(uid, f"p{number}", shared(4, 2, 1, 100.0), keys(uid, 4))
        for sample, (tokens, reward) in enumerate([(10, 1.0), (11, 0.0), (12, 0.0), (13, 1.0)]):
            under_way.finished(f"{uid}_{sample}", tokens, Fate.VALID, reward)
    told = shaper.step_ended(1, under_way.take())
    assert told["mixed/kept"] == 0.0 and told["crossed/mixed_loss"] == told["resting"] == 1.0
    assert shaper.plan(2, ["a", "b"], FLEET).counts == {"mixed_loss": 2}
    assert "mixed_loss" not in shaper.plan(4, ["a", "b"], FLEET).counts
    assert shaper.plan(5, ["p3", "a"], FLEET).shares[0].reason is ShapeReason.MIXED_LOSS, "the prompt itself, once"
    assert shaper.plan(6, ["p3", "a"], FLEET).shares[0].reason is not ShapeReason.MIXED_LOSS


def test_controls_are_plain():
    shaper = Shaper(Shape(spare=2, uniform=True, control_every=4), 4)
    counts = shaper.plan(0, [f"p{i}" for i in range(8)], FLEET, laws=[shaper.spreads.law("x")] * 8).counts
    assert counts == {"control": 2, "shaped": 6}


def test_the_state_survives_json_and_others_are_refused_whole():
    shaper = Shaper(Shape(), 2)
    under_way = Groups(2)
    under_way.opened("u", "p", shared(2), keys("u", 2))
    under_way.finished("u_0", 50)
    shaper.step_ended(0, under_way.take())  # the other sample is counted as longer than it got
    state = json.loads(json.dumps(shaper.state()))
    other = Shaper(Shape(), 2)
    other.restore(state)
    assert other.state() == shaper.state() and other.spreads.law("p") == shaper.spreads.law("p")
    for bad in ({}, {"format": 2}, {**state, "guard": {}}, {**state, "spreads": {"pool": 3}}):
        with pytest.raises(ValueError):
            other.restore(bad)
    assert other.state() == shaper.state()


def test_a_group_may_go_on_into_the_next_step():
    shaper = Shaper(LOOSE, 2)
    under_way = Groups(2)
    under_way.opened("u", "p", shared(3), keys("u", 3))
    under_way.opened("v", "p", shared(3), keys("v", 3))
    for number in range(3):
        under_way.finished(f"u_{number}", 10 + number)
    under_way.finished("v_0", 5)
    assert shaper.step_ended(0, under_way.take(forget=False))["groups"] == 1
    under_way.finished("v_1", 7)
    assert under_way.progress("v_2", 8).closed and shaper.step_ended(1, under_way.take())["groups"] == 1
    under_way.opened("u", "p", shared(3), keys("u", 3))


def test_bad_calls_are_refused_or_ignored():
    under_way = Groups(2)
    under_way.opened("u", "p", shared(3), keys("u", 3))
    with pytest.raises(ValueError, match="keys"):
        under_way.opened("v", "p", shared(3), keys("v", 2))
    with pytest.raises(ValueError, match="twice"):
        under_way.opened("u", "p", shared(3), keys("u", 3))
    assert under_way.progress("nobody", 5) is NOTHING and under_way.finished("nobody", 5) is NOTHING
    under_way.stopped("nobody", 5)
    with pytest.raises(ValueError, match="at least 2"):
        Shaper(Shape(), 1)


def test_what_was_stopped_late_is_counted_once():
    shaper = Shaper(LOOSE, 2)
    under_way = Groups(2)
    under_way.opened("u", "p", shared(3), keys("u", 3))
    under_way.finished("u_0", 30, Fate.VALID, 1.0)
    assert under_way.finished("u_1", 40, Fate.VALID, 1.0).limits == {"u_2": 40}
    assert under_way.progress("u_2", 30) is NOTHING
    verdict = under_way.progress("u_2", 41)
    assert verdict.stop == ("u_2",) and verdict.closed and verdict.keep == ("u_1",)
    assert under_way.finished("u_2", 60) is NOTHING and under_way.finished("u_2", 50) is NOTHING
    assert shaper.step_ended(0, under_way.take())["stopped_tokens"] == pytest.approx(60 / 130)
