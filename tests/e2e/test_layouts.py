"""Layouts on real verl and real vLLM, three trainer ranks: [1,1,1], [2,1], [1,1,1], then [2,1] again, whose engine of two dies."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

from verl_heddle.traces.io import read

pytestmark = [pytest.mark.e2e, pytest.mark.alone]

PROMPTS, SAMPLES, STEPS = 12, 4, 8
SCHEDULE = "heddle.layout.schedule={1: [1,1,1], 3: [2,1], 5: [1,1,1], 7: [2,1]}"
KILL_AFTER = 7
"""The weights for step 8 are in, and one of its engines dies before the step begins."""
REPLICAS = {1: 3, 2: 3, 3: 2, 4: 2, 5: 3, 6: 3, 7: 2, 8: 3}
PARAMETERS = 17
"""Of the tiny model as vLLM stacks them, in each worker."""
VLLMS_OWN = r"psm_\w+|.*-cpushm_\d+"
"""verl's runs end with vLLM's processes being killed, stock or not, which leaves their message queues: up to three for a worker."""
ENDING_S = 30.0
"""For processes that were told to end when the run did."""
PAIR = 3
"""Replica rank of the engine of two: it begins on GPU 0 of 3."""


def ours():
    """Processes and shared memory of runs."""
    found = set()
    for process in psutil.process_iter(["pid", "name", "cmdline"]):
        words = " ".join(process.info["cmdline"] or [])
        if "VLLM" in words or words.startswith("ray::"):
            found.add(process.info["pid"])
    return found, {path.name for path in Path("/dev/shm").iterdir()}


@pytest.fixture(scope="module")
def before():
    return ours()


@pytest.fixture(scope="module")
def run(before, workspace, train):
    sizes = [f"data.train_batch_size={PROMPTS}", f"actor_rollout_ref.actor.ppo_mini_batch_size={PROMPTS}"]
    environment = {
        "HEDDLE_WITNESS": str(workspace / "witness.jsonl"),
        "HEDDLE_KILL_AFTER": KILL_AFTER,
        "VLLM_ALLOW_INSECURE_SERIALIZATION": 1,
    }
    witness = "actor_rollout_ref.model.external_lib=[verl_heddle.verl_plugin.trainer_rank,weights_witness]"
    told = [f"+ray_kwargs.ray_init.runtime_env.env_vars.{name}='{value}'" for name, value in environment.items()]
    words = ["+plugin=heddle", "heddle.layout.enable=true", "heddle.place.enable=true", SCHEDULE, witness, *told, *sizes]
    return train("layouts", *words, steps=STEPS, replicas=3, env={"PYTHONPATH": str(Path(__file__).parent)})


def test_every_step_has_its_rows_and_its_layout(run):
    assert run.code == 0, run.log[-3000:]
    assert sorted(run.steps) == list(range(1, STEPS + 1))
    for step, metrics in run.steps.items():
        assert len(run.rollouts(step)) == PROMPTS * SAMPLES == metrics["heddle/outcomes/finished"]
        assert metrics["heddle/layout/replicas"] == REPLICAS[step] and metrics["heddle/fallbacks/total"] == 0
    homes = {step: {turn.replica for item in read(run.trace) if item.meta["step"] == step for turn in item.steps} for step in run.steps}
    assert {step: len(names) for step, names in homes.items()} == REPLICAS, "every replica of the layout worked, and no other"
    assert homes[2] == homes[5] == homes[8] and homes[4] == homes[7], "engines of a layout that is back are the same ones"


def test_placement_was_planned_with_step_times_learnt_from_the_run(run):
    assert run.steps[1]["heddle/decisions/least_inflight"] > 0, "verl's rule until they are known"
    assert run.steps[2]["heddle/decisions/planned"] >= PROMPTS * SAMPLES and "heddle/place/slope" in run.steps[2]


def test_no_trajectory_is_lost_or_trained_twice(run):
    lives = Counter((item.meta["step"], item.prompt_id, item.trial) for item in read(run.trace))
    assert len(lives) == STEPS * PROMPTS * SAMPLES and set(lives.values()) == {1}


def test_after_every_update_each_engine_holds_the_trainers_weights(run):
    told = [json.loads(line) for line in (run.folder.parent / "witness.jsonl").read_text().splitlines()]
    assert not [line for line in told if line["wrong"]] and all(line["parameters"] == PARAMETERS * line["tp"] for line in told)
    engines = {step: sorted((line["engine"], line["tp"]) for line in told if line["step"] == step) for step in range(STEPS)}
    ones, mixed = [(0, 1), (1, 1), (2, 1)], [(2, 1), (PAIR, 2)]
    want = {step: ones if REPLICAS[step + 1] == 3 else mixed for step in range(STEPS)}
    want[KILL_AFTER] = sorted(mixed + ones)  # once as planned, then for the first layout
    assert engines == want


def test_the_policy_is_the_same_at_every_degree(run):
    """What the engines say a token's chance is against what the trainer says: as near under every layout."""
    means = [metrics["training/rollout_probs_diff_mean"] for metrics in run.steps.values()]
    assert max(means) < 0.01, means


def test_where_an_engine_dies_before_its_step_the_first_layout_takes_over(run):
    assert f"ENGINE KILLED after the weights of step {KILL_AFTER}" in run.log
    assert [line for line in run.said if "an engine of the layout [2, 1] has died; the layout is [1, 1, 1] from now on" in line]
    assert run.steps[8]["heddle/layout/static"] == 1 and run.steps[8]["heddle/layout/failures"] == 1


def test_engines_are_launched_once_and_nothing_is_left_behind(run, before):
    launches = {step: metrics["heddle/layout/launches"] for step, metrics in run.steps.items()}
    assert launches == {1: 3, 2: 0, 3: 1, 4: 0, 5: 0, 6: 0, 7: 0, 8: 0}
    until = time.monotonic() + ENDING_S
    while (ours()[0] - before[0]) and time.monotonic() < until:
        time.sleep(0.5)
    processes, memory = ours()
    assert not processes - before[0]
    left = memory - before[1]
    assert all(re.fullmatch(VLLMS_OWN, name) for name in left) and len(left) <= 3 * 5, left
