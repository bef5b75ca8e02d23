"""tau2-bench and tau-bench: what is a turn of the agent, what is the user's time, and that nothing in it can break the import."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from wrecked import ends_well, known_and_read, wrecked

from verl_heddle.traces.importers import tau2


def at(second):
    return f"2025-06-01T12:00:{second:09.6f}"


def call(tool, requestor="assistant", arguments=None):
    return {"id": f"call_{tool}", "name": tool, "arguments": arguments or {"order": "1"}, "requestor": requestor}


def said(role, second, content=None, **more):
    return {"role": role, "content": content, "tool_calls": None, "turn_idx": 0, "timestamp": at(second), "cost": 0.0, "usage": None} | more


def result(tool, second, requestor="assistant"):
    return {
        "id": f"call_{tool}",
        "role": "tool",
        "content": "r" * 40,
        "requestor": requestor,
        "error": False,
        "turn_idx": 1,
        "timestamp": at(second),
    }


def usage(prompt, completion):
    return {"prompt_tokens": prompt, "completion_tokens": completion}


RUN = {
    "id": "5ad1",
    "task_id": "[mobile]airplane_mode",
    "timestamp": at(0),
    "start_time": at(0),
    "end_time": at(30),
    "duration": 30.0,
    "termination_reason": "user_stop",
    "agent_cost": 0.1,
    "user_cost": 0.1,
    "reward_info": {"reward": 1.0, "reward_basis": ["DB"]},
    "messages": [
        said("assistant", 0, "Hi! How can I help you today?"),
        said("user", 1, "My phone is dead.", usage=usage(900, 30)),
        said(
            "assistant",
            4,
            tool_calls=[call("find_user"), call("find_line")],
            usage=usage(3000, 40),
            generation_time_seconds=2.5,
            cost=0.01,
        ),
        result("find_user", 4.5),
        result("find_line", 5.0),
        said("assistant", 8, "Look at the bar.", usage=usage(3100, 20)),
        said("user", 9, tool_calls=[call("look_at_bar", "user")], usage=usage(950, 10)),
        result("look_at_bar", 9.5, "user"),
        said("user", 11, "No bars.", usage=usage(990, 10)),
        said("assistant", 12, "Bye.", usage=usage(3050, 5)),
        said("user", 14, "###STOP###", usage=usage(999, 3)),
    ],
    "trial": 0,
    "seed": 300,
    "mode": "half_duplex",
}
RESULTS = {
    "timestamp": at(0),
    "info": {
        "git_commit": "abc",
        "num_trials": 2,
        "max_steps": 100,
        "user_info": {"implementation": "user_simulator", "llm": "gpt-4.1"},
        "agent_info": {"implementation": "llm_agent", "llm": "qwen3", "llm_args": {"temperature": 0.0}},
        "environment_info": {"domain_name": "telecom", "policy": "p" * 400, "tool_defs": None},
    },
    "tasks": [{"id": "[mobile]airplane_mode"}],
    "simulations": [RUN, {**RUN, "id": "5ad2", "trial": 1, "reward_info": None}],
}


def old_call(tool):
    return [{"function": {"arguments": '{"a": "b"}', "name": tool}, "id": "call_1", "type": "function"}]


OLD = [
    {
        "task_id": 3,
        "reward": 0.0,
        "info": {"task": {"user_id": "mia", "actions": []}, "source": "user", "user_cost": 0.003},
        "traj": [
            {"role": "system", "content": "p" * 400},
            {"role": "user", "content": "u" * 40},
            {"content": None, "role": "assistant", "tool_calls": old_call("get_user"), "function_call": None},
            {"role": "tool", "tool_call_id": "call_1", "name": "get_user", "content": "r" * 80},
            {"content": "a" * 40, "role": "assistant", "tool_calls": None, "function_call": None},
            {"role": "user", "content": "###STOP###"},
        ],
        "trial": 2,
    },
    {"task_id": 4, "reward": 0.0, "info": {"error": "timeout", "traceback": "..."}, "traj": [], "trial": 0},
]


def test_a_simulation(tmp_path):
    (item, again), tally = known_and_read(tau2, tmp_path, json.dumps(RESULTS, indent=2))
    assert (item.source, item.workload, item.model) == ("tau2", "telecom", "qwen3")
    assert (item.prompt_id, item.trial, item.reward, item.prompt_tokens) == ("[mobile]airplane_mode", 0, 1.0, 3000)
    assert (again.prompt_id, again.trial, again.reward) == (item.prompt_id, 1, None)
    first, second, third = item.steps
    assert (first.tool, first.tool_latency_s, first.gen_s) == ("find_user+find_line", 1.0, 2.5)
    assert (first.input_tokens, first.output_tokens, first.ctx_tokens, first.output_est) == (0, 40, 3000, False)
    assert (second.tool, second.tool_latency_s, second.gen_s) == ("user", 3.0, None), "with the tool that the user tried"
    assert (second.input_tokens, second.output_tokens, second.ctx_tokens) == (60, 20, 3100)
    assert (third.input_tokens, third.ctx_tokens, third.ctx_reset, third.tool, third.tool_latency_s) == (0, 3050, True, "user", 2.0)
    assert tally.known == {"context": 6, "output tokens": 6, "tool seconds": 6} and not tally.estimated and not tally.missing


def test_without_usage_the_policy_and_what_is_said_are_estimated(tmp_path):
    plain = [{key: value for key, value in one.items() if key not in ("usage", "timestamp")} for one in RUN["messages"]]
    (item,), tally = known_and_read(tau2, tmp_path, json.dumps({**RESULTS, "simulations": [{**RUN, "messages": plain}]}))
    greeting, request = len("Hi! How can I help you today?") / 4, len("My phone is dead.") / 4
    assert item.prompt_tokens == round(greeting) + round(request) + round(401 / 4), "the policy, and the line break after it"
    first, second, third = item.steps
    assert first.output_est and first.output_tokens == round(len('{"order": "1"}\n{"order": "1"}') / 4)
    assert second.input_tokens == 20, "two results of 40 characters, not the user's own"
    assert third.input_tokens == 2, "what the user says, not what he calls"
    assert [turn.tool_latency_s for turn in item.steps] == [None] * 3 and tally.missing == {"tool seconds": 3}


def test_an_agent_that_is_alone_begins_with_a_generation(tmp_path):
    opening = [said("assistant", 1, "Plan.", usage=usage(500, 9)), said("assistant", 2, tool_calls=[call("toggle")], usage=None)]
    items, _ = known_and_read(
        tau2, tmp_path, json.dumps({**RESULTS, "simulations": [{**RUN, "messages": opening[:1]}, {**RUN, "messages": opening[1:]}]})
    )
    assert [[turn.tool for turn in item.steps] for item in items] == [[None], ["toggle"]]


def test_a_voice_run_is_left_out(tmp_path):
    items, tally = known_and_read(tau2, tmp_path, json.dumps({**RESULTS, "simulations": [RUN, {**RUN, "messages": None, "ticks": []}]}))
    assert len(items) == 1 and tally.left_out == {"without messages": 1}


def test_tau_bench(tmp_path):
    (item,), tally = known_and_read(tau2, tmp_path, json.dumps(OLD, indent=2))
    assert (item.workload, item.prompt_id, item.trial, item.reward, item.model) == ("tau-bench", "3", 2, 0.0, None)
    first, second = item.steps
    assert (item.prompt_tokens, first.output_tokens, first.tool, first.ctx_tokens) == (110, round(len('{"a": "b"}') / 4), "get_user", 110)
    assert (second.input_tokens, second.output_tokens, second.tool, second.output_est) == (20, 10, "user", True)
    assert tally.left_out == {"without an assistant message": 1}


def test_tau_bench_without_tool_calls(tmp_path):
    chat = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": 'Thought:\nfind\nAction:\n{"name": "get_user", "arguments": {}}'},
        {"role": "user", "content": "API output: {}"},
        {"role": "assistant", "content": "Thought:\nfind\nAction:\nwho knows"},
        {"role": "user", "content": "API output: {}"},
        {"role": "assistant", "content": 'Action:\n{"name": "respond", "arguments": {"content": "Hi"}}'},
        {"role": "user", "content": "###STOP###"},
    ]
    (item,), _ = known_and_read(tau2, tmp_path, json.dumps([{**OLD[0], "traj": chat}]))
    assert [turn.tool for turn in item.steps] == ["get_user", "tool", "user"]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({**RESULTS, "simulations": {}}, "simulations: got dict; allowed: a list"),
        ({**RESULTS, "simulations": "many"}, "simulations: got str; allowed: a list"),
        ({**RESULTS, "simulations": [3]}, "simulations[0].messages: got NoneType; allowed: a list"),
        ({**RESULTS, "simulations": [{**RUN, "messages": "hello"}]}, "simulations[0].messages: got str"),
        ({**RESULTS, "simulations": [{**RUN, "messages": [{"role": "robot"}]}]}, "simulations[0].messages[0].role: got 'robot'"),
        ({**RESULTS, "simulations": [{**RUN, "messages": [None]}]}, "simulations[0].messages[0].role: got None"),
        ([{**OLD[0], "traj": 3}], "[0].traj: got int; allowed: a list"),
        ([*OLD, {"task_id": 1}], "[2].traj: got NoneType"),
        ([{**OLD[0], "traj": [{"role": ["user"]}]}], "[0].traj[0].role"),
        ("text", "neither JSON nor CSV"),
        (3, "neither JSON nor CSV"),
        ({}, "simulations: got NoneType"),
        ({**RESULTS, "simulations": []}, None),
        ({**RESULTS, "info": None, "tasks": 3}, None),
        ({**RESULTS, "simulations": [{**RUN, "messages": [said("assistant", 1, usage=usage(-3, float("nan")), tool_calls="find")]}]}, None),
        ({**RESULTS, "simulations": [{**RUN, "messages": [said("assistant", 1, usage=[1], tool_calls=[None, 3])]}]}, None),
        ({**RESULTS, "simulations": [{**RUN, "trial": -1, "task_id": None, "reward_info": "good"}]}, None),
        ({**RESULTS, "simulations": [{**RUN, "messages": [said("assistant", 1, generation_time_seconds=-5, timestamp="never")]}]}, None),
        ([], None),
    ],
    ids=range(19),
)
def test_what_is_odd_ends_in_a_trajectory_or_in_a_line(tmp_path, value, words):
    line = ends_well(tau2, tmp_path, json.dumps(value))
    assert line is None if words is None else words in line


def test_numbers_that_are_none_are_not_known(tmp_path):
    odd = [said("user", 1, "a"), said("assistant", 2, "b" * 40, usage=usage(-3, 1e300), generation_time_seconds=-1), said("user", 1, "c")]
    (item,), _ = known_and_read(tau2, tmp_path, json.dumps({**RESULTS, "simulations": [{**RUN, "messages": odd}]}))
    (turn,) = item.steps
    assert (turn.output_tokens, turn.output_est, turn.gen_s, turn.tool, turn.tool_latency_s) == (10, True, None, "user", None)


@given(value=wrecked(RESULTS))
def test_anything_else(value):
    with tempfile.TemporaryDirectory() as folder:
        ends_well(tau2, Path(folder), json.dumps(value))


@given(value=wrecked(OLD))
def test_anything_else_of_tau_bench(value):
    with tempfile.TemporaryDirectory() as folder:
        ends_well(tau2, Path(folder), json.dumps(value))
