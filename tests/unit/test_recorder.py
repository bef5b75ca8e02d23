"""A recorded life accounts for its time, whatever happens in it."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verl_heddle.report.attribution import accounted, busy_s, engine_interval, split, step_metrics, wall_s, window_metrics, with_batch_wait
from verl_heddle.report.step_metrics import Trained
from verl_heddle.traces.columns import Columns
from verl_heddle.traces.io import read
from verl_heddle.traces.recorder import EngineTimes, Legs, Recorder, append
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


LEG = st.tuples(*[SECONDS] * 8)
"""Route, held, share of it paused, parked, queue, generation, transport, and the pause before the next leg."""


@given(st.lists(LEG, min_size=1, max_size=4), st.booleans(), st.booleans())
def test_all_time_of_an_interrupted_turn_is_accounted_for(legs, ends, lost):
    """Whether it comes to its end or is cancelled between two legs; a replica that is lost in between costs time, too."""
    now, context = 50.0, 100
    recorder, before = Recorder(TrajectoryId("p", "u", 0, step=3), now, 1000.0), Legs()
    paused = generated = 0.0
    for number, (route, held, share, parked, queue, generate, transport, pause) in enumerate(legs):
        before.asked(now)
        if lost and number:
            now += 1.0
            paused += 1.0
            before.asked(now)
        if not number:
            recorder.turn_asked(now)
        asked, sent = now, now + route + held
        now = sent + parked + queue + generate + transport
        times = EngineTimes(parked + queue + generate, queue, 1, cached_tokens=16, parked_s=parked, weights=number)
        held_paused = held * share / 5.0
        if ends and number == len(legs) - 1:
            recorder.turn_done(context, 7, Decision("r", 0, Reason.STICKY), asked, sent, now, times, held, held_paused, before)
        else:
            before.ended(context, 7, asked, sent, now, times, held, held_paused)
            now += pause
            paused += pause
        paused += parked + held_paused
        generated += generate
        context += 7
    if not ends:
        before.asked(now)
        recorder.turn_cut(0, None, now, now, now, before)
    recorder.scoring_from_s = now
    record = recorder.finish(Outcome.FINISHED, now, 1000.0 + now - 50.0, "verl", "w", "m")
    parts = split(record)
    assert parts.total_s == pytest.approx(wall_s(record), abs=1e-6)
    assert parts.paused_s == pytest.approx(paused, abs=1e-6) and parts.generate_s == pytest.approx(generated, abs=1e-6)
    [turn] = record.steps
    assert turn.output_tokens == 7 * len(legs) == recorder.output_tokens and turn.ctx_tokens == 100
    assert turn.legs == (None if ends and len(legs) == 1 else len(legs))
    if ends and len(legs) > 1:
        assert turn.reread_tokens == sum(100 + 7 * number - 16 for number in range(1, len(legs)))
        assert turn.weights == f"0-{len(legs) - 1}" and turn.cached_tokens == 16
    assert from_dict(to_dict(record)) == record


def test_a_window_tells_what_the_trainer_does_not_see():
    record = recorded(0.0, [(0, 1.0, 2.0, 0, [(0.0, 4.0)], 0.0)], 0.0)
    turn = replace(record.steps[0], legs=2, paused_s=3.0, reread_tokens=90)
    told = window_metrics([replace(record, steps=(turn,), meta=record.meta | {"end_s": record.meta["start_s"] + 10.0})], 5.0, step=5)
    shares = [told[f"{name}_share"] for name in ("queue", "generate", "tool", "paused")]
    assert shares == pytest.approx([0.1, 0.2, 0.4, 0.3]) and told["accounted_share_worst"] == pytest.approx(1.0)
    assert (told["tokens_per_s"], told["age_steps/mean"], told["interrupted_share"]) == (7 / 5.0, 2.0, 1.0)
    assert told["interrupted_reread_tokens"] == 90 and "makespan_s" not in told


def test_what_is_trained_on_is_told_from_what_is_dropped():
    def over(sample, step, tokens):
        record = recorded(0.0, [(0, 0, 1.0, 0, [], 0.0)], 0.0, sample=sample)
        return replace(record, steps=(replace(record.steps[0], output_tokens=tokens),), meta=record.meta | {"step": step})

    book = Trained(fresh_steps=3)
    book.ended(Columns.of([over(0, 1, 10), over(1, 1, 20), over(2, 1, 90)]))
    told = book.batch(["u_0_0", "u_1_0", "u_1_1", "elsewhere_0_0"], 2, 10.0)
    assert (told["trained/tokens"], told["trained/tokens_per_s"], told["trained/age_steps/mean"]) == (30, 3.0, 1.0)
    assert told["dropped/trajectories"] == 0 and told["trained/length_bias"] == 0.0
    assert book.batch([], 3, 10.0)["dropped/tokens"] == 0
    told = book.batch([], 4, 10.0)
    assert told["dropped/tokens"] == 90 and told["trained/length_bias"] == pytest.approx(15 / 40 - 1)
