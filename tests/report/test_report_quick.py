"""A quick answer is of the same replicas: slots, KV memory, degrees and trajectories per replica as they are, the longest among them."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report_cases import command, lived, trace

from verl_heddle.report import quick as module
from verl_heddle.report.draws import generated, recorded
from verl_heddle.report.quick import _chosen, _Group, quick_trace, quick_workload
from verl_heddle.report.setting import setting


@pytest.fixture
def few_turns(monkeypatch):
    monkeypatch.setattr(module, "TURNS", 400)


def work_of(source):
    return [item for step in source.draws[0].steps for item in step]


def test_what_fits_is_played_as_it_is():
    where, source = quick_workload(setting("qwen3-8b", "h200", 8), "coding", 4, 4)
    full = generated("coding", 4, 4, [0])
    assert source.draws == full.draws and where.gpus == 8 and "whole step" in source.sample


def test_a_fleet_shrinks_with_its_prompts(few_turns):
    asked = setting("qwen3-8b", "h200", 64, slots=16)
    where, source = quick_workload(asked, "coding", 64, 8)
    (draw,) = source.draws
    prompts = {item.prompt_id for item in draw.steps[0]}
    assert where.gpus < 64 and len(prompts) / where.gpus == 64 / 64
    assert all(where.gpus % tp == 0 for tp in asked.tps) and (where.slots, where.kv_tokens) == (asked.slots, asked.kv_tokens)
    assert all(sum(item.prompt_id == name for item in draw.steps[0]) == 8 for name in prompts)
    assert {item.prompt_id for item in draw.before[0]} == prompts
    full = generated("coding", 64, 8, [0]).draws[0].steps[0]
    assert max(item.output_tokens for item in draw.steps[0]) == max(item.output_tokens for item in full)
    assert f"{len(prompts)} of 64 prompts" in source.sample and f"{where.gpus} of 64 GPUs" in source.sample


def test_a_step_too_long_for_the_smallest_fleet_gets_shorter_and_says_so(few_turns):
    where, source = quick_workload(setting("qwen3-8b", "h200", 8, slots=2), "coding", 64, 8)
    assert where.gpus == 8 and 2 * 8 * module.FILLED <= len(work_of(source)) < 64 * 8
    assert "shorter step" in source.sample


def test_a_trace_is_sampled_in_steps_and_prompts(tmp_path, few_turns):
    items = [lived(f"p{k}", s, (20 + k,) * 3, step) for step in range(1, 9) for k in range(40) for s in range(2)]
    path = trace(tmp_path, items)
    where, source = quick_trace(setting("qwen3-8b", "h200", 16), path)
    assert where.gpus == 8 and source.about["steps"] < 8 and source.gpus == 16
    assert {len({item.prompt_id for item in step}) for step in source.draws[0].steps} == {20}
    assert source.draws[0].crossed and source.draws[0].before == source.draws[0].steps
    whole = [item for step in recorded(path, [0]).draws[0].steps for item in step]
    assert all(item in whole for item in work_of(source))


def test_a_small_trace_is_that_of_the_full_answer(tmp_path):
    items = [lived(f"p{k}", s, (20 + k, 30), step) for step in (1, 2) for k in range(3) for s in range(3)]
    items += [lived("v", 0, (9,), 1, validate=True), lived("dead", 0, (), 2, outcome="failed"), lived("p0", 0, (50,), 1, run="0")]
    path = trace(tmp_path, items)
    for limits in ({}, {"step": 2}, {"prompts": 2, "samples": 2}):
        _, source = quick_trace(setting("qwen3-8b", "h200", 8), path, **limits)
        full = recorded(path, [0], **limits)
        assert source.draws == full.draws
        assert set(full.notes) <= set(source.notes)


def test_a_file_of_another_tool(tmp_path, few_turns):
    path = tmp_path / "requests.jsonl"
    path.write_text("".join(json.dumps({"timestamp": k, "input_length": 50, "output_length": 1 + k}) + "\n" for k in range(2000)))
    _, source = quick_trace(setting("qwen3-8b", "h200", 8, slots=4), str(path))
    work = work_of(source)
    assert 8 * 4 <= len(work) <= 400 and max(item.output_tokens for item in work) == 2000
    assert any("2,000 trajectories" in note for note in source.notes)


@given(st.lists(st.integers(1, 10_000), min_size=1, max_size=60, unique=True), st.integers(1, 60))
@settings(max_examples=200)
def test_prompts_are_chosen_evenly(tokens, number):
    groups = [_Group(f"p{k}", 1, 1, n, n) for k, n in enumerate(tokens)]
    names = _chosen(groups, number)
    by = {group.prompt: group.tokens for group in groups}
    assert len(names) == min(number, len(groups)) and max(by[name] for name in names) == max(tokens)
    ranked = sorted(tokens, reverse=True)
    places = sorted(ranked.index(by[name]) for name in names)
    part = len(tokens) / len(names)
    assert all(int(k * part) <= place < (k + 1) * part + 1e-9 for k, place in enumerate(places)), "one of each part"


def test_gpu_hours_are_those_of_the_whole_fleet(few_turns):
    from verl_heddle.report.study import study

    where, source = quick_workload(setting("qwen3-8b", "h200", 64), "search", 64, 8)
    answer = study(where, source, ("stock",), jobs=1)
    row, run = answer.stock, answer.stock.typical
    assert where.gpus < 64 and row.gpu_hours == pytest.approx(64 * run.step_s / 3600)
    assert row.gpu_hours_per_1000 == pytest.approx(1000 * row.gpu_hours / (64 * 8))


def test_three_lines_and_what_was_sampled(capsys, tmp_path):
    words = ("simulate", "--quick", "--workload", "search", "--model", "qwen3-8b", "--gpus", "16", "--prompts", "8", "--jobs", "1")
    assert command(*words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("A step takes ") and "GPU-hours" in lines[0] and lines[-1].startswith("Quick: ") and len(lines) <= 6
    assert lines[-2].startswith("Qwen3-8B on H200, step times: table"), "never a silent guess"
    assert command(*words, "--json", "-") == 0
    value = json.loads(capsys.readouterr().out)
    assert value["config"]["fleet_gpus"] == 16 and value["config"]["sample"] == lines[-1] and value["config"]["seeds"] == [0]


@pytest.mark.parametrize(("words", "says"), [(("--arms", "heddle"), "--quick simulates"), (("--step", "3"), "--step chooses a step")])
def test_what_does_not_go_with_it_is_one_line(words, says, capsys):
    assert command("simulate", "--quick", "--workload", "math", "--model", "qwen3-8b", *words) == 2
    out, err = capsys.readouterr()
    assert says in err and err.count("\n") == 1 and not out
