"""Two of three replicas die in the middle of a step, one with its server, one behind it: no group is lost, training goes on."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from engines import LITTLE_KV

from verl_heddle.traces.io import read

pytestmark = [pytest.mark.e2e, pytest.mark.alone]

TOOLS = Path(__file__).parent / "replica_killer.py"
STEPS, PROMPTS, SAMPLES = 5, 12, 4
"""12 prompts, because verl wants batches that three trainer ranks share evenly."""


@pytest.fixture(scope="module")
def run(train):
    tools = f"actor_rollout_ref.rollout.multi_turn.function_tool_path={TOOLS}"
    sizes = [f"data.train_batch_size={PROMPTS}", f"actor_rollout_ref.actor.ppo_mini_batch_size={PROMPTS}"]
    return train("replica_death", "+plugin=heddle", tools, LITTLE_KV, *sizes, steps=STEPS, replicas=3)


def test_training_completes_with_every_group(run):
    assert run.code == 0, run.log[-3000:]
    assert [f"REPLICA KILLED in step {step}" in run.log for step in (2, 4)] == [True, True]
    for step in range(1, STEPS + 1):
        assert len(run.rollouts(step)) == PROMPTS * SAMPLES, f"step {step}"
    assert all(metrics["heddle/outcomes/finished"] == PROMPTS * SAMPLES for metrics in run.steps.values())


def test_no_trajectory_is_trained_twice_or_lost(run):
    lives = Counter((item.meta["step"], item.prompt_id, item.trial) for item in read(run.trace))
    assert len(lives) == STEPS * PROMPTS * SAMPLES and set(lives.values()) == {1}


def test_the_loss_is_counted_and_said(run):
    lost = [run.steps[step]["heddle/router/replicas_lost"] for step in range(1, STEPS + 1)]
    assert lost[0] == 0 and sum(lost[1:3]) == 1 and sum(lost[3:]) == 1, "in the step, or in the next if nobody had a request there"
    assert len([line for line in run.said if "its trajectories go on elsewhere" in line]) == 2
    homes = {step: {turn.replica for item in read(run.trace) if item.meta["step"] == step for turn in item.steps} for step in range(1, 6)}
    assert [len(homes[step]) for step in (1, 3, 5)] == [3, 2, 1]


def test_trajectories_waited_for_room_when_their_replica_died(run):
    assert all(metrics["heddle/residents/most_waiting"] > 0 for metrics in run.steps.values())
    assert all(metrics["heddle/residents/admitted"] >= PROMPTS * SAMPLES for metrics in run.steps.values())
    assert not [name for step in run.steps.values() for name, count in step.items() if "fallbacks/policy" in name and count]
