"""Weave's calls: which are turns, of which trace, what is counted, and that nothing in it can break the import."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from samples import lines
from wrecked import ends_well, known_and_read, wrecked

from verl_heddle.traces.importers import weave


def at(second):
    return f"2024-06-01T10:00:{second:09.6f}Z"


def logged(key, op, start, end, inputs, output, parent="root", trace="t1", summary=None):
    return {
        "id": key,
        "project_id": "team/project",
        "op_name": f"weave:///team/project/op/{op}:v1abc",
        "display_name": None,
        "trace_id": trace,
        "parent_id": parent,
        "started_at": at(start),
        "ended_at": None if end is None else at(end),
        "exception": None,
        "attributes": {},
        "inputs": inputs,
        "output": output,
        "summary": summary or {"weave": {"status": "success"}},
    }


SYSTEM, ASKED = {"role": "system", "content": "s" * 40}, {"role": "user", "content": "u" * 80}


def openai(key, start, end, messages, *tools, usage=None, content=None, **more):
    message = {"role": "assistant", "content": content}
    message["tool_calls"] = [{"id": "c", "type": "function", "function": {"name": tool, "arguments": "{}"}} for tool in tools] or None
    output = {"id": "chatcmpl", "model": "gpt-4o", "choices": [{"index": 0, "message": message, "finish_reason": "stop"}], "usage": usage}
    return logged(key, "openai.chat.completions.create", start, end, {"self": {}, "model": "gpt", "messages": messages}, output, **more)


def spent(prompt, completion):
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


RESULT = {"role": "tool", "tool_call_id": "c", "content": "r" * 40}
CALLS = [
    logged("root", "agent", 0, 20, {"task": "x"}, "done", parent=None),
    openai("b", 6, 8, [SYSTEM, ASKED, RESULT], usage=spent(150, 9), content="more?"),  # the order of an export is any
    openai("a", 1, 3, [SYSTEM, ASKED], "search", "read", usage=spent(100, 30)),
    logged("tool", "search", 3.5, 5.5, {"q": 1}, ["found"]),
    openai("c", 9, 9.5, [SYSTEM, ASKED, RESULT, ASKED], usage=spent(90, 5), content="bye"),
    openai("z", 1, 2, [SYSTEM, ASKED], usage=spent(100, 3), content="alone", trace="t2", parent=None),
]
ANTHROPIC = [
    logged(
        "a",
        "anthropic.Messages.create",
        1,
        2,
        {"model": "claude", "system": "s" * 40, "messages": [ASKED], "tools": [{"name": "get"}]},
        {
            "id": "msg",
            "type": "message",
            "role": "assistant",
            "model": "claude-4",
            "content": [{"type": "text", "text": "Let me see."}, {"type": "tool_use", "id": "u", "name": "get", "input": {"a": 1}}],
            "usage": {"input_tokens": 10, "cache_read_input_tokens": 50, "cache_creation_input_tokens": 5, "output_tokens": 20},
        },
        summary={"usage": {"claude-4": {"requests": 1, "input_tokens": 10, "output_tokens": 20}}},  # older Weave: without the cache
        parent=None,
    ),
    logged(
        "b",
        "anthropic.Messages.create",
        4,
        5,
        {"model": "claude", "messages": [ASKED, {"role": "user", "content": [{"type": "tool_result", "content": "r" * 40}]}]},
        {"role": "assistant", "model": "claude-4", "content": [{"type": "text", "text": "So."}], "usage": {}},
        summary={"usage": {"claude-4": {"requests": 1, "input_tokens": 90, "cache_read_input_tokens": 80, "output_tokens": 3}}},
        parent="a0",
    ),
]


def test_the_calls_of_a_trace_are_its_turns(tmp_path):
    (item, alone), tally = known_and_read(weave, tmp_path, lines(*CALLS), "calls.jsonl")
    assert (item.source, item.workload, item.model, item.trial, item.prompt_tokens) == ("weave", "agent", "gpt-4o", 0, 100)
    assert (alone.workload, alone.prompt_id) == ("openai.chat.completions.create", item.prompt_id), "the same prompt"
    first, second, third = item.steps
    assert (first.tool, first.tool_latency_s, first.gen_s) == ("search+read", 3.0, 2.0)
    assert (first.ctx_tokens, first.input_tokens, first.output_tokens, first.output_est) == (100, 0, 30, False)
    assert (second.ctx_tokens, second.input_tokens, second.output_tokens, second.tool) == (150, 20, 9, "user")
    assert (second.tool_latency_s, second.gen_s) == (1.0, 2.0)
    assert (third.ctx_tokens, third.ctx_reset, third.output_tokens, third.tool, third.gen_s) == (90, True, 5, None, 0.5)
    assert tally.left_out == {"non-model calls": 2}
    assert tally.known == {"context": 4, "output tokens": 4, "tool seconds": 2} and not tally.estimated and not tally.missing


def test_a_list_is_the_same(tmp_path):
    assert known_and_read(weave, tmp_path, json.dumps(CALLS, indent=1))[0] == known_and_read(weave, tmp_path, lines(*CALLS))[0]


def test_anthropic_counts_its_cache_apart(tmp_path):
    (item,), tally = known_and_read(weave, tmp_path, lines(*ANTHROPIC))
    first, second = item.steps
    assert (item.workload, item.model, item.prompt_tokens) == ("anthropic.Messages.create", "claude-4", 65)
    assert (first.output_tokens, first.tool, first.tool_latency_s) == (20, "get", 2.0)
    assert (second.ctx_tokens, second.output_tokens, second.tool) == (90, 3, None), "the summary has added it up"
    assert not tally.estimated


def test_what_is_not_told_is_estimated(tmp_path):
    calls = [
        openai("a", 1, None, [SYSTEM, ASKED], "search", content="w" * 37),
        openai("b", 5, 6, [SYSTEM, ASKED, RESULT], content="w" * 40),
    ]
    (item,), tally = known_and_read(weave, tmp_path, lines(*calls))
    first, second = item.steps
    assert (item.prompt_tokens, first.output_tokens, first.output_est, first.gen_s, first.tool_latency_s) == (30, 10, True, None, None)
    assert (second.ctx_tokens, second.input_tokens, second.output_tokens, second.output_est) == (40, 0, 10, True)
    assert tally.estimated == {"context": 2, "output tokens": 2} and tally.missing == {"tool seconds": 1} and not tally.known


def test_a_sum_over_models_is_no_call_s(tmp_path):
    summed = {"usage": {"m1": spent(500, 50), "m2": spent(1, 1)}}
    (item,), tally = known_and_read(weave, tmp_path, lines(openai("a", 1, 2, [SYSTEM, ASKED], content="w" * 40, summary=summed)))
    assert (item.prompt_tokens, item.output_tokens) == (30, 10) and tally.estimated == {"context": 1, "output tokens": 1}


def test_a_call_that_two_layers_saw_counts_once(tmp_path):
    twice = [
        openai("outer", 1, 3, [ASKED], usage=spent(20, 5), content="a"),
        logged("between", "retry", 1.1, 2.9, {}, None, parent="outer"),
        openai("inner", 1.2, 2.8, [ASKED], usage=spent(20, 5), content="a", parent="between"),
    ]
    (item,), tally = known_and_read(weave, tmp_path, lines(*twice))
    assert len(item.steps) == 1 and tally.left_out == {"non-model calls": 1, "calls nested in a model call": 1}


def test_parents_that_go_round_in_a_circle(tmp_path):
    circle = [
        openai("a", 1, 2, [ASKED], content="a", parent="x"),
        logged("x", "f", 1, 2, {}, 0, parent="y"),
        logged("y", "f", 1, 2, {}, 0, parent="x"),
    ]
    (item,), _ = known_and_read(weave, tmp_path, lines(*circle))
    assert len(item.steps) == 1


def test_calls_at_the_same_time_have_no_tool_time(tmp_path):
    calls = [openai("a", 1, 5, [ASKED], "search", usage=spent(20, 5)), openai("b", 2, 4, [ASKED, RESULT], usage=spent(30, 5))]
    (item,), tally = known_and_read(weave, tmp_path, lines(*calls))
    assert item.steps[0].tool_latency_s is None and tally.missing == {"tool seconds": 1}


def test_a_trace_without_a_model_is_nothing(tmp_path):
    items, tally = known_and_read(weave, tmp_path, lines(CALLS[0], CALLS[3]))
    assert items == [] and tally.left_out == {"non-model calls": 2}


def test_the_texts_are_not_kept(tmp_path):
    import tracemalloc

    from samples import put

    from verl_heddle.traces.importers.counting import Tally
    from verl_heddle.traces.importers.document import documents

    long = [{"role": "user", "content": "u" * 100_000}]
    path = put(tmp_path, lines(*(openai(f"c{number}", 1, 2, long, content="a") for number in range(200))))
    tracemalloc.start()
    try:
        ((item),) = weave.read(documents(path), Tally())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(item.steps) == 200 and peak < 5e6, "of 20 MB of text one line at a time"


GOOD = openai("a", 1, 2, [SYSTEM, ASKED], usage=spent(100, 3), content="a")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({**GOOD, "trace_id": None}, ":2: trace_id: got NoneType; allowed: text"),
        ({**GOOD, "trace_id": 3}, ":2: trace_id: got int"),
        ({}, ":2: trace_id: got NoneType"),
        (3, ":2: trace_id"),
        ("text", ":2: trace_id"),
        (None, ":2: trace_id"),
        ([3], ":2: [0].trace_id"),
        ([], None),
        ({**GOOD, "inputs": "many", "output": None}, None),
        ({**GOOD, "inputs": {"messages": "hello"}}, None),
        ({**GOOD, "inputs": {"messages": []}}, None),
        ({**GOOD, "inputs": {"messages": [3, None]}, "output": {"choices": []}}, None),
        ({**GOOD, "output": {"choices": [None]}, "summary": {"usage": {"m": 3}}}, None),
        ({**GOOD, "output": {"choices": [{"message": {"tool_calls": [None, 3, {"function": "x"}]}}], "usage": spent(-1, -1)}}, None),
        ({**GOOD, "output": {"content": [3, {"type": "tool_use"}], "usage": 3}}, None),
        ({**GOOD, "started_at": "soon", "ended_at": -5, "id": None, "parent_id": 3, "op_name": 3}, None),
        ({**GOOD, "output": {**GOOD["output"], "usage": {"prompt_tokens": float("nan"), "completion_tokens": 1e300}}}, None),
    ],
    ids=range(17),
)
def test_what_is_odd_ends_in_a_trajectory_or_in_a_line(tmp_path, value, words):
    line = ends_well(weave, tmp_path, lines(GOOD, value))
    assert line is None if words is None else words in line


@given(value=wrecked(CALLS))
def test_anything_else(value):
    with tempfile.TemporaryDirectory() as folder:
        ends_well(weave, Path(folder), json.dumps(value))


@given(value=wrecked(ANTHROPIC))
def test_anything_else_of_anthropic(value):
    with tempfile.TemporaryDirectory() as folder:
        ends_well(weave, Path(folder), json.dumps(value))
