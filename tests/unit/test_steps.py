"""The training steps of a recorded run, from its trace."""

import pytest

from verl_heddle.report.attribution import metrics_of
from verl_heddle.traces.recorder import Recorder, append
from verl_heddle.traces.steps import training_steps
from verl_heddle.trajectory import Decision, Outcome, Reason, TrajectoryId


def life(step, sample, seconds, run="1", reward=1.0):
    recorder = Recorder(TrajectoryId("p", f"u{step}", sample, step), 0.0, 100.0 * step)
    recorder.turn_asked(0.0)
    recorder.turn_done(10, 10 * (sample + 1), Decision("r0", 0, Reason.STICKY), 0.0, 0.0, seconds, None)
    recorder.reward = reward
    trajectory = recorder.finish(Outcome.FINISHED, seconds, 100.0 * step + seconds, "verl", "w", None)
    trajectory.meta["run"] = run
    return trajectory


def test_a_repeated_step_counts_once_as_in_its_latest_run(tmp_path):
    steps = [life(step, sample, 1.0 + sample) for step in (1, 2, 3) for sample in (0, 1)]
    append(tmp_path / "t", [life(3, 0, 999.0, run="0"), *steps])
    found = training_steps(tmp_path / "t")
    assert list(found) == [1, 2, 3] and [len(one) for one in found.values()] == [2, 2, 2]
    metrics = metrics_of(found[3])
    assert metrics["makespan_s"] == pytest.approx(2.0) and metrics["reward"] == 1.0


def test_a_trace_without_training_is_an_error(tmp_path):
    trajectory = life(1, 0, 1.0)
    trajectory.meta["validate"] = True
    append(tmp_path / "t", [trajectory])
    with pytest.raises(ValueError, match="no training trajectories"):
        training_steps(tmp_path / "t")


def test_a_trace_of_an_asynchronous_trainer_has_no_steps(tmp_path):
    trajectory = life(1, 0, 1.0)
    trajectory.meta["trainer_mode"] = "colocate_async"
    append(tmp_path / "t", [trajectory])
    with pytest.raises(ValueError, match=r"t:1: .*colocate_async.*docs/async.md"):
        training_steps(tmp_path / "t")
