"""Inspect logs: which event belongs to which answer, what a usage says, and that nothing in it can break the import."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from wrecked import ends_well, known_and_read, wrecked

from verl_heddle.traces.importers import inspect_log


def at(second):
    return f"2026-11-26T22:44:{second:09.6f}+00:00"


def call(number, tool):
    return {"id": f"c{number}", "function": tool, "arguments": {"n": number}, "type": "function"}


def answer(identity, content, *calls):
    made = {"id": identity, "content": content, "source": "generate", "role": "assistant", "model": "m"}
    return {**made, "tool_calls": list(calls)} if calls else made


def tool(identity, number, content):
    return {"id": identity, "content": content, "role": "tool", "tool_call_id": f"c{number}", "function": "slow"}


def model_event(identity, start, end, usage, **more):
    return {
        "uuid": f"u{identity}",
        "timestamp": at(start),
        "working_start": start,
        "event": "model",
        "model": "mockllm/model",
        "input": [],
        "input_refs": [[0, 2]],
        "output": {
            "model": "m",
            "choices": [{"message": {"id": identity, "content": "attachment://0e", "role": "assistant"}, "stop_reason": "stop"}],
            "usage": usage,
            "time": end - start - 0.25,
        },
        "completed": at(end),
        "working_time": end - start,
    } | more


def tool_event(number, start, end):
    return {
        "timestamp": at(start),
        "event": "tool",
        "type": "function",
        "id": f"c{number}",
        "function": "slow",
        "result": "done",
        "events": [],
        "completed": at(end),
        "working_time": end - start,
    }


def usage(fresh, output, cached=0, written=0):
    told = {"input_tokens": fresh, "output_tokens": output, "total_tokens": fresh + output + cached + written}
    return told | ({"input_tokens_cache_read": cached, "input_tokens_cache_write": written} if cached or written else {})


SAMPLE = {
    "id": 1,
    "epoch": 1,
    "input": "2+2?",
    "target": "4",
    "messages": [
        {"id": "s", "content": "s" * 200, "role": "system"},
        {"id": "e1", "content": "1+1?", "source": "input", "role": "user"},
        {"id": "e2", "content": "2", "source": "input", "role": "assistant"},
        {"id": "u", "content": "2+2?", "source": "input", "role": "user"},
        answer("a1", "Let me see.", call(1, "slow"), call(2, "slow")),
        tool("t1", 1, "r" * 40),
        tool("t2", 2, "r" * 40),
        answer("a2", [{"type": "reasoning", "reasoning": "w" * 36}, {"type": "text", "text": "www"}]),
        {"id": "u2", "content": "Are you sure?", "role": "user"},
        answer("a3", "4"),
    ],
    "output": {
        "model": "m",
        "choices": [{"message": answer("a3", "4"), "stop_reason": "stop"}],
        "usage": usage(90, 1),
        "time": 0.5,
    },
    "scores": {"match": {"value": "C", "answer": "4"}, "other": {"value": 0.25}},
    "events": [
        {"event": "sample_init", "timestamp": at(0)},
        model_event("a1", 1, 3, usage(10, 7, cached=5)),
        tool_event(1, 3.25, 4.25),
        tool_event(2, 4.25, 6.0),
        model_event("a2", 6.5, 7.5, usage(20, 9, cached=15, written=5)),
        model_event("a3", 9.5, 10, usage(25, 1)),
        model_event("grade", 11, 12, usage(999, 99), role="grader"),
    ],
    "total_time": 12.0,
    "model_usage": {"mockllm/model": usage(55, 17)},
}
LOG = {
    "version": 2,
    "status": "success",
    "eval": {
        "run_id": "B",
        "created": at(0),
        "task": "sums",
        "task_id": "9",
        "dataset": {"name": "sums", "samples": 1},
        "model": "mockllm/model",
    },
    "plan": {"name": "plan", "steps": []},
    "results": {"total_samples": 1, "scores": []},
    "stats": {"started_at": at(0), "completed_at": at(20)},
    "samples": [SAMPLE, {**SAMPLE, "epoch": 2, "scores": {"match": {"value": "I"}}}],
}


def of(sample):
    return json.dumps({**LOG, "samples": [sample]}, indent=2)


def without(value, *keys):
    """The same without these keys, however deep."""
    if isinstance(value, dict):
        return {key: without(one, *keys) for key, one in value.items() if key not in keys}
    return [without(one, *keys) for one in value] if isinstance(value, list) else value


def test_a_sample(tmp_path):
    (item, again), tally = known_and_read(inspect_log, tmp_path, json.dumps(LOG, indent=2))
    assert (item.source, item.workload, item.model, item.prompt_id) == ("inspect", "sums", "mockllm/model", "1")
    assert (item.trial, item.reward, again.trial, again.reward) == (1, 1.0, 2, 0.0)
    first, second, third = item.steps
    assert (item.prompt_tokens, first.ctx_tokens, first.output_tokens, first.gen_s) == (15, 15, 7, 1.75), "the cache's tokens with it"
    assert (first.tool, first.tool_latency_s) == ("slow+slow", 3.0), "one after the other: from 3 to 6, where no call took more than 1.75"
    assert (second.ctx_tokens, second.input_tokens, second.output_tokens, second.gen_s) == (40, 18, 9, 0.75)
    assert (second.tool, second.tool_latency_s) == ("user", 2.0)
    assert (third.ctx_tokens, third.ctx_reset, third.output_tokens, third.tool, third.gen_s) == (25, True, 1, None, 0.25)
    assert tally.known == {"context": 6, "output tokens": 6, "tool seconds": 4} and not tally.estimated and not tally.missing


def test_answers_without_an_id_are_matched_in_order(tmp_path):
    sample = without(SAMPLE, "id") | {"id": "q", "events": [one for one in without(SAMPLE["events"], "uuid") if one.get("role") is None]}
    sample["events"] += [model_event("x", 1, 2, None, error="overloaded"), model_event("y", 1, 2, None, pending=True)]
    for event in sample["events"]:
        if event["event"] == "model":
            event["output"]["choices"][0]["message"].pop("id")
    (item,), _ = known_and_read(inspect_log, tmp_path, of(sample))
    assert [turn.output_tokens for turn in item.steps] == [7, 9, 1] and item.prompt_id == "q"


def test_a_log_of_2024(tmp_path):
    sample = without(SAMPLE, "completed", "working_time", "time", "source")
    sample["transcript"] = {"events": sample.pop("events")[:-1]}
    sample["messages"] = [one for one in sample["messages"] if one["id"] not in ("e1", "e2")]
    sample["score"] = {"value": 1}
    del sample["scores"]
    (item,), tally = known_and_read(inspect_log, tmp_path, of(sample))
    assert [(turn.output_tokens, turn.gen_s, turn.tool_latency_s) for turn in item.steps] == [
        (7, None, None),
        (9, None, None),
        (1, None, None),
    ]
    assert item.reward == 1.0 and tally.missing == {"tool seconds": 2}


def test_without_events_it_is_estimated_but_for_the_last_answer(tmp_path):
    (item,), tally = known_and_read(inspect_log, tmp_path, of(without(SAMPLE, "events")))
    first, second, third = item.steps
    assert item.prompt_tokens == 50 + 1 + 1 + 1, "the example answer is part of the prompt"
    assert (first.output_tokens, first.output_est, first.tool) == (round(len('Let me see.\n{"n": 1}\n{"n": 2}') / 4), True, "slow+slow")
    assert (second.input_tokens, second.output_tokens) == (20, 10)
    assert (third.output_tokens, third.output_est, third.ctx_tokens, third.gen_s) == (1, False, 90, 0.5)
    assert tally.missing == {"tool seconds": 2}


def test_a_tool_that_alone_is_timed(tmp_path):
    sample = {**SAMPLE, "events": [one for one in SAMPLE["events"] if one["event"] == "tool"]}
    (item,), _ = known_and_read(inspect_log, tmp_path, of(sample))
    assert item.steps[0].tool_latency_s == 1.75, "the longer of the two"


@pytest.mark.parametrize(
    ("told", "context"),
    [
        ({"input_tokens": 10, "output_tokens": 2, "total_tokens": 12}, 10),
        ({"input_tokens": 10, "output_tokens": 2, "total_tokens": 17, "input_tokens_cache_read": 5}, 15),
        ({"input_tokens": 10, "output_tokens": 2, "total_tokens": 12, "input_tokens_cache_read": 5}, 10),  # OpenAI, 2024: with the cache
        ({"input_tokens": 10, "output_tokens": 2, "total_tokens": 112}, 10),  # Google, 2024: the reasoning is only in the total
        ({"input_tokens": 10, "output_tokens": 2, "total_tokens": 5}, 10),
        ({"input_tokens": 10, "output_tokens": 2, "input_tokens_cache_read": 5}, 15),
        ({"input_tokens": 10, "output_tokens": 2, "total_tokens": 0, "input_tokens_cache_read": 5}, 15),
    ],
)
def test_what_was_read(tmp_path, told, context):
    (item,), _ = known_and_read(
        inspect_log, tmp_path, of({**SAMPLE, "messages": SAMPLE["messages"][:5], "events": [model_event("a1", 1, 2, told)]})
    )
    assert item.prompt_tokens == context


@pytest.mark.parametrize(
    ("scores", "reward"),
    [
        ({"a": {"value": grade}}, number)
        for grade, number in [("P", 0.5), ("N", 0.0), (True, 1.0), ("0.5", 0.5), ("good", None), ({"x": 1}, None)]
    ]
    + [({}, None), (None, None), ("C", None)],
)
def test_scores(tmp_path, scores, reward):
    (item,), _ = known_and_read(inspect_log, tmp_path, of({**SAMPLE, "scores": scores}))
    assert item.reward == reward


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({**LOG, "samples": None}, "samples: got NoneType; allowed: a list of samples"),
        ({**LOG, "samples": "many"}, "samples: got str"),
        ({**LOG, "samples": [3]}, "samples[0].messages: got NoneType; allowed: a list of messages"),
        ({**LOG, "samples": [{**SAMPLE, "messages": "hello"}]}, "samples[0].messages: got str"),
        ({**LOG, "samples": [{**SAMPLE, "messages": [{"role": "robot"}]}]}, "samples[0].messages[0].role: got 'robot'"),
        ({**LOG, "samples": [{**SAMPLE, "messages": [3]}]}, "samples[0].messages[0].role: got None"),
        ([], "samples: got NoneType"),
        ({**LOG, "samples": []}, None),
        ({**LOG, "samples": [{**SAMPLE, "messages": []}]}, None),
        ({**LOG, "samples": [{**SAMPLE, "id": None, "epoch": -1, "events": "none", "output": 3}]}, None),
        ({**LOG, "samples": [{**SAMPLE, "events": [None, 3, {"event": "model"}, {"event": "tool", "id": 3}]}]}, None),
        ({**LOG, "samples": [{**SAMPLE, "events": [model_event("a1", 1, 2, usage(-1, float("nan")))]}]}, None),
        ({**LOG, "samples": [{**SAMPLE, "events": [model_event("a1", 1, 2, [3], completed=3, timestamp=[])]}]}, None),
        ({**LOG, "samples": [{**SAMPLE, "messages": [answer("a", None, None, 3, "x")]}]}, None),
    ],
    ids=range(14),
)
def test_what_is_odd_ends_in_a_trajectory_or_in_a_line(tmp_path, value, words):
    line = ends_well(inspect_log, tmp_path, json.dumps(value))
    assert line is None if words is None else words in line


@given(value=wrecked(LOG))
def test_anything_else(value):
    with tempfile.TemporaryDirectory() as folder:
        ends_well(inspect_log, Path(folder), json.dumps(value))
