"""Stock verl runs with real engines: with the flag the same tokens and a full account of the time; broken, stock verl."""

from __future__ import annotations

import pytest
from engines import LITTLE_KV, PREDICTING

from verl_heddle.report.attribution import accounted
from verl_heddle.traces.io import read

pytestmark = pytest.mark.e2e

GREEDY = "actor_rollout_ref.rollout.top_k=1"
"""Sampling from the single best token: every arm must produce the same tokens."""


@pytest.fixture(scope="module")
def stock(train):
    """verl without any plugin."""
    return train("stock", GREEDY, env={"VERL_USE_EXTERNAL_PLUGINS": "heddle"})


@pytest.fixture(scope="module")
def heddle(train):
    """As released, on two engines that hold a fraction of the contexts."""
    return train("heddle", GREEDY, "+plugin=heddle", LITTLE_KV, replicas=2)


@pytest.fixture(scope="module")
def longest(train):
    """Ordered by predicted length, on one engine with few slots."""
    few = ("actor_rollout_ref.rollout.max_num_seqs=4", "heddle.admission.per_slot=2", "heddle.preempt.min_steps=2")
    return train("longest", GREEDY, "+plugin=heddle", *PREDICTING, *few, "trainer.save_freq=1")


def test_stock_runs_and_heddle_is_silent_without_the_flag(stock):
    assert stock.code == 0, stock.log[-3000:]
    assert stock.said == [] and not any(key.startswith("heddle/") for key in stock.steps[1])


@pytest.mark.parametrize("arm", ["heddle", "longest"])
def test_same_tokens_for_every_trajectory(stock, arm, request):
    run = request.getfixturevalue(arm)
    assert run.code == 0, run.log[-3000:]
    assert len(stock.rollouts(1)) == 16 * 4
    assert run.rollouts(1) == stock.rollouts(1)
    assert run.steps[1]["critic/score/mean"] == pytest.approx(stock.steps[1]["critic/score/mean"])


def test_the_trace_accounts_for_the_wall_time_of_every_trajectory(heddle):
    trajectories = list(read(heddle.trace))
    assert len(trajectories) == 16 * 4
    assert min(accounted(item) for item in trajectories) > 0.99
    assert max(accounted(item) for item in trajectories) < 1.01
    assert {item.meta["outcome"] for item in trajectories} == {"finished"}
    assert all(turn.queue_s is not None and turn.replica and turn.reason for item in trajectories for turn in item.steps)
    assert any(turn.tool == "simplify" and turn.tool_latency_s for item in trajectories for turn in item.steps)
    assert sum(turn.queue_s for item in trajectories for turn in item.steps) > 0, "64 trajectories on 4 slots must queue"
    assert all(item.reward is not None and item.prompt_tokens for item in trajectories)
    assert len({item.prompt_id for item in trajectories}) == 16


def test_metrics_reach_the_console_and_wandb(heddle):
    metrics = heddle.steps[1]
    split = sum(metrics[f"heddle/last/{part}_s"] for part in ("queue", "generate", "tool", "other", "late_start"))
    assert split == pytest.approx(metrics["heddle/makespan_s"], rel=0.01)
    assert metrics["heddle/trajectories"] == 64 and metrics["heddle/fallbacks/total"] == 0 and metrics["heddle/metrics_failures"] == 0
    assert metrics["heddle/decisions/admitted"] >= 64
    assert 0 <= metrics["heddle/idle_share/replica_0"] < 1
    assert metrics["timing_s/gen"] < metrics["heddle/makespan_s"] + 1.5, "the batch is noticed soon after it is complete"
    files = list(heddle.folder.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 1
    logged = files[0].read_bytes()  # W&B's own record format; values stand in it as JSON text
    assert b"heddle/makespan_s" in logged and str(metrics["heddle/makespan_s"]).encode() in logged


def test_turns_are_held_back_and_urgent_ones_preempt(longest):
    metrics = longest.steps[1]
    assert metrics["heddle/router/held"] > 0 and metrics["heddle/router/hold_overdue"] == 0, "64 trajectories, 8 places"
    assert metrics["heddle/decisions/least_inflight"] == 64
    assert metrics["heddle/preempt/winners_started"] == metrics["heddle/preempt/preempted_by_rule"]
    assert metrics["heddle/preempt/refused_margin"] > 0, "the rule was asked"
    assert any("preempt on arrival is on" in line for line in longest.said)
    turns = [turn for item in read(longest.trace) for turn in item.steps]
    assert all(0 < turn.predicted_remaining <= turn.predicted_upper for turn in turns)
    assert {turn.priority for turn in turns} != {0}
    assert -1 <= metrics["heddle/predict/spearman_after_0"] <= 1


def test_what_was_learnt_comes_back_with_verls_checkpoint(train, longest):
    checkpoint = longest.folder / "global_step_1"
    assert (checkpoint / "heddle" / "predictor.bin").stat().st_size > 1000
    path = f"trainer.resume_from_path={checkpoint}"
    run = train("resumed", "+plugin=heddle", *PREDICTING, "trainer.resume_mode=resume_path", path, steps=2)
    assert run.code == 0, run.log[-3000:]
    assert [line for line in run.said if "restored the lengths learned up to global_step_1" in line]
    assert list(run.steps) == [2]
    # The same prompts again: it knows each of them now.
    first = {item.prompt_id: item.steps[0].predicted_remaining for item in read(run.trace)}
    before = {item.steps[0].predicted_remaining for item in read(longest.trace)}
    assert len(set(first.values())) > len(before)


def test_one_banner(heddle):
    banners = [line for line in heddle.said if " on (verl " in line]
    assert len(banners) == 1 and "placement: resident sets, least served first" in banners[0]


def test_a_broken_plugin_is_seen_and_training_goes_on_as_stock(train, stock, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Broken:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'verl_heddle.verl_plugin.agent_loop': raise ImportError('broken on purpose')\n"
        "sys.meta_path.insert(0, Broken())\n"
    )
    run = train("broken", GREEDY, "+plugin=heddle", env={"PYTHONPATH": str(tmp_path)})
    assert run.code == 0, run.log[-3000:]
    assert [line for line in run.said if "OFF, training goes on as stock verl: ImportError: broken on purpose" in line]
    assert run.rollouts(1) == stock.rollouts(1)
    assert not any(key.startswith("heddle/") for key in run.steps[1])


def test_trajectories_are_admitted_as_kv_cache_has_room(heddle):
    metrics = heddle.steps[1]
    assert metrics["heddle/outcomes/finished"] == 64 and metrics["heddle/fallbacks/total"] == 0
    assert metrics["heddle/residents/full"] > 0 and metrics["heddle/residents/admitted"] > 64, "contexts outgrew the KV cache"
    assert metrics["heddle/residents/most_waiting"] > 0 and metrics["heddle/router/hold_overdue"] == 0
    assert 0 <= metrics["heddle/read_again_share"] < 1 and metrics["heddle/prefill_tokens"] > 0
    turns = [turn for item in read(heddle.trace) for turn in item.steps]
    assert len({turn.replica for turn in turns}) == 2 and {turn.reason for turn in turns} <= {"admitted", "sticky"}
