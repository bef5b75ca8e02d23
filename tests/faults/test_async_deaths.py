"""Router and replica die while a weight update has the engines paused, and a run is taken up from a checkpoint with prompts under way."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from engines import LITTLE_KV

from verl_heddle.report.attribution import accounted
from verl_heddle.traces.io import read

pytestmark = [pytest.mark.e2e, pytest.mark.alone]

TOOLS = Path(__file__).parent / "pause_killer.py"
MODE = "trainer.v1.trainer_mode=colocate_async"
STEPS, PROMPTS, SAMPLES = 8, 12, 4
"""12 prompts, because verl wants batches that three trainer ranks share evenly."""


@pytest.fixture(scope="module")
def deaths(train):
    tools = f"actor_rollout_ref.rollout.multi_turn.function_tool_path={TOOLS}"
    sizes = [f"data.train_batch_size={PROMPTS}", f"actor_rollout_ref.actor.ppo_mini_batch_size={PROMPTS}"]
    return train("async_deaths", "+plugin=heddle", MODE, tools, LITTLE_KV, *sizes, steps=STEPS, replicas=3)


def test_training_completes_with_every_batch(deaths):
    assert deaths.code == 0, deaths.log[-3000:]
    assert ["ROUTER KILLED while paused" in deaths.log, "REPLICA KILLED while paused" in deaths.log] == [True, True]
    for step in range(1, STEPS + 1):
        assert len(deaths.rollouts(step)) == PROMPTS * SAMPLES, f"step {step}"


def test_nothing_is_lost_and_nothing_lived_twice(deaths):
    records = list(read(deaths.trace))
    lives = Counter((record.meta["uid"], record.trial) for record in records)
    assert set(lives.values()) == {1} and len(lives) >= STEPS * PROMPTS * SAMPLES
    assert {record.meta["outcome"] for record in records} == {"finished"}
    assert min(map(accounted, records)) > 0.99
    assert any(turn.legs for record in records for turn in record.steps)


def test_it_is_said_and_the_others_go_on(deaths):
    assert any("router lost" in line for line in deaths.said) and any("died" in line or "dead" in line for line in deaths.said)
    last = {turn.replica for record in read(deaths.trace) if record.meta["step"] == STEPS for turn in record.steps}
    assert len(last) <= 2


@pytest.fixture(scope="module")
def resumed(train):
    flags = ("+plugin=heddle", MODE, LITTLE_KV, "trainer.save_freq=2", "trainer.resume_mode=auto")
    first = train("async_resumed", *flags, steps=2, replicas=2)
    assert first.code == 0, first.log[-3000:]
    return first, train("async_resumed", *flags, steps=4, replicas=2, env={"VERL_LOGGING_LEVEL": "INFO"})


def test_a_run_is_taken_up_with_the_prompts_that_were_under_way(resumed):
    first, second = resumed
    assert second.code == 0, second.log[-3000:]
    assert "Re-issued" in second.log and sorted(second.steps) == [3, 4]
    assert all(len(second.rollouts(step)) == 64 for step in (3, 4))
    records = [record for record in read(second.trace) if record.meta["run"] != next(iter(read(first.trace))).meta["run"]]
    assert min(map(accounted, records)) > 0.99 and {record.meta["outcome"] for record in records} == {"finished"}
    assert all(metrics["heddle/fallbacks/total"] == 0 for metrics in second.steps.values())
