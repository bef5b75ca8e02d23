"""Simulated training runs: what is asked for is trained on whole, dropped, or under way, whatever interrupts it."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_heddle.fleet import Replica
from verl_heddle.latency.model import LatencyModel
from verl_heddle.options import Options
from verl_heddle.orchestrator import Orchestrator
from verl_heddle.simulate import simulate
from verl_heddle.simulate.baselines.stock import Stock
from verl_heddle.simulate.options import EngineOptions
from verl_heddle.training.play import RETRY_S, train
from verl_heddle.training.trainer import MODES, Trainer
from verl_heddle.trajectory import Trajectory, Turn

LATENCY = LatencyModel.affine(0.01, 0.0005, prefill_per_token_s=1e-3)
FLEET = [Replica(f"r{number}", slots=4, kv_tokens=600) for number in range(2)]


def trajectory(prompt: int, trial: int, turns: list[tuple[int, float]]) -> Trajectory:
    steps = tuple(Turn(5 if number else 0, tokens, "t", tool_s) for number, (tokens, tool_s) in enumerate(turns))
    return Trajectory("test", "w", f"p{prompt}", trial, 20, steps)


TURNS = st.lists(st.tuples(st.integers(1, 80), st.sampled_from([0.0, 0.3, 2.0])), min_size=1, max_size=4)
GROUPS = st.lists(st.lists(TURNS, min_size=2, max_size=2), min_size=3, max_size=6)


def groups_of(drawn: list[list[list[tuple[int, float]]]], number: int) -> list[list[Trajectory]]:
    """So many groups, the drawn ones again and again."""
    return [[trajectory(prompt, trial, turns) for trial, turns in enumerate(drawn[prompt % len(drawn)])] for prompt in range(number)]


class Watched(Orchestrator):
    """Never lets a turn into an engine that is paused."""

    def __init__(self) -> None:
        super().__init__(Options())
        self.closed: set[str] = set()

    def paused(self, name, now):
        super().paused(name, now)
        self.closed.add(name)

    def resumed(self, name, now):
        self.closed.discard(name)
        super().resumed(name, now)

    def turn_started(self, turn, now):
        decision = super().turn_started(turn, now)
        assert decision.held or decision.replica not in self.closed
        return decision

    def admitted(self, now):
        found = super().admitted(now)
        assert not {replica for _, replica in found} & self.closed
        return found


@given(
    drawn=GROUPS,
    mode=st.sampled_from(MODES),
    heddle=st.booleans(),
    update_s=st.sampled_from([0.0, 0.5, 7.0]),
    warmup=st.sampled_from([0.0, 0.5, 2.0]),
    strategy=st.sampled_from(["drop", "wait"]),
    threshold=st.sampled_from([None, 1, 2, 8]),
)
@settings(max_examples=60, deadline=None)
def test_what_is_trained_on_is_whole_and_fresh(drawn, mode, heddle, update_s, warmup, strategy, threshold):
    trainer = Trainer(mode, 2, update_s, 0.1, 6, warmup, 2 if mode == "separate_async" else 1, threshold, strategy)
    if strategy == "drop" and threshold == 1 and trainer.ahead:
        trainer = replace(trainer, threshold=2)  # every prompt asked for ahead would be too stale
    groups = groups_of(drawn, 80)
    policy = Watched() if heddle else Stock(0)
    run = train(groups, FLEET, LATENCY, policy, trainer, EngineOptions("priority" if heddle else "fcfs", block_tokens=1))
    lengths = sorted(sum(turn.output_tokens for turn in item.steps) for item in chain.from_iterable(groups))
    for step in run.steps:
        assert len(step.ages) == 2 and len(step.trained_lengths) == 4 and step.trained_tokens == sum(step.trained_lengths)
        assert set(step.trained_lengths) <= set(lengths), "none was cut"
        assert step.seconds >= step.waited_s >= 0
        assert not step.ages or min(step.ages) >= 0
        if threshold is not None and mode != "sync" and strategy == "drop":
            assert max(step.ages) + 1 <= trainer.threshold, "too stale to train on"
        if mode == "sync":
            assert set(step.ages) == {0} and step.interrupted == 0 == step.dropped_tokens
    if strategy == "wait":
        assert run.dropped_share == 0
    if heddle:
        assert (not len(policy.turns) and not policy._lives) or mode != "sync", "nothing is left of a synchronous run"


@pytest.mark.parametrize("policy", [Stock, lambda seed: Orchestrator(Options(seed=seed))])
def test_a_synchronous_run_is_its_steps_one_after_the_other(policy):
    drawn = [[[(30, 1.0), (10, 0.0)], [(80, 0.5)]], [[(5, 0.0)] * 3, [(60, 2.0), (1, 0.0)]]]
    groups = groups_of(drawn, 6)
    run = train(groups, FLEET, LATENCY, policy(0), Trainer("sync", 2, 3.0, steps=3))
    mind = policy(0)
    for step, (first, second) in zip(run.steps, zip(groups[::2], groups[1::2], strict=True), strict=True):
        alone = simulate([*first, *second], FLEET, LATENCY, mind)
        assert step.waited_s == pytest.approx(alone.finish_s.max()) and step.seconds == pytest.approx(step.waited_s + 3.0)


def test_an_interrupted_turn_goes_on_with_the_tokens_it_has():
    """Two prompts of one sample: the short one ends, the update comes, and the long one pays for it by reading its context again."""
    groups = [[trajectory(number, 0, [(tokens, 0.0)])] for number, tokens in enumerate([10, 400, 10, 10])]
    fleet = [Replica("r0", slots=4)]
    trainer = Trainer("colocate_async", 1, 5.0, steps=3, warmup_batches=1.0, threshold=None)
    run = train(groups, fleet, LATENCY, Stock(0), trainer, EngineOptions(block_tokens=1))
    first, second, third = run.steps
    assert [step.trained_lengths for step in run.steps] == [(10,), (10,), (10,)] and [step.interrupted for step in run.steps][:2] == [1, 1]
    assert first.recomputed_tokens == 0 and 20 < second.recomputed_tokens < 40, "the prompt and what it had made by then"
    assert third.recomputed_tokens > second.recomputed_tokens
    run = train(groups[:3], fleet, LATENCY, Stock(0), replace(trainer, steps=2, threshold=2, strategy="wait"))
    assert [step.trained_lengths for step in run.steps] == [(10,), (400,)], "blocked until the old group is done"
    alone = float(simulate(groups[1], fleet, LATENCY, Stock(0)).finish_s.max())
    assert run.steps[0].seconds + run.steps[1].waited_s > alone + 5.0, "the tokens that it had were not made again, but it stood still"
    assert run.steps[0].seconds + run.steps[1].waited_s < alone + 5.0 + RETRY_S + 0.2


def test_too_few_prompts_are_refused():
    with pytest.raises(ValueError, match="pass more groups"):
        train(groups_of([[[(5, 0.0)]]], 2), FLEET, LATENCY, Stock(0), Trainer("sync", 2, 1.0, steps=2))


@pytest.mark.parametrize(
    "wrong", [{"mode": "async"}, {"prompts": 0}, {"update_s": -1.0}, {"parameter_sync_step": 3}, {"strategy": "keep"}, {"steps": 0}]
)
def test_impossible_trainers_are_refused(wrong):
    with pytest.raises(ValueError, match="must"):
        replace(Trainer("colocate_async", 4, 1.0), **wrong)
