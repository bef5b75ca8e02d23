"""OpenAI-style chat: what is counted, estimated, timed; and what cannot be read ends in a line."""

from __future__ import annotations

import gzip
import json

import pytest
from samples import fault, lines, put, taken

from verl_heddle.traces import TraceError
from verl_heddle.traces.importers import imported


def call(tool, arguments="{}"):
    return {"id": "c", "type": "function", "function": {"name": tool, "arguments": arguments}}


EPISODE = {
    "model": "m",
    "reward": 1,
    "messages": [
        {"role": "system", "content": "x" * 40},
        {"role": "user", "content": [{"type": "text", "text": "y" * 80}]},
        {"role": "assistant", "content": None, "tool_calls": [call("search", "z" * 40), call("read", "z" * 40)], "timestamp": 100.0},
        {"role": "tool", "content": "r" * 200, "timestamp": "1970-01-01T00:01:42Z"},
        {"role": "tool", "content": "r" * 40, "timestamp": 101.0},
        {"role": "assistant", "content": "w" * 20, "usage": {"prompt_tokens": 150, "completion_tokens": 9}},
        {"role": "user", "content": "more"},
        {"role": "assistant", "content": "done", "usage": {"prompt_tokens": 100, "completion_tokens": 1}},
    ],
}


def test_an_episode(tmp_path):
    (item,), result = taken(tmp_path, lines(EPISODE), "openai")
    assert (item.source, item.workload, item.model, item.reward, item.prompt_tokens) == ("openai", "chat", "m", 1.0, 30)
    first, second, third = item.steps
    assert (first.input_tokens, first.output_tokens, first.output_est) == (0, 20, True), "80 characters of arguments and a line break"
    assert (first.tool, first.tool_latency_s) == ("search+read", 2.0), "as long as the longest"
    assert (second.ctx_tokens, second.output_tokens, second.output_est, second.tool) == (150, 9, False, "user")
    assert (third.input_tokens, third.ctx_reset, third.tool) == (0, True, None), "the context shrank"
    assert result.told()[0] == "OpenAI-style chat with tool calls: 1 trajectories, 3 turns"
    assert any("estimated" in line and "output tokens" in line for line in result.told())


def test_samples_of_a_prompt_are_trials_of_it(tmp_path):
    items, _ = taken(tmp_path, json.dumps([EPISODE, EPISODE, {**EPISODE, "prompt_id": "other"}]), "openai", "file.json")
    assert [(item.prompt_id == items[0].prompt_id, item.trial) for item in items] == [(True, 0), (True, 1), (False, 0)]


def test_a_response_that_was_logged(tmp_path):
    logged = {
        "request": {"model": "m", "messages": EPISODE["messages"][:2], "tools": [{"name": "t" * 100}]},
        "response": {
            "model": "m2",
            "choices": [{"message": {"role": "assistant", "content": "ok"}}],
            "usage": {"prompt_tokens": 70, "completion_tokens": 2},
        },
    }
    (item,), _ = taken(tmp_path, lines(logged), "openai")
    assert (item.prompt_tokens, item.output_tokens, item.model) == (70, 2, "m2")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "empty file"),
        ("\n  \n", "empty file"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (bytes(range(256)), "neither JSON nor CSV"),
        ("hello world", "neither JSON nor CSV"),
        ("{", "not JSON"),
        (lines(EPISODE) + "{torn", ":2: not JSON"),
        (lines(EPISODE, {"messages": 3}), ":2: messages: got int; allowed: a list of messages"),
        (lines(EPISODE, {"messages": [{"role": "alien"}]}), ":2: messages[0].role: got 'alien'; allowed: system"),
        (lines({"messages": EPISODE["messages"][:2]}), "no trajectories"),
        (lines({"a": 1}), "unknown format; allowed: "),
        (gzip.compress(lines(EPISODE).encode(), mtime=0)[:-9], "cut off or damaged"),
        ("[" * 100_000, "not JSON"),
        ("a,b\n1\n", ":2: 1 values; allowed: 2, as in the header"),
        ("a,b\n1,2\n", "unknown format"),
    ],
    ids=range(15),
)
def test_what_cannot_be_read_ends_in_a_line(tmp_path, content, words):
    assert words in fault(tmp_path, content)


def test_numbers_that_are_none_are_not_known(tmp_path):
    odd = {
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b", "timestamp": "never", "usage": {"completion_tokens": float("nan"), "prompt_tokens": -3}},
        ],
        "reward": "high",
    }
    (item,), _ = taken(tmp_path, lines(odd), "openai")
    assert item.steps[0].output_tokens == 1 and item.steps[0].output_est and item.reward is None


def test_a_million_lines_are_read_one_at_a_time(tmp_path):
    import tracemalloc

    path = put(tmp_path, lines({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}) * 100_000)
    tracemalloc.start()
    try:
        assert sum(1 for _ in imported(path).trajectories) == 100_000
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 60e6, "prompts and trials are remembered, conversations are not"


def test_what_is_nested_without_end_says_nothing():
    from verl_heddle.traces.importers.fields import text

    deep: object = "x"
    for _ in range(5000):
        deep = [deep]
    assert text(deep) == "" and text({"input": deep}) == "" and text(["a", {"text": ["b"]}]) == "a\nb"


@pytest.mark.parametrize("kind", ["claude_code", "openai"])
def test_a_file_that_is_nested_without_end_ends_in_a_line_or_is_read(tmp_path, kind):
    path = put(tmp_path, "")
    for depth in (50, 300, 700, 950, 5000):
        part = "[" * depth + "]" * depth
        event = '{"type": "user", "uuid": "u", "sessionId": "s", "message": {"role": "user", "content": DEEP}}'.replace("DEEP", part)
        answer = '{"type": "assistant", "uuid": "v", "sessionId": "s", "message": {"role": "assistant", "content": "a"}}'
        chat = '{"messages": [{"role": "user", "content": DEEP}, {"role": "assistant", "content": "a"}]}'.replace("DEEP", part)
        path.write_text(f"{event}\n{answer}\n" if kind == "claude_code" else f"{chat}\n")
        try:
            assert len(list(imported(path, kind).trajectories)) == 1
        except TraceError as error:
            assert str(path) in str(error)


def test_a_header_without_rows(tmp_path):
    assert "a header without rows" in fault(tmp_path, "TIMESTAMP,ContextTokens,GeneratedTokens\n", name="code.csv")


def test_the_order_of_formats_does_not_matter_but_for_chat(tmp_path):
    from verl_heddle.traces.importers.formats import FORMATS

    assert list(FORMATS)[-1] == "openai", "it takes whatever has messages"
