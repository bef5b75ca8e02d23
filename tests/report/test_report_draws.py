"""What is simulated, and what heddle has seen before it."""

import pytest
from report_cases import lived, trace

from verl_heddle.report.draws import generated, recorded
from verl_heddle.traces import TraceError


def test_generated_epoch_before_is_other_samples_of_the_same_prompts():
    (draw,) = generated("coding", 3, 4, [7]).draws
    (now,), (before,) = draw.steps, draw.before
    assert len(now) == len(before) == 12
    assert {item.prompt_id for item in now} == {item.prompt_id for item in before}
    assert not {(item.prompt_id, item.trial) for item in now} & {(item.prompt_id, item.trial) for item in before}


def test_cold_and_seeds():
    cold = generated("math", 2, 2, [0], cold=True).draws[0]
    assert cold.before == () and len(cold.steps[0]) == 4
    assert generated("math", 2, 2, [0]).draws == generated("math", 2, 2, [0]).draws
    assert generated("math", 2, 2, [0]).draws[0].steps != generated("math", 2, 2, [1]).draws[0].steps


def test_recorded_steps_validation_and_unknown_lengths(tmp_path):
    work = [lived(f"p{k}", s, (10, 5), step) for step in (1, 2) for k in range(3) for s in range(2)]
    work += [lived("v", 0, (9,), 1, validate=True), lived("dead", 0, (), 2, outcome="failed"), lived("c", 0, (3,), 2, outcome="cancelled")]
    source = recorded(trace(tmp_path, work), [0, 1])
    assert [len(step) for step in source.draws[0].steps] == [6, 7]
    assert any("1 trajectories left out: validation" in note for note in source.notes)
    assert any("unknown length" in note for note in source.notes) and any("cancelled" in note for note in source.notes)
    assert source.about["steps"] == 2 and source.about["trace"] == "trace.jsonl"
    assert source.draws[0].crossed and source.draws[0].before == source.draws[0].steps


@pytest.mark.parametrize(("cut", "cap"), [(False, None), (True, 70)])
def test_the_cap_is_what_a_workload_says_and_what_a_trace_shows(tmp_path, cut, cap):
    assert generated("math", 2, 2, [0], cap_tokens=900).draws[0].cap_tokens == 900
    path = trace(tmp_path, [lived("p", 0, (50, 20), truncated=cut), lived("p", 1, (30,))])
    assert recorded(path, [0]).draws[0].cap_tokens == cap


def test_seeds_of_a_trace_permute_whole_prompts(tmp_path):
    path = trace(tmp_path, [lived(f"p{k}", s, (10 + k,)) for k in range(20) for s in range(3)])
    first, second = recorded(path, [0, 1]).draws
    assert all(item in second.steps[0] for item in first.steps[0]) and first.steps != second.steps
    order = [item.prompt_id for item in second.steps[0]]
    assert all(len(set(order[index : index + 3])) == 1 for index in range(0, 60, 3))


def test_one_step_and_limits(tmp_path):
    path = trace(tmp_path, [lived(f"p{k}", s, (10,), step) for step in (4, 5) for k in range(5) for s in range(4)])
    source = recorded(path, [0], step=5, prompts=2, samples=3)
    assert [(item.prompt_id, item.trial) for item in source.draws[0].steps[0]] == [(p, s) for p in ("p0", "p1") for s in range(3)]
    with pytest.raises(TraceError, match=r"no training step 9.*steps 4, 5"):
        recorded(path, [0], step=9)


def test_a_prompt_visited_twice_in_a_step(tmp_path):
    work = [lived("p", s, (10,), uid=uid) for uid in "ab" for s in range(2)]
    (step,) = recorded(trace(tmp_path, work), [0]).draws[0].steps
    assert sorted(item.trial for item in step) == [0, 1, 2, 3]


def test_a_step_recorded_again_counts_as_in_its_latest_run(tmp_path):
    work = [lived("p", s, (n,), step, run=run) for n, step, run in ((10, 1, "a"), (20, 2, "a"), (30, 2, "b")) for s in range(2)]
    source = recorded(trace(tmp_path, work), [0])
    assert [[item.output_tokens for item in step] for step in source.draws[0].steps] == [[10, 10], [30, 30]]
    assert any("2 trajectories left out: of earlier runs" in note for note in source.notes)


def test_a_public_trace_has_no_steps(tmp_path):
    path = trace(tmp_path, [lived("p", s, (10,), None) for s in range(2)])
    assert recorded(path, [0]).about["steps"] == 1
    with pytest.raises(TraceError, match="no steps"):
        recorded(path, [0], step=1)


def test_nothing_left(tmp_path):
    with pytest.raises(TraceError, match="no training trajectory"):
        recorded(trace(tmp_path, [lived("p", 0, (1,), validate=True)]), [0])
