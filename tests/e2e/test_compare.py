"""`verl-heddle compare` with real verl and real vLLM engines: one pair, two arms; the real twin of tests/compare with its fake trainer."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "compare"))
from wandb_server import synced

from verl_heddle.compare.document import schema
from verl_heddle.traces import read

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).resolve().parents[2]


def command(*words: str, **extra: str) -> subprocess.CompletedProcess:
    dropped = ("RAY_ADDRESS", "PYTHONDONTWRITEBYTECODE", "WANDB_MODE", "WANDB_API_KEY")
    environment = {k: v for k, v in os.environ.items() if k not in dropped} | {"NETRC": "/nowhere", **extra}
    return subprocess.run([sys.executable, "-m", "verl_heddle.cli", *words], capture_output=True, text=True, timeout=1200, env=environment)


def compared(workspace, out: Path, steps: int, *overrides: str) -> tuple[Path, subprocess.CompletedProcess]:
    """(folder, finished call): one pair of the math recipe's command, on data and model made once for all tests."""
    recipe = {"OUT": str(workspace), "NAME": "compare", "STEPS": str(steps), "GPUS": "1", "PYTHON": sys.executable}
    run = ("bash", str(ROOT / "recipes/math/run.sh"), "+machine=cpu", *overrides)
    return out, command("compare", "--out", str(out), "--pairs", "1", "--steps", str(steps), "--", *run, **recipe)


@pytest.fixture(scope="module")
def done(workspace, tmp_path_factory):
    return compared(workspace, tmp_path_factory.mktemp("compare") / "cmp", 2)


def test_both_arms_finish_and_are_compared(done):
    out, call = done
    assert call.returncode == 0, call.stderr[-4000:]
    value = json.loads((out / "compare.json").read_text())
    jsonschema = pytest.importorskip("jsonschema")
    assert list(jsonschema.Draft202012Validator(schema()).iter_errors(value)) == []
    assert [run["state"] for run in value["runs"]] == ["finished", "finished"]
    assert "engines are up" in call.stderr and "step 2 of 2: rollout" in call.stderr
    for run in value["runs"]:
        assert [step["step"] for step in run["steps"]] == [1, 2]
        spans = [
            (item.meta["start_s"], item.meta["end_s"])
            for item in read(out / run["folder"] / "heddle/trace.jsonl")
            if item.meta["step"] == 2
        ]
        took = max(end for _, end in spans) - min(start for start, _ in spans)
        assert run["steps"][1]["makespan_s"] == pytest.approx(took) and run["steps"][1]["trajectories"] == len(spans) == 64
        assert run["steps"][1]["step_s"] > took, "verl's own clock, from its file logger"
    heddle = next(arm for arm in value["arms"] if arm["name"] == "heddle")
    assert heddle["speedup"]["value"] > 0 and heddle["speedup"]["low"] is None, "one step of one pair"
    assert value["engines"]["assumed"] == [] and value["engines"]["slots"] == 8


def test_the_twin_judges_steps_beside_the_run(done):
    lines = [
        json.loads(line)["data"]
        for arm in ("stock", "heddle")
        for line in (done[0] / f"runs/p1-{arm}/metrics.jsonl").read_text().splitlines()
    ]
    steps = [line for line in lines if "heddle/makespan_s" in line]
    assert len(steps) == 4 and all(line["heddle/twin/failures"] == 0 for line in steps)
    judged = [line for line in steps if "heddle/twin/error" in line]
    assert judged and all(line["heddle/twin/step"] == 1 for line in judged), "of the step before, in the last one's metrics"


def test_the_arms_differ_in_the_plugin_only(done):
    value = json.loads((done[0] / "compare.json").read_text())
    keys = {row["key"]: row["values"] for row in value["config_diff"]}
    assert keys["heddle.observe"] == {"stock": True, "heddle": False}
    assert keys["actor_rollout_ref.rollout.scheduling_policy"] == {"stock": "fcfs", "heddle": "priority"}
    rollout = "actor_rollout_ref.rollout"
    ours = (
        "heddle.",
        f"{rollout}.scheduling_policy",
        f"{rollout}.engine_kwargs",
        f"{rollout}.custom",
        "actor_rollout_ref.model.external_lib",
    )
    assert not [name for name in keys if not name.startswith(ours)]


def test_nothing_is_left_running(done):
    from verl_heddle.compare.campaign import marked

    assert not [pid for arm in ("stock", "heddle") for pid in marked(str(done[0] / "runs" / f"p1-{arm}"))]


def test_runs_and_summary_are_one_group_on_wandb(done, tmp_path):
    pytest.importorskip("wandb")
    folders = [*done[0].glob("runs/*/wandb/offline-run-*"), *done[0].glob("wandb/offline-run-*")]
    assert len(folders) == 3, done[1].stdout
    found = {}
    for number, folder in enumerate(folders):
        copy = tmp_path / folder.name
        shutil.copytree(folder, copy)
        run = synced(copy, tmp_path / f"config{number}")
        assert run.about["groupName"] == "cmp"
        found[run.about["jobType"]] = run
    assert set(found) == {"stock", "heddle", "summary"}
    logged = [line["heddle/makespan_s"] for line in found["heddle"].history if "heddle/makespan_s" in line]
    value = json.loads((done[0] / "compare.json").read_text())
    steps = next(run["steps"] for run in value["runs"] if run["arm"] == "heddle")
    assert logged == pytest.approx([step["makespan_s"] for step in steps])


def test_explain_takes_the_comparison(done):
    call = command("explain", str(done[0]))
    assert call.returncode == 0, call.stderr
    assert "- Step 2 took" in call.stdout and "That trajectory, turn by turn" in call.stdout and "What would have helped" in call.stdout


def test_an_asynchronous_trainer_is_compared_by_tokens_trained_on(workspace, tmp_path):
    out, call = compared(workspace, tmp_path / "windows", 3, "trainer.v1.trainer_mode=colocate_async", "trainer.test_freq=3")
    assert call.returncode == 0, call.stderr[-4000:]
    value = json.loads((out / "compare.json").read_text())
    jsonschema = pytest.importorskip("jsonschema")
    assert list(jsonschema.Draft202012Validator(schema()).iter_errors(value)) == []
    for arm in value["arms"]:
        windows = arm["windows"]
        assert windows["trained_tokens_per_s"] > 0 and windows["dropped_share"] == 0 and windows["interrupted_share"] > 0
        assert 0 < windows["paused_share"] < 1 and arm["speedup"] is None and arm["validation"] is not None
        logged = [json.loads(line)["data"] for line in (out / f"runs/p1-{arm['name']}/metrics.jsonl").read_text().splitlines()]
        tokens = [row["heddle/trained/tokens"] for row in logged if "heddle/trained/tokens" in row]
        steps = next(run["steps"] for run in value["runs"] if run["arm"] == arm["name"])
        assert [step["trained_tokens"] for step in steps] == tokens and len(tokens) == 3
    ratio = next(arm["trained_ratio"] for arm in value["arms"] if arm["name"] == "heddle")
    assert ratio["steps"] == 2 and 0.2 < ratio["value"] < 5
    assert "trained tokens/s" in call.stdout and "of 3: trained on" in call.stderr
