"""The router dies twice in the middle of a step, once to be restarted and once for good, while trajectories wait for room: no group is
lost, and the run says so."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from engines import LITTLE_KV

from verl_heddle.traces.io import read

pytestmark = [pytest.mark.e2e, pytest.mark.alone]

TOOLS = Path(__file__).parent / "router_killer.py"
STEPS, TRAJECTORIES = 5, 16 * 8
"""Twice the recipe's samples, so that there is no room for all when the router dies."""


@pytest.fixture(scope="module")
def run(train):
    tools = f"actor_rollout_ref.rollout.multi_turn.function_tool_path={TOOLS}"
    samples = "actor_rollout_ref.rollout.n=8"
    return train("router_death", "+plugin=heddle", tools, samples, LITTLE_KV, steps=STEPS, replicas=2)


def test_training_completes_with_every_group(run):
    assert run.code == 0, run.log[-3000:]
    assert [f"ROUTER KILLED in step {step}" in run.log for step in (2, 4)] == [True, True]
    for step in range(1, STEPS + 1):
        assert len(run.rollouts(step)) == TRAJECTORIES, f"step {step}"
    assert all(run.steps[step]["heddle/outcomes/finished"] == TRAJECTORIES for step in run.steps)


def test_the_fallback_is_counted_and_said_once(run):
    fallbacks = {step: metrics["heddle/fallbacks/total"] for step, metrics in run.steps.items()}
    assert fallbacks[1] == 0 and fallbacks[2] > 0 and fallbacks[4] > 0, fallbacks
    assert run.steps[2]["heddle/decisions/fallback_router"] == run.steps[2]["heddle/fallbacks/fallback_router"]
    assert len([line for line in run.said if "router lost" in line]) == 2, "once a death, in the one worker"
    assert run.steps[5]["heddle/decisions/fallback_router"] == run.steps[5]["heddle/turns"], "gone for good"


def test_a_restarted_router_is_used_again(run):
    assert len([line for line in run.said if "the router is back" in line]) == 1
    assert run.steps[4]["heddle/decisions/admitted"] > 0, "between the two deaths it decided again"


def test_who_was_waiting_for_room_goes_on(run):
    assert all(run.steps[step]["heddle/fallbacks/hold_lost"] > 0 for step in (2, 4))


def test_the_record_has_no_hole(run):
    lives = Counter((item.meta["step"], item.prompt_id, item.trial) for item in read(run.trace))
    assert len(lives) == STEPS * TRAJECTORIES and set(lives.values()) == {1}
