"""OpenHands: streams of events, evaluations, events of the SDK; one message a response, and its results."""

from __future__ import annotations

import json
from math import nan

import pytest
from hypothesis import given
from samples import lines
from test_import_swe_agent import strangers
from wrecked import ended, known_and_read, wrecked

from verl_heddle.traces.importers import openhands


def at(seconds):
    return f"2025-04-30T16:32:{seconds:09.6f}"


def response(key, read, made, content, *calls):
    asked = [{"index": 1, "id": f"toolu_{name}", "type": "function", "function": {"name": name, "arguments": said}} for name, said in calls]
    return {
        "id": key,
        "created": 1746001974,
        "model": "meta-llama/llama-4-maverick",
        "object": "chat.completion",
        "choices": [{"finish_reason": "stop", "index": 0, "message": {"content": content, "role": "assistant", "tool_calls": asked}}],
        "usage": {"completion_tokens": made, "prompt_tokens": read, "total_tokens": read + made} if read else None,
    }


def metadata(said, name):
    return {"function_name": name, "tool_call_id": f"toolu_{name}", "model_response": said, "total_calls_in_response": 1}


def does(number, second, action, args, **more):
    return {"id": number, "timestamp": at(second), "source": "agent", "message": "", "action": action, **more, "args": args}


def sees(number, second, observation, content, source="agent", **more):
    return {
        "id": number,
        "timestamp": at(second),
        "source": source,
        "message": "",
        "cause": number - 1,
        "observation": observation,
        **more,
        "content": content,
        "extras": {},
    }


BOTH = response("gen-1", 5920, 128, "c" * 40, ("execute_bash", "a" * 40), ("str_replace_editor", "b" * 40))
LATER = response("gen-2", 0, 0, "c" * 10, ("execute_bash", "a" * 29))
USED = {"accumulated_cost": 0.0, "accumulated_token_usage": {"prompt_tokens": 5920, "completion_tokens": 128}, "token_usages": []}
STREAM = [
    does(0, 1, "system", {"content": "s" * 400, "tools": [{"type": "function"}], "openhands_version": "0.35.0"}),
    {"id": 1, "timestamp": at(1.5), "source": "user", "message": "", "action": "message", "args": {"content": "t" * 200}},
    {"id": 2, "timestamp": at(1.6), "source": "user", "message": "", "action": "recall", "args": {"query": "t" * 200}},
    sees(3, 1.7, "recall", "Added workspace context", "environment") | {"extras": {"microagent_knowledge": [{"content": "k" * 17}]}},
    sees(4, 1.8, "agent_state_changed", "running", "environment"),
    does(5, 5, "run", {"command": "ls", "thought": "c"}, tool_call_metadata=metadata(BOTH, "execute_bash"), llm_metrics=USED),
    sees(6, 7, "run", "o" * 40, tool_call_metadata=metadata(BOTH, "execute_bash")),
    does(7, 7.1, "edit", {"path": "a"}, tool_call_metadata=metadata(BOTH, "str_replace_editor"), llm_metrics=USED),
    sees(8, 7.5, "edit", "o" * 40, tool_call_metadata=metadata(BOTH, "str_replace_editor")),
    does(9, 8, "condensation", {"forgotten_event_ids": [1], "summary": "s"}),
    does(10, 10, "think", {"thought": "h" * 36}, timeout=3),
    sees(11, nan, "think", "logged", source="agent"),
    does(12, 12, "run", {"command": "x"}, tool_call_metadata=metadata(LATER, "execute_bash")),
    sees(13, 13, "error", "e" * 40, source="environment"),
    does(14, 20, "message", {"content": "m" * 40, "wait_for_response": True}),
    sees(15, 20.1, "null", "", "agent"),
    {"id": 16, "timestamp": at(50), "source": "user", "message": "", "action": "message", "args": {"content": "g" * 20}},
    does(17, 55, "finish", {"final_thought": "f" * 20, "task_completed": "true", "outputs": {}}),
]
STREAM[11] = STREAM[11] | {"timestamp": None}

EVALUATION = {
    "instance_id": "ponylang__ponyc-4595",
    "test_result": {"git_patch": "diff", "report": {"resolved": True, "error_eval": False}},
    "instruction": "t",
    "metadata": {"agent_class": "CodeActAgent", "llm_config": {"model": "openai/llama-4"}, "max_iterations": 50},
    "history": STREAM,
    "metrics": {
        "accumulated_cost": 0.0,
        "token_usages": [
            {"model": "m", "prompt_tokens": 5920, "completion_tokens": 128, "response_id": "gen-1"},
            {"model": "m", "prompt_tokens": 900, "completion_tokens": 33, "response_id": "gen-2"},
        ],
    },
    "error": None,
}


def acts(second, name, arguments, key, thought=""):
    said = [{"type": "text", "text": thought}] if thought else []
    return {
        "id": f"act-{second}",
        "timestamp": at(second),
        "source": "agent",
        "thought": said,
        "thinking_blocks": [],
        "action": {"kind": "TerminalAction", "command": "ls"},
        "tool_name": name,
        "tool_call_id": f"toolu_{second}",
        "tool_call": {"id": f"toolu_{second}", "name": name, "arguments": arguments, "origin": "completion"},
        "llm_response_id": key,
        "kind": "ActionEvent",
    }


def result(second, name, content):
    return {
        "id": f"obs-{second}",
        "timestamp": at(second),
        "source": "environment",
        "tool_name": name,
        "tool_call_id": "toolu",
        "observation": {"content": [{"type": "text", "text": content}], "exit_code": 0, "kind": "TerminalObservation"},
        "action_id": "act",
        "kind": "ObservationEvent",
    }


SDK = {
    "instance_id": "i-1",
    "attempt": 1,
    "test_result": {"git_patch": ""},
    "metadata": {"llm": {"model": "litellm_proxy/m"}},
    "history": [
        {
            "id": "e0",
            "timestamp": at(0),
            "source": "agent",
            "system_prompt": {"type": "text", "text": "s" * 400},
            "dynamic_context": {"type": "text", "text": "d" * 39},
            "tools": [{"title": "x" * 9}],
            "kind": "SystemPromptEvent",
        },
        {
            "id": "e1",
            "timestamp": at(1),
            "source": "user",
            "llm_message": {"role": "user", "content": [{"type": "text", "text": "t" * 200}]},
            "extended_content": [{"type": "text", "text": "k" * 39}],
            "kind": "MessageEvent",
        },
        {"id": "e2", "timestamp": at(1), "source": "environment", "key": "execution_status", "kind": "ConversationStateUpdateEvent"},
        acts(5, "terminal", "a" * 40, "r-1", "t" * 40),
        acts(5.2, "file_editor", "a" * 39, "r-1"),
        result(6, "terminal", "o" * 40),
        {
            "id": "e3",
            "timestamp": at(9),
            "source": "agent",
            "error": "e" * 40,
            "tool_name": "x",
            "tool_call_id": "y",
            "kind": "AgentErrorEvent",
        },
        {"id": "e4", "timestamp": at(10), "source": "environment", "forgotten_event_ids": ["a"], "summary": "s", "kind": "Condensation"},
        {
            "id": "e5",
            "timestamp": at(12),
            "source": "agent",
            "llm_message": {"role": "assistant", "content": [{"type": "text", "text": "m" * 40}]},
            "llm_response_id": "r-2",
            "kind": "MessageEvent",
        },
        {
            "id": "e6",
            "timestamp": at(15),
            "source": "user",
            "llm_message": {"role": "user", "content": [{"type": "text", "text": "g" * 20}]},
            "kind": "MessageEvent",
        },
        acts(20, "finish", "a" * 40, "r-3"),
        result(20.1, "finish", "bye"),
    ],
    "metrics": {"token_usages": [{"prompt_tokens": 300, "completion_tokens": 40, "response_id": "r-2"}]},
}


def test_a_stream_of_events(tmp_path):
    for number, content in enumerate((json.dumps(STREAM), lines(*STREAM), lines({"trajectory": STREAM}))):
        (item,), tally = known_and_read(openhands, tmp_path, content)
        assert (item.source, item.workload, item.model) == ("openhands", "coding", "meta-llama/llama-4-maverick"), number
        assert (len(item.prompt_id), item.prompt_tokens, item.reward, item.meta) == (16, 5920, None, {})
        assert [turn.tool for turn in item.steps] == ["execute_bash+str_replace_editor", "think", "execute_bash", "user", None]
        assert [turn.tool_latency_s for turn in item.steps] == [2.5, None, 1.0, 30.0, None], "one after the other, from the message on"
        assert [turn.output_tokens for turn in item.steps] == [128, 9, 10, 10, 5]
        assert [turn.output_est for turn in item.steps] == [False, True, True, True, True]
        assert [turn.input_tokens for turn in item.steps] == [0, 20, 2, 10, 5]
        assert [turn.ctx_tokens for turn in item.steps] == [5920, 6068, 6079, 6099, 6114]
        assert tally.missing == {"tool seconds": 1}


def test_an_evaluation(tmp_path):
    failed = {**EVALUATION, "test_result": {}, "report": {"resolved": False}, "instance_id": "other"}
    ill = {**EVALUATION, "history": None, "error": "it crashed"}
    items, tally = known_and_read(openhands, tmp_path, lines(EVALUATION, failed, ill))
    assert [(item.prompt_id, item.reward, item.model) for item in items] == [
        ("ponylang__ponyc-4595", 1.0, "openai/llama-4"),
        ("other", 0.0, "openai/llama-4"),
    ]
    third = items[0].steps[2]
    assert (third.ctx_tokens, third.ctx_reset, third.output_tokens, third.output_est) == (900, True, 33, False), "told under its id"
    assert items[0].steps[3].ctx_tokens == 943, "and what followed"
    assert tally.left_out == {"without an assistant message": 1}
    assert openhands.knows(ill), "also if it comes first"


def test_without_usage_the_texts_are_counted(tmp_path):
    plain = [event | {"tool_call_metadata": None, "llm_metrics": None} for event in STREAM]
    (item,), _ = known_and_read(openhands, tmp_path, json.dumps(plain))
    assert item.prompt_tokens == 100 + 50 + 10 + 5, "system, task, context and the tools' schemas"
    assert [turn.tool for turn in item.steps] == ["run", "edit", "think", "run", "user", None]


def test_usage_is_the_growth_of_what_was_used(tmp_path):
    def used(read, made):
        return {"llm_metrics": {"accumulated_token_usage": {"prompt_tokens": read, "completion_tokens": made}}}

    events = [
        STREAM[1],
        does(2, 2, "message", {"content": "a"}, **used(100, 10)),
        STREAM[16],
        does(3, 3, "message", {"content": "a"}, **used(250, 30)),
        STREAM[16],
        does(4, 4, "message", {"content": "a" * 8}),
        STREAM[16],
        does(5, 5, "message", {"content": "a" * 8}, **used(900, 90)),
    ]
    (item,), _ = known_and_read(openhands, tmp_path, json.dumps(events))
    assert [(turn.ctx_tokens, turn.output_tokens, turn.output_est) for turn in item.steps] == [
        (100, 10, False),
        (150, 20, False),
        (175, 2, True),
        (182, 2, True),
    ], "after an event that does not say, the growth is not one message's"


def test_old_outputs_pair_actions_with_observations(tmp_path):
    paired = {**EVALUATION, "history": [[STREAM[1], STREAM[3]], [STREAM[5], STREAM[6]], [STREAM[12], STREAM[13]]]}
    (item,), _ = known_and_read(openhands, tmp_path, lines(paired))
    assert [(turn.tool, turn.tool_latency_s) for turn in item.steps] == [("execute_bash", 2.0), ("execute_bash", 1.0)]


def test_events_of_the_sdk(tmp_path):
    for content in (lines(SDK), json.dumps([SDK])):
        (item,), _ = known_and_read(openhands, tmp_path, content)
        assert (item.prompt_id, item.model, item.reward) == ("i-1", "litellm_proxy/m", None)
        assert item.prompt_tokens == 110 + 60 + 6, "system, task with what goes with it, and the tools"
        assert [turn.tool for turn in item.steps] == ["terminal+file_editor", "user", None]
        assert [turn.tool_latency_s for turn in item.steps] == [4.0, 3.0, None]
        assert [(turn.output_tokens, turn.output_est) for turn in item.steps] == [(30, True), (40, False), (10, True)]
        assert [(turn.ctx_tokens, turn.input_tokens) for turn in item.steps] == [(176, 0), (300, 94), (345, 5)]
    (item,), _ = known_and_read(openhands, tmp_path, lines(*SDK["history"]))
    assert (item.prompt_tokens, len(item.steps)) == (176, 3) and item.steps[1].ctx_tokens == 176 + 30 + 20
    assert all(openhands.knows(event) for event in SDK["history"][:4]), "every event may come first"


def test_what_the_program_says_is_no_person(tmp_path):
    user, agent = SDK["history"][1], SDK["history"][8] | {"llm_response_id": None}
    (item,), _ = known_and_read(
        openhands, tmp_path, lines(user, agent, user | {"source": "environment", "timestamp": at(14)}, agent, user, agent)
    )
    assert [turn.tool for turn in item.steps] == [None, "user", None]


def test_a_response_without_usage_is_counted_once(tmp_path):
    both = response("gen-1", 0, 0, "c" * 40, ("execute_bash", "a" * 40), ("str_replace_editor", "b" * 40))
    events = [STREAM[1]] + [event | {"tool_call_metadata": metadata(both, "x"), "llm_metrics": None} for event in STREAM[5:9]]
    (item,), _ = known_and_read(openhands, tmp_path, json.dumps(events))
    assert [(turn.tool, turn.output_tokens) for turn in item.steps] == [("x+x", 30)], "122 characters"


def test_odd_usages_are_none():
    for usages in (3, [3], [None], [{"response_id": ["gen-1"]}], {"gen-1": 3}):
        assert ended(openhands, {**EVALUATION, "metrics": {"token_usages": usages}}) is None


def test_other_formats_are_not_known():
    assert not [value for value in strangers(openhands) if openhands.knows(value) is not False]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (3, "got int; allowed: an event, a list of events"),
        ("text", "got str"),
        ({"history": "events"}, "history: got str; allowed: a list of events"),
        ({"history": [STREAM[0], 3]}, "history[1]: got int; allowed: an event"),
        ([{"history": [[3]]}], "[0].history[0]: got int"),
        ([STREAM[0], None], "[1]: got NoneType"),
    ],
    ids=range(6),
)
def test_what_cannot_be_read_ends_in_a_line(value, words):
    line = ended(openhands, EVALUATION, value) or ""
    assert words in line and "file.jsonl:2" in line


@pytest.mark.parametrize("key", ["tool_call_metadata", "llm_metrics", "args", "content", "extras", "timestamp", "source", "action"])
@pytest.mark.parametrize(
    "value", [None, 3, nan, "text", [], {}, [3], {"model_response": "x"}, {"model_response": {"choices": [3], "usage": []}}]
)
def test_what_is_odd_costs_only_itself(key, value):
    assert ended(openhands, {**EVALUATION, "history": [{**event, key: value} for event in STREAM]}) is None
    assert ended(openhands, {**EVALUATION, "metrics": value, "metadata": value, "report": value}) is None


@given(wrecked([EVALUATION, SDK]))
def test_no_evaluation_raises_anything_else(values):
    ended(openhands, *values)


@given(wrecked(STREAM))
def test_no_stream_raises_anything_else(values):
    ended(openhands, *values)
    ended(openhands, values)
