"""verl's asynchronous trainers with real engines: weight updates interrupt turns, trajectories outlive steps, replicas come and go."""

from __future__ import annotations

from pathlib import Path

import pytest
from engines import LITTLE_KV

from verl_heddle.report.attribution import accounted
from verl_heddle.traces.io import read

pytestmark = pytest.mark.e2e

STEPS = 6
FIXED = ("actor_rollout_ref.rollout.top_k=1", "actor_rollout_ref.actor.optim.lr=0")
"""Greedy, and a policy that does not change: whatever interrupts a turn, its tokens are those of synchronous training."""

SEPARATE = (
    *("trainer.v1.trainer_mode=separate_async", "trainer.v1.separate_async.parameter_sync_step=2"),
    *("data.train_batch_size=16", "actor_rollout_ref.actor.ppo_mini_batch_size=8"),
    *("actor_rollout_ref.rollout.nnodes=1", "actor_rollout_ref.rollout.n_gpus_per_node=1", "ray_kwargs.ray_init.num_gpus=2"),
    "actor_rollout_ref.rollout.checkpoint_engine.backend=shm",
    "++actor_rollout_ref.rollout.checkpoint_engine.custom_backend_module=shared_memory_weights",
)
MODULES = {"PYTHONPATH": str(Path(__file__).parent)}


@pytest.fixture(scope="module")
def sync(train):
    """Synchronous training without any plugin: what each prompt leads to."""
    run = train("sync", *FIXED, env={"VERL_USE_EXTERNAL_PLUGINS": "heddle"})
    assert run.code == 0, run.log[-3000:]
    return set(run.rollouts(1))


@pytest.fixture(scope="module")
def colocated(train):
    overrides = ("+plugin=heddle", "trainer.v1.trainer_mode=colocate_async", *FIXED, LITTLE_KV, "trainer.test_freq=3")
    return train("colocated", *overrides, steps=STEPS, replicas=2)


@pytest.fixture(scope="module")
def separate(train):
    switch = "trainer.v1.separate_async.hybrid_rollout.enable_switch=true"
    return train("separate", "+plugin=heddle", *SEPARATE, switch, *FIXED, LITTLE_KV, steps=STEPS, env=MODULES)


@pytest.mark.parametrize("mode", ["colocated", "separate"])
def test_the_tokens_are_those_of_synchronous_training(mode, sync, request):
    run = request.getfixturevalue(mode)
    assert run.code == 0, run.log[-3000:]
    for step in range(1, STEPS + 1):
        rows = run.rollouts(step)
        assert len(rows) == 16 * 4 and set(rows) <= sync, f"step {step}: {set(rows) - sync}"


@pytest.mark.parametrize("mode", ["colocated", "separate"])
def test_interrupted_turns_are_told_and_all_time_is_accounted_for(mode, request):
    run = request.getfixturevalue(mode)
    records = list(read(run.trace))
    assert min(map(accounted, records)) > 0.99 and max(map(accounted, records)) < 1.01
    interrupted = [turn for record in records for turn in record.steps if turn.legs]
    assert interrupted and all(turn.paused_s > 0.9 for turn in interrupted), "verl waits a second before it goes on"
    assert any(turn.reread_tokens for turn in interrupted)
    assert {record.meta["trainer_mode"] for record in records} == {f"{mode.removesuffix('d')}_async"}
    versions = {turn.weights for record in records for turn in record.steps}
    assert any(first != last for first, last in (text.split("-") for text in versions if text))


@pytest.mark.parametrize("mode", ["colocated", "separate"])
def test_nothing_is_lost_and_no_fallback_is_taken(mode, request):
    run = request.getfixturevalue(mode)
    for metrics in run.steps.values():
        assert metrics["heddle/fallbacks/total"] == 0 == metrics["heddle/metrics_failures"]
        assert metrics["heddle/router/lost_trajectories"] == 0 == metrics["heddle/router/hold_overdue"]
        assert metrics.get("heddle/outcomes/failed", 0) == 0
        assert metrics["heddle/accounted_share_worst"] > 0.99
    assert sum(metrics["heddle/residents/interrupted"] for metrics in run.steps.values()) > 0
    assert any(0 < metrics["heddle/engines/paused_share"] < 1 for metrics in run.steps.values())


def test_every_row_was_one_trajectory_and_none_twice(colocated):
    """What is trained on ended before, whole: an aborted leg is not a row."""
    metrics = colocated.steps
    assert all(step["heddle/trained/tokens"] > 0 for step in metrics.values())
    records = [record for record in read(colocated.trace) if not record.meta["validate"]]
    assert len({(record.meta["uid"], record.trial) for record in records}) == len(records) >= STEPS * 64


def test_validation_beside_training_is_recorded_as_such(colocated):
    validated = [record for record in read(colocated.trace) if record.meta["validate"]]
    assert len(validated) >= 16 and {record.meta["outcome"] for record in validated} == {"finished"}


def test_replicas_come_and_go(separate):
    replicas = {turn.replica for record in read(separate.trace) for turn in record.steps}
    assert len(replicas) == 2, "the trainer's own and the one beside it"
