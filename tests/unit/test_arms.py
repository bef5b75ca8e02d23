"""The table of arms, from traces."""

import pytest

from verl_heddle.report.arms import read_arm, table
from verl_heddle.traces.recorder import Recorder, append
from verl_heddle.trajectory import Decision, Outcome, Reason, TrajectoryId


def life(step, sample, seconds, run="1", reward=1.0):
    recorder = Recorder(TrajectoryId("p", f"u{step}", sample, step), 0.0, 100.0 * step)
    recorder.turn_asked(0.0)
    recorder.turn_done(10, 10 * (sample + 1), Decision("r0", 0, Reason.STICKY), 0.0, 0.0, seconds, None)
    recorder.reward = reward
    trajectory = recorder.finish(Outcome.FINISHED, seconds, 100.0 * step + seconds, "verl", "w", None)
    trajectory.meta["run"] = run
    return trajectory


def test_medians_leave_the_first_step_out_and_a_repeated_step_counts_once(tmp_path):
    for name, factor in (("stock", 2.0), ("heddle", 1.0)):
        steps = [life(step, sample, factor * (50 if step == 1 else 1 + sample)) for step in (1, 2, 3) for sample in (0, 1)]
        append(tmp_path / name, [life(3, 0, 999.0, run="0"), *steps])
    arms = {name: read_arm(name, tmp_path / name) for name in ("stock", "heddle")}
    assert arms["heddle"].median("makespan_s") == pytest.approx(2.0)
    assert arms["stock"].median("reward") == 1.0
    text = table(arms)
    assert "makespan stock / heddle: 2.00x" in text
    assert len({len(line) for line in text.splitlines()[:4]}) == 1, "aligned"


def test_a_trace_without_training_is_an_error(tmp_path):
    trajectory = life(1, 0, 1.0)
    trajectory.meta["validate"] = True
    append(tmp_path / "t", [trajectory])
    with pytest.raises(ValueError, match="no training trajectories"):
        read_arm("x", tmp_path / "t")
