"""Shaping on real verl and real vLLM: n rows of every prompt, each written once, and what cannot be kept is stopped in the engine."""

from __future__ import annotations

import json
from collections import Counter, defaultdict

import pytest

from verl_heddle.traces.io import read

pytestmark = pytest.mark.e2e

PROMPTS, SAMPLES, SPARE, STEPS = 16, 4, 2, 4
FIXED = [
    "heddle.shape.enable=true",
    f"heddle.shape.spare={SPARE}",
    "heddle.shape.uniform=true",
    "heddle.shape.longest=0",
    "heddle.shape.length_bias=1",
    "heddle.shape.prompt_bias=1",
    "heddle.shape.mixed_loss=1",
]
"""Spare samples from the first step on, no bound, the shortest are kept: as much is stopped as can be."""


NEWS_S = 0.2
"""Between a sample's end and the moment at which its siblings' next turns are limited by it."""


@pytest.fixture(scope="module")
def run(train):
    return train("shaped", "+plugin=heddle", *FIXED, "trainer.save_freq=4", "trainer.test_freq=4", steps=STEPS)


def rows(run, step):
    """Keys of the rows trained on: `{uid}_{sample}_{output}`."""
    lines = (run.folder / "rollouts" / f"{step}.jsonl").read_text().splitlines()
    return [json.loads(line)["uid"] for line in lines]


def test_exactly_n_rows_of_every_prompt(run):
    assert run.code == 0, run.log[-3000:]
    assert sorted(run.steps) == list(range(1, STEPS + 1))
    for step, metrics in run.steps.items():
        keys = rows(run, step)
        assert len(set(keys)) == len(keys) == PROMPTS * SAMPLES
        assert set(Counter(key.split("_")[0] for key in keys).values()) == {SAMPLES}
        assert metrics["heddle/trajectories"] == PROMPTS * (SAMPLES + SPARE)
        assert metrics["heddle/shape/groups"] == PROMPTS and metrics["heddle/shape/short"] == 0
        assert metrics["heddle/shape/spare"] == SPARE and metrics["heddle/fallbacks/total"] == 0


def test_what_cannot_be_kept_is_stopped_in_the_engine(run):
    stopped = sum(metrics.get("heddle/outcomes/cancelled", 0) for metrics in run.steps.values())
    assert stopped > STEPS * PROMPTS * SPARE / 4
    assert all(metrics["heddle/engines/requests_left"] == 0 for metrics in run.steps.values())
    groups: dict[str, list] = defaultdict(list)
    for item in read(run.trace):
        if not item.meta["validate"]:
            groups[item.meta["uid"]].append(item)
    for items in groups.values():
        assert sum(item.meta["kept"] for item in items) == SAMPLES
        shortest = sorted((item for item in items if item.meta["outcome"] == "finished"), key=lambda item: item.output_tokens)[:SAMPLES]
        enough, full_s = shortest[-1].output_tokens, max(item.meta["end_s"] for item in shortest)
        for item in items:
            last = item.steps[-1] if item.steps else None
            if item.meta["outcome"] == "cancelled" and last is not None and item.meta["start_s"] + last.start_s > full_s + NEWS_S:
                # A tie goes to the lower number, so that one passes the n-th with a token more.
                assert item.output_tokens <= enough + 1, "a turn that begins when the group is full ends at the length of its n-th"


def test_the_page_says_what_it_did_to_the_gradient(run):
    last = run.steps[STEPS]
    for name in (
        "tokens/kept",
        "tokens/ended",
        "reward/kept",
        "reward/ended",
        "mixed/kept",
        "mixed/plain",
        "stopped_tokens",
        "length_bias",
    ):
        assert f"heddle/shape/{name}" in last, name
    assert -1 < last["heddle/shape/length_bias"] < 0 and 0 < last["heddle/shape/stopped_tokens"] < 1
    assert last["heddle/shape/reward/kept"] == pytest.approx(last["critic/score/mean"])
    assert any("shaping: spare samples, 2 a prompt" in line for line in run.said)


def test_validation_is_not_shaped_and_prompts_are_remembered(run):
    checked = [item for item in read(run.trace) if item.meta["validate"]]
    assert checked and {item.meta["outcome"] for item in checked} == {"finished"}
    state = json.loads((run.folder / f"global_step_{STEPS}" / "heddle" / "shape.json").read_text())
    assert len(state["spreads"]["prompts"]) == PROMPTS


def test_by_forecast_corrected_and_with_dapo_filtering(train):
    """The default budget, which knows nothing in the first step; groups of equal reward are sampled anew; advantages are weighted."""
    dapo = [
        "algorithm.filter_groups.enable=true",
        "algorithm.filter_groups.metric=reward",
        "algorithm.filter_groups.max_inflight_gen_batches=2",
    ]
    forecast = ["heddle.shape.enable=true", "heddle.shape.unseen=true", "data.train_batch_size=8"]
    corrected = ["heddle.shape.corrected=true", "algorithm.adv_estimator=heddle_grpo"]
    run = train("dapo", "+plugin=heddle", *forecast, *corrected, *dapo, "actor_rollout_ref.actor.ppo_mini_batch_size=8", steps=3)
    assert run.code == 0, run.log[-3000:]
    for step, metrics in run.steps.items():
        keys = rows(run, step)
        assert len(set(keys)) == len(keys) == 8 * SAMPLES
        assert set(Counter(key.split("_")[0] for key in keys).values()) == {SAMPLES}
        assert metrics["heddle/shape/short"] == 0 and metrics["actor/grad_norm"] > 0, "no group of one reward is left"
        assert 0 < metrics.get("heddle/shape/ess", 1.0) <= 1.0
    assert run.steps[1]["heddle/shape/spare"] == 0
