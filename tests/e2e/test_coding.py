"""The coding recipe trains end to end: real verl, real vLLM, every program run in the real sandbox."""

from __future__ import annotations

import pytest
from engines import prepared, runner

from verl_heddle.traces.io import read

pytestmark = pytest.mark.e2e

STEPS = 2
MODEL_STEPS = 600
"""Of the recipe's 700: a policy that knows its tasks less well, whose groups therefore seldom all earn the same."""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = prepared("coding", tmp_path_factory.mktemp("coding"), MODEL_STEPS)
    return runner("coding", folder)(
        "coding", "+plugin=heddle", "data.train_batch_size=8", "actor_rollout_ref.actor.ppo_mini_batch_size=8", steps=STEPS
    )


def test_it_trains(run):
    assert run.code == 0, run.log[-3000:]
    assert sorted(run.steps) == [1, 2]
    for step, metrics in run.steps.items():
        assert len(run.rollouts(step)) == 8 * 4
        assert 0.1 < metrics["critic/score/mean"] < 1.2, "the tiny policy solves short tasks and fails long ones"
        assert metrics["heddle/fallbacks/total"] == 0
    assert max(metrics["actor/grad_norm"] for metrics in run.steps.values()) > 0, "a step whose groups all earn the same teaches nothing"


def test_failures_are_read_and_fixed(run):
    said = [output for step in run.steps for _, output in run.rollouts(step)]
    fixed = [
        text for text in said if "<tool_response>1 of 2 passed. Add " in text and "<tool_response>All tests passed.</tool_response>" in text
    ]
    assert fixed, "somebody read what failed and went on to pass"
    assert not any("sandbox failed" in text for text in said)


def test_the_tool_is_on_the_record(run):
    tools = [turn for item in read(run.trace) for turn in item.steps if turn.tool]
    assert {turn.tool for turn in tools} <= {"test", "run"} and all(turn.tool_latency_s > 0.005 for turn in tools), "a process was started"
