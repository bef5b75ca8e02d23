"""Making runs, with the fake trainer: what is kept, what is made again, what a failing or hanging arm costs, what is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from compare_cases import FAKE, compare, environment

from verl_heddle.compare.campaign import Run, marked, outlived, stop
from verl_heddle.compare.launch import MARK


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def states(out: Path) -> dict[str, str]:
    return {file.parent.name: json.loads(file.read_text())["state"] for file in out.glob("runs/*/run.json")}


def waited_for(what, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)
    return found


def test_everything_is_made_and_told(finished):
    out, done = finished
    assert done.code == 0, done.err
    assert states(out) == {f"p{pair}-{arm}": "finished" for pair in (1, 2) for arm in ("stock", "heddle", "stock_bare")}
    lines = [line for line in done.err.splitlines() if " seed " in line]
    assert [line.split("] ")[1].split(":")[0] for line in lines] == [
        "pair 1, stock", "pair 1, heddle", "pair 1, stock_bare", "pair 2, stock_bare", "pair 2, heddle", "pair 2, stock"
    ]  # fmt: skip
    assert "step 4 of 4: rollout" in done.err and "runs to go, about" in done.err
    assert "heddle's rollouts run at" in done.out and str(out / "report.html") in done.out
    again = compare("--out", str(out), command=())
    assert again.code == 0 and "0 runs executed, 6 kept" in again.err and "ask for more with --pairs 3" in again.err


@pytest.mark.parametrize("moment", ["first run", "second run"])
def test_killed_in_the_middle_it_goes_on(tmp_path, moment):
    out, child = tmp_path / "cmp", tmp_path / "child"
    typed = [sys.executable, "-m", "verl_heddle.cli", "compare", "--out", str(out), "--pairs", "1", "--steps", "3", "--no-wandb"]
    arm = "stock" if moment == "first run" else "heddle"
    name, fake = f"p1-{arm}", environment(FAKE_STEP_S="0.7", FAKE_CHILD=str(child), FAKE_PARENT=arm)
    process = subprocess.Popen([*typed, "--", *FAKE], env=fake, stderr=subprocess.DEVNULL)
    waited_for(lambda: (out / "runs" / name / "metrics.jsonl").exists())
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    orphan = int(child.read_text())
    assert alive(orphan), "the run's own children outlive us"
    assert states(out)[name] == "running"
    kept = (out / "runs/p1-stock/run.json").read_text()
    done = compare("--out", str(out), command=(), FAKE_STEP_S="0")
    assert done.code == 0, done.err
    assert set(states(out).values()) == {"finished"} and len(states(out)) == 2
    assert ((out / "runs/p1-stock/run.json").read_text() == kept) == (moment == "second run"), "what was finished is kept as it was"
    assert not alive(orphan) and "processes of the interrupted run" in done.err
    assert not [file for file in (out / "runs").iterdir() if file.name.startswith(".")]


def test_an_interrupt_stops_the_run_and_says_how_to_go_on(tmp_path):
    out = tmp_path / "cmp"
    typed = [
        sys.executable,
        "-m",
        "verl_heddle.cli",
        "compare",
        "--out",
        str(out),
        "--pairs",
        "1",
        "--steps",
        "3",
        "--no-wandb",
        "--",
        *FAKE,
    ]
    process = subprocess.Popen(typed, env=environment(FAKE_STEP_S="5"), stderr=subprocess.PIPE, text=True)
    pid = waited_for(lambda: (entry := out / "runs/p1-stock/run.json").exists() and json.loads(entry.read_text())["pid"])
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and f"verl-heddle compare --out {out}" in err and not alive(pid)


def test_a_failing_arm_costs_only_itself_and_is_tried_again_next_time(tmp_path):
    out = tmp_path / "cmp"
    words = ("--out", str(out), "--pairs", "3", "--steps", "3", "--no-wandb")
    done = compare(*words, "--arm", "extra: a.b=1", FAKE_FAIL="extra", FAKE_STEP_S="0")
    assert done.code == 1
    assert "    | RuntimeError: the fake was told to fail" in done.err and "pair 1, extra: FAILED" in done.err and "exit code 3" in done.err
    assert done.err.count("RuntimeError") == 2 and "extra failed 2 times" in done.err, "the third is not tried"
    assert {name for name, state in states(out).items() if state == "finished"} == {
        f"p{p}-{arm}" for p in (1, 2, 3) for arm in ("stock", "heddle")
    }
    assert "heddle's rollouts run at" in done.out and "Pair 1, extra is missing: exit code 3." in done.out
    value = json.loads((out / "compare.json").read_text())
    assert [run["state"] for run in value["runs"] if run["arm"] == "extra"].count("failed") == 2
    mended = compare("--out", str(out), command=(), FAKE_STEP_S="0")
    assert mended.code == 0 and "3 runs executed, 6 kept" in mended.err


def test_a_silent_run_is_stopped(tmp_path):
    words = ("--out", str(tmp_path / "cmp"), "--pairs", "1", "--steps", "2", "--silence-s", "3", "--no-wandb")
    done = compare(*words, FAKE_HANG="heddle", FAKE_STEP_S="0")
    assert done.code == 1 and "pair 1, heddle: FAILED" in done.err and "printed nothing for 3 s" in done.err


def test_a_command_that_is_no_trainer_is_said_plainly(tmp_path):
    done = compare("--out", str(tmp_path / "cmp"), "--pairs", "1", "--no-wandb", command=("true",))
    assert done.code == 1 and "logged no training step to metrics.jsonl" in done.err


def test_two_calls_exclude_each_other(tmp_path):
    import fcntl

    out = tmp_path / "cmp"
    out.mkdir()
    with open(out / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        done = compare("--out", str(out), "--no-wandb")
    assert done.code == 2 and "another verl-heddle compare is running" in done.err and not (out / "runs").exists()


def test_a_foreign_folder_is_left_alone(tmp_path):
    mine = tmp_path / "cmp/runs/p1-stock/thesis.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("years of work")
    done = compare("--out", str(tmp_path / "cmp"), "--no-wandb")
    assert done.code == 2 and "is not a run of a comparison" in done.err and mine.read_text() == "years of work"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--pairs", "0"), "must be a whole number of at least 1"),
        (("--arm", "nonsense"), '--arm needs "name: overrides"'),
        (("--arm", "heddle: a=1"), "two arms are called heddle"),
        (("--no-heddle",), "only one arm is left"),
        (("--recipe", "chess"), "there is no recipe 'chess'"),
        (("--model", "qwen3-8b"), "--model and --gpu go together"),
        (("--warmup", "-1"), "must not be negative"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(tmp_path, words, says):
    done = compare("--out", str(tmp_path / "cmp"), *words)
    assert done.code == 2 and says in done.err and done.err.count("\n") == 1 and not (tmp_path / "cmp").exists()


def test_a_program_that_is_not_there(tmp_path):
    done = compare("--out", str(tmp_path / "cmp"), command=("pyhton", "train.py"))
    assert done.code == 2 and "'pyhton' is not a program" in done.err
    done = compare("--out", str(tmp_path / "cmp"), command=())
    assert done.code == 2 and "holds no comparison" in done.err


def test_a_wrong_verl_override_is_found_before_anything_runs(tmp_path):
    pytest.importorskip("verl")
    verl = ("python", "-m", "verl.trainer.main_ppo", "actor_rollout_ref.rollout.name=vllm")
    done = compare("--out", str(tmp_path / "cmp"), "--no-wandb", "--arm", "typo: heddle.priority.enabel=false", command=verl)
    assert done.code == 2 and "arm typo:" in done.err and "enabel" in done.err and not (tmp_path / "cmp").exists()


def test_an_arm_that_its_trainer_mode_refuses_is_found_before_anything_runs(tmp_path):
    pytest.importorskip("verl")
    mode = "trainer.v1.trainer_mode=colocate_async"
    verl = ("python", "-m", "verl.trainer.main_ppo", "actor_rollout_ref.rollout.name=vllm", mode)
    done = compare("--out", str(tmp_path / "cmp"), "--no-wandb", "--arm", "place: heddle.place.enable=true", command=verl)
    assert done.code == 2 and "arm place:" in done.err and "trainer_mode=colocate_async" in done.err and not (tmp_path / "cmp").exists()


def test_dry_run_prints_every_command_and_runs_none(tmp_path):
    done = compare("--out", str(tmp_path / "cmp"), "--recipe", "math", "--pairs", "2", "--dry-run", command=())
    assert done.code == 0 and done.out.count("recipes/math/run.sh") == 4 and "+plugin=observe" in done.out and "STEPS=4" in done.out
    assert not (tmp_path / "cmp").exists()


def test_stop_finds_what_left_its_session_and_spares_the_rest(tmp_path):
    mark = str(tmp_path / "run")
    script = (
        "import subprocess, sys, time; "
        "subprocess.Popen([sys.executable, '-c', 'import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(99)'], "
        "start_new_session=True, env={}); print('up', flush=True); time.sleep(99)"
    )
    run = Run([sys.executable, "-c", script], {**os.environ, MARK: mark}, tmp_path / "log")
    bystander = subprocess.Popen(["sleep", "99"], env={**os.environ, MARK: mark + "2"})
    try:
        waited_for(lambda: (tmp_path / "log").read_text().startswith("up") and len(marked(mark)) == 2)
        family = marked(mark)
        assert os.getpid() not in family and run.pid in family, "a child that dropped its environment counts through its parent"
        started = time.monotonic()
        assert stop(mark) >= 1
        assert not marked(mark) and not alive(run.pid) and alive(bystander.pid)
        assert time.monotonic() - started < 60
    finally:
        bystander.kill()
        bystander.wait()
        for pid in family:
            if alive(pid):
                os.kill(pid, signal.SIGKILL)


def test_what_outlives_a_run_is_waited_for_and_ended(tmp_path):
    mark = str(tmp_path / "run")
    quick, slow = (subprocess.Popen(["sleep", seconds], env={**os.environ, MARK: mark}) for seconds in ("0.5", "99"))
    try:
        assert outlived(mark, wait_s=1.5) == 1, "what ends by itself in time is not counted"
        assert slow.wait(60) < 0 and quick.wait(60) == 0 and outlived(mark) == 0
    finally:
        slow.kill()


def test_help_teaches():
    done = subprocess.run([sys.executable, "-m", "verl_heddle.cli", "compare", "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "examples:" in done.stdout and done.stdout.count("verl-heddle compare --") >= 5


def test_a_recipes_settings_are_kept_for_later_calls(tmp_path):
    words = ("--recipe", "math", "--out", str(tmp_path / "cmp"), "--dry-run")
    done = compare(*words, command=(), MODEL="mine", TRAIN_ROWS="32", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert done.code == 0, done.err
    assert done.out.count("env MODEL=mine TRAIN_ROWS=32 bash ") == 6


def test_with_a_gpu_a_recipe_needs_a_model(tmp_path):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    words = ("--recipe", "math", "--out", str(tmp_path / "cmp"), "--dry-run")
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = compare(*words, command=(), PATH=path, MODEL="")
    assert done.code == 2 and "say which model to train" in done.err and len(done.err.splitlines()) == 1
    done = compare(*words, command=("+size=qwen3-8b",), PATH=path, MODEL="mine")
    assert done.code == 0 and "+size=qwen3-8b" in done.out and "+machine=cpu" not in done.out
