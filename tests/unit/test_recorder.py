"""A recorded life accounts for its time, whatever happens in it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verl_heddle.report.attribution import accounted, busy_s, engine_interval, split, step_metrics, wall_s, with_batch_wait
from verl_heddle.traces.io import read
from verl_heddle.traces.recorder import EngineTimes, Recorder, append
from verl_heddle.traces.schema import from_dict, to_dict
from verl_heddle.trajectory import Decision, Outcome, Reason, TrajectoryId

SECONDS = st.floats(0.0, 5.0)
TURN = st.tuples(SECONDS, SECONDS, SECONDS, SECONDS, st.lists(st.tuples(SECONDS, SECONDS), max_size=3), SECONDS)


def recorded(setup, turns, score, sample=0, start=1000.0, replica="r0"):
    now = 50.0
    recorder = Recorder(TrajectoryId("p", "u", sample, step=3), now, start)
    now += setup
    context = 10
    for route, queue, generate, transport, tools, between in turns:
        recorder.turn_asked(now)
        sent = now + route
        done = sent + queue + generate + transport
        decision = Decision(replica, -1, Reason.STICKY, 12.0)
        recorder.turn_done(context, 7, decision, now, sent, done, EngineTimes(queue + generate, queue, 1, 4))
        context += 7 + 5
        longest = 0.0
        for offset, length in tools:
            recorder.tool_ran("t", done + offset, done + offset + length)
            longest = max(longest, offset + length)
        now = done + longest + between
    recorder.scoring_from_s = now
    recorder.prompt_tokens, recorder.reward = 10, 0.5
    now += score
    return recorder.finish(Outcome.FINISHED, now, start + now - 50.0, "verl", "w", "m")


@given(SECONDS, st.lists(TURN, max_size=5), SECONDS)
def test_all_time_is_accounted_for(setup, turns, score):
    trajectory = recorded(setup, turns, score)
    assert split(trajectory).total_s == pytest.approx(wall_s(trajectory), abs=1e-6)
    assert split(trajectory).queue_s == pytest.approx(sum(t[1] for t in turns))
    assert split(trajectory).generate_s == pytest.approx(sum(t[2] for t in turns), abs=1e-9)
    assert accounted(trajectory) == pytest.approx(1.0, abs=1e-3) or wall_s(trajectory) < 1e-3
    assert from_dict(to_dict(trajectory)) == trajectory


def test_parallel_tools_count_once():
    trajectory = recorded(0.0, [(0, 0, 1, 0, [(0.0, 2.0), (1.0, 2.0)], 0.5)], 0.0)
    assert trajectory.steps[0].tool == "t+t"
    assert trajectory.steps[0].tool_latency_s == pytest.approx(3.0)
    assert trajectory.steps[0].between_s == pytest.approx(0.5)


def test_contexts_chain():
    trajectory = recorded(0.0, [(0, 0, 1, 0, [], 0)] * 3, 0.0)
    assert [turn.input_tokens for turn in trajectory.steps] == [0, 5, 5]
    assert [turn.ctx_tokens for turn in trajectory.steps] == [10, 22, 34]


def test_what_was_not_measured_is_missing():
    recorder = Recorder(TrajectoryId("p", "u", 0, 1), 0.0, 1000.0)
    recorder.turn_asked(1.0)
    recorder.turn_done(10, 5, Decision("r", 0, Reason.STICKY), 1.0, 1.0, 2.0, None)
    lost = recorder.finish(Outcome.FAILED, 3.0, 1009.0, "verl", "w", None)  # the wall clock says 9 s, the intervals 3
    assert accounted(lost) == pytest.approx(3 / 9)
    assert lost.steps[0].queue_s is None and lost.steps[0].gen_s == pytest.approx(1.0)


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 20)), max_size=12))
def test_busy_is_the_measure_of_the_union(spans):
    spans = [(a, a + length) for a, length in spans]
    assert busy_s(spans) == len({second for a, b in spans for second in range(a, b)})


def test_step_metrics_name_the_last_trajectory():
    quick = recorded(0.1, [(0.0, 0.0, 1.0, 0.0, [], 0.0)], 0.0, sample=0)
    slow = recorded(0.1, [(0.0, 3.0, 2.0, 0.0, [(0.0, 4.0)], 0.0)], 0.0, sample=1, replica="r1")
    metrics = step_metrics(with_batch_wait([quick, slow]), ["r0", "r1", "r2"])
    assert metrics["makespan_s"] == pytest.approx(9.1)
    assert (metrics["last/queue_s"], metrics["last/generate_s"], metrics["last/tool_s"]) == pytest.approx((3.0, 2.0, 4.0))
    assert metrics["tokens"] == 14 and metrics["turns"] == 2 and metrics["preemptions"] == 2
    assert quick.meta["wait_s"] == pytest.approx(8.0) and slow.meta["wait_s"] == 0.0
    assert metrics["idle_share/replica_0"] == pytest.approx(1 - 1.0 / 9.1)
    assert metrics["idle_share/replica_2"] == 1.0, "a replica that served nothing idles all along"
    assert engine_interval(slow, slow.steps[0])[1] - engine_interval(slow, slow.steps[0])[0] == pytest.approx(2.0)
    assert metrics["decisions/sticky"] == 2 and metrics["outcomes/finished"] == 2


def test_append_adds_and_reads_back(tmp_path):
    path = tmp_path / "run" / "trace.jsonl"
    append(path, [recorded(0.1, [], 0.0, sample=0)])
    append(path, [recorded(0.1, [], 0.0, sample=1)])
    assert [item.trial for item in read(path)] == [0, 1]
