"""What `explain` says of spare samples: prompts drawn anew from a step's samples."""

from __future__ import annotations

from dataclasses import replace
from math import exp, log
from random import Random
from statistics import fmean, pstdev

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_heddle.latency import LatencyModel
from verl_heddle.report.recorded import Engines, Machine
from verl_heddle.report.whatif import drawn, laws_of, spare_samples
from verl_heddle.shape.censored import Law
from verl_heddle.simulate.workload import most_kv
from verl_heddle.trajectory import Trajectory, Turn

LATENCY = LatencyModel.affine(0.01, 0.0001, 1e-7, prefill_per_token_s=1e-5, prefill_base_s=0.01, tps=(1,))


def machine(residents: str = "") -> Machine:
    order = "priority" if residents else "fcfs"
    return Machine(Engines(1, 64, 2, order, kv_tokens=1_000_000, residents=residents), LATENCY, (1,))


def life(prompt: int, sample: int, tokens: list[int], **meta) -> Trajectory:
    turns = tuple(Turn(10, count, "t", 0.1 if number < len(tokens) - 1 else None) for number, count in enumerate(tokens))
    return Trajectory("test", "w", f"p{prompt}", sample, 100, turns, meta={"start_s": 5.0, "outcome": "finished", **meta})


def step(spread: float, prompts: int = 16, size: int = 8, seed: int = 0) -> list[Trajectory]:
    rng = Random(seed)
    return [life(p, s, [max(1, round(400 * rng.lognormvariate(0.0, spread))), 20]) for p in range(prompts) for s in range(size)]


@pytest.mark.parametrize("residents", ["", "least_served"])
def test_uneven_samples_gain_and_even_ones_do_not(residents):
    uneven, even = spare_samples(step(1.2), machine(residents)), spare_samples(step(0.0), machine(residents))
    assert uneven.ratio > 1.15, "each prompt has a sample far longer than the others"
    assert even.ratio < 1.02, "none is longer than the others"


def test_the_same_step_gives_the_same_answer():
    assert spare_samples(step(1.0), machine()) == spare_samples(step(1.0), machine())


def test_nothing_is_said_where_nothing_is_known():
    assert spare_samples(step(1.0, size=1), machine()) is None, "one sample of a prompt"
    shaped = [replace(item, meta={**item.meta, "outcome": "cancelled"}) if item.trial == 7 else item for item in step(1.0)]
    assert spare_samples(shaped, machine()) is None, "the run shaped: its longest are cut"
    assert spare_samples([], machine()) is None
    mixed = [*step(1.2), *(life(99, number, [5]) for number in range(3))]
    assert spare_samples(mixed, machine()) is not None, "a prompt with fewer samples is left out"


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 12), st.floats(0, 1.5))
def test_redrawn_samples_follow_the_law(seed, size, spread):
    items = step(spread, prompts=1, size=size, seed=seed)
    law = laws_of({"p0": items})["p0"]
    longest = round(exp(law.mean + 4 * law.spread))
    made = drawn(items, law, 2000, longest, Random(seed))
    assert len({item.trial for item in made}) == 2000 and {item.meta["start_s"] for item in made} == {0.0}
    assert all(len(item.steps) == 2 and item.steps[0].tool == "t" for item in made)
    logs = [log(item.output_tokens) for item in made]
    assert fmean(logs) == pytest.approx(law.mean, abs=0.1 * law.spread + 0.02)
    assert pstdev(logs) == pytest.approx(law.spread, rel=0.1, abs=0.02)


def test_what_would_be_longer_than_the_cap_is_cut_there_and_what_was_cut_need_not_be():
    items = [life(0, 0, [500, 500], truncated=True)]
    made = drawn(items, Law(log(800), 0.5), 500, 1000, Random(0))
    cut = [item for item in made if item.meta["truncated"]]
    assert 0 < len(cut) < 250 and {item.output_tokens for item in cut} <= {999, 1000}
    assert max(item.output_tokens for item in made) <= 1000


def test_no_context_outgrows_the_kv_cache():
    items = [*step(1.0, prompts=1), replace(life(0, 8, [50, 1]), steps=(Turn(10, 50, "t", 0.1), Turn(5000, 1)))]
    held = most_kv(items)
    made = drawn(items, Law(log(2000), 1.0), 500, 10_000, Random(0), held)
    assert held - 5 < most_kv(made) <= held and any(item.meta["truncated"] for item in made)
