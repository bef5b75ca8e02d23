"""mini-swe-agent's runs: chat, tool calls and the responses API, old and new; commands as tools, usage and times where they are."""

from __future__ import annotations

import json
from math import nan

import pytest
from hypothesis import given
from test_import_swe_agent import strangers
from wrecked import ended, known_and_read, wrecked

from verl_heddle.traces.importers import mini_swe_agent


def call(number, command):
    return {"id": f"call_{number}", "type": "function", "function": {"name": "bash", "arguments": json.dumps({"command": command})}}


def answer(content, *, at=None, usage=None, commands=()):
    extra = {"actions": [{"command": command} for command in commands], "cost": 0.003, "timestamp": at}
    return {"role": "assistant", "content": content, "extra": {**extra, "response": {"usage": usage}} if usage else extra}


RUN = {
    "info": {
        "model_stats": {"instance_cost": 0.05, "api_calls": 4},
        "config": {"agent": {"step_limit": 0}, "model": {"model_name": "anthropic/claude-sonnet-4-5", "model_kwargs": {}}},
        "mini_version": "2.0.0",
        "exit_status": "LimitsExceeded",
        "submission": "",
    },
    "messages": [
        {"role": "system", "content": "s" * 400},
        {"role": "user", "content": "t" * 200},
        answer("look\n\n```mswea_bash_command\nls -la\n```", at=1706000000.0, commands=["ls -la"])
        | {"extra": {"timestamp": 1706000000.0, "response": {"usage": {"prompt_tokens": 160, "completion_tokens": 30}}}},
        {"role": "user", "content": "o" * 40, "extra": {"returncode": 0, "raw_output": "o" * 20, "timestamp": 1706000001.5}},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [call(1, "grep -rn x"), call(2, "python3 t.")],
            "extra": {"timestamp": 1706000005.0},
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "r" * 20, "extra": {"returncode": 0, "timestamp": 1706000010.0}},
        {"role": "tool", "tool_call_id": "call_2", "content": "r" * 20, "extra": {"returncode": 0, "timestamp": 1706000012.0}},
        answer("x" * 36, at=nan, commands=["git diff"], usage={"prompt_tokens": 150, "completion_tokens": 0}),
        {"role": "user", "content": "r" * 8, "extra": {"timestamp": 1706000020.0}},
        answer("y" * 40, at=1706000030.0, commands=["make"]),
        {"role": "user", "content": "r" * 8, "extra": {"timestamp": 1706000031.0}},
        {"role": "user", "content": "no" * 4, "extra": {"interrupt_type": "UserInterruption", "timestamp": 1706000090.0}},
        answer("I cannot go on", at=1706000099.0),
        {"role": "exit", "content": "LimitsExceeded", "extra": {"exit_status": "LimitsExceeded", "timestamp": 1706000100.0}},
    ],
    "trajectory_format": "mini-swe-agent-1.1",
    "instance_id": "django__django-10914",
}

OLD = {
    "info": {"exit_status": "Submitted", "submission": "diff", "model_stats": {"instance_cost": 0.1, "api_calls": 1}},
    "messages": [
        {"role": "system", "content": "s" * 40},
        {"role": "user", "content": "t" * 40},
        {
            "role": "assistant",
            "content": "```python\nprint()\n```\n```bash\ncat a\n```\n\n```bash\nsed -i s/a/b/ f\n```\ndone",
            "timestamp": 1000.5,
        },
        {"role": "user", "content": "r" * 8, "timestamp": 1003.0},
    ],
    "reward": 1,
}

RESPONSES = {
    "info": {"model_stats": {}},
    "trajectory_format": "mini-swe-agent-1.1",
    "messages": [
        {"role": "user", "content": [{"type": "input_text", "text": "t" * 40}]},
        {
            "object": "response",
            "output": [
                {"type": "reasoning", "summary": [{"type": "summary_text", "text": "a" * 10}], "encrypted_content": "e" * 4000},
                {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "b" * 10}]},
                {"type": "function_call", "name": "bash", "arguments": json.dumps({"command": "ls"}), "call_id": "c1"},
            ],
            "usage": {"input_tokens": 50, "output_tokens": 7},
            "extra": {"actions": [{"command": "ls", "tool_call_id": "c1"}], "timestamp": 10.0},
        },
        {"type": "function_call_output", "call_id": "c1", "output": "r" * 40, "extra": {"timestamp": 11.0}},
        {"object": "response", "output": [{"type": "message", "content": [{"type": "output_text", "text": "b" * 10}]}], "extra": {}},
    ],
}


def test_a_run(tmp_path):
    (item,), tally = known_and_read(mini_swe_agent, tmp_path, json.dumps(RUN, indent=2), "other.traj.json")
    assert (item.source, item.workload, item.prompt_id) == ("mini_swe_agent", "coding", "django__django-10914")
    assert (item.model, item.reward, item.meta) == ("anthropic/claude-sonnet-4-5", None, {"truncated": True})
    assert item.prompt_tokens == 160, "told by the usage, 150 by the texts"
    assert [turn.tool for turn in item.steps] == ["ls", "grep+python3", "git", "make", "bash"]
    assert [turn.tool_latency_s for turn in item.steps] == [1.5, 7.0, None, 1.0, None], "a person's minute is no tool's"
    assert [(turn.output_tokens, turn.output_est) for turn in item.steps] == [(30, False), (13, True), (9, True), (10, True), (4, True)]
    assert [turn.input_tokens for turn in item.steps] == [0, 10, 0, 2, 4]
    assert [(turn.ctx_tokens, turn.ctx_reset) for turn in item.steps] == [
        (160, False),
        (200, False),
        (150, True),
        (161, False),
        (175, False),
    ]
    assert tally.missing == {"tool seconds": 2} and tally.known["context"] == 2


def test_an_old_run(tmp_path):
    (item,), _ = known_and_read(mini_swe_agent, tmp_path, json.dumps(OLD), "django__django-1.5.traj.json")
    assert (item.prompt_id, item.prompt_tokens, item.reward, item.meta) == ("django__django-1.5", 20, 1.0, {})
    (turn,) = item.steps
    assert (turn.tool, turn.tool_latency_s, turn.output_est) == ("sed", 2.5, True), "the command of the last block"


def test_the_responses_api(tmp_path):
    (item,), _ = known_and_read(mini_swe_agent, tmp_path, json.dumps(RESPONSES))
    first, second = item.steps
    assert (item.prompt_tokens, first.output_tokens, first.tool, first.tool_latency_s) == (50, 7, "ls", 1.0)
    assert (second.input_tokens, second.ctx_tokens, second.output_tokens) == (10, 67, 2), "what is encrypted is not said"


@pytest.mark.parametrize(
    "content", ["```bash\ncut", "no block", None, "", "```\nls\n```", "```python\nx\n```", [{"type": "text", "text": "a"}]]
)
def test_a_command_that_cannot_be_told_is_bash(content):
    (item,) = took_one([{"role": "user", "content": "a"}, {"role": "assistant", "content": content}, {"role": "user", "content": "b"}])
    assert item.steps[0].tool == "bash"


def took_one(messages):
    from verl_heddle.traces.importers.counting import Tally
    from verl_heddle.traces.importers.document import Document

    return list(mini_swe_agent.read([Document({"info": {}, "messages": messages}, "f.traj.json", 0)], Tally()))


def test_other_formats_are_not_known():
    assert not [value for value in strangers(mini_swe_agent) if mini_swe_agent.knows(value) is not False]
    assert mini_swe_agent.knows({"trajectory_format": "mini-swe-agent-1"}) and mini_swe_agent.knows(OLD)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (3, "messages: got NoneType; allowed: a list of messages"),
        ({"messages": "all"}, "messages: got str"),
        ({"messages": [{"role": "alien"}]}, "messages[0].role: got 'alien'; allowed: system"),
        ({"messages": [{"role": ["user"]}]}, "messages[0].role: got ['user']"),
        ({"messages": [3]}, "messages[0].role: got None"),
    ],
    ids=range(5),
)
def test_what_cannot_be_read_ends_in_a_line(value, words):
    line = ended(mini_swe_agent, RUN, value) or ""
    assert words in line and "file.jsonl:2" in line


@pytest.mark.parametrize("key", ["extra", "content", "tool_calls", "timestamp", "output", "usage"])
@pytest.mark.parametrize(
    "value", [None, 3, nan, "text", [], {}, [3], [None], [[]], {"usage": "x"}, {"actions": "ls"}, {"actions": [3]}, {"actions": 3}]
)
def test_what_is_odd_costs_only_itself(key, value):
    assert ended(mini_swe_agent, {**OLD, "messages": [{**one, key: value} for one in OLD["messages"]]}) is None
    assert ended(mini_swe_agent, {**OLD, "info": value}) is None


@given(wrecked([RUN, RESPONSES]))
def test_nothing_else_is_raised(values):
    ended(mini_swe_agent, *values)
