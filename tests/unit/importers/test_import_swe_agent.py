"""SWE-agent's runs: what is estimated and shared out, what ran and how long; and what the files of other formats begin with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from math import nan
from typing import Any

import pytest
from hypothesis import given
from samples import lines
from wrecked import ended, known_and_read, wrecked

from verl_heddle.traces.importers import openai_chat, swe_agent
from verl_heddle.traces.importers.counting import Tally
from verl_heddle.traces.importers.document import Document


def deep() -> list[Any]:
    """Nested deeper than anybody can follow."""
    value: list[Any] = []
    for _ in range(5000):
        value = [value]
    return value


def strangers(own: Any) -> Iterator[Any]:
    """First values of the files of every other format."""
    import test_import_claude_code as claude
    import test_import_mini_swe_agent as mini
    import test_import_openai as openai
    import test_import_openhands as openhands

    found: dict[Any, list[Any]] = {
        swe_agent: [RUN, {**RUN, "trajectory": []}, {"attempts": [RUN]}],
        mini.mini_swe_agent: [mini.RUN, mini.OLD],
        openhands.openhands: [openhands.STREAM, openhands.STREAM[0], openhands.EVALUATION, openhands.SDK, openhands.SDK["history"][0]],
        claude.claude_code: [*claude.SESSION, *claude.FIRST],
        openai_chat: [openai.EPISODE, [openai.EPISODE], {"request": {"messages": openai.EPISODE["messages"]}}],
    }
    yield from (value for module, values in found.items() if module is not own for value in values)
    yield from [None, 3, "text", [], {}, [[]], [None], {"type": "user"}, {"messages": 3}, {"trajectory": "x"}, {"history": []}, {"info": 3}]
    yield {"source": "s", "workload": "w", "prompt_id": "p", "trial": 0, "prompt_tokens": 1, "steps": [], "meta": {}}


def step(action: str, response: str, observation: str, seconds: float | None = None) -> dict[str, Any]:
    timed = {} if seconds is None else {"execution_time": seconds}
    return {"action": action, "observation": observation, "response": response, "thought": response, "state": {"open_file": "n/a"}, **timed}


RUN = {
    "environment": "swe_main",
    "trajectory": [
        step("find_file a.py\n", "t" * 26 + "find_file a.py", "o" * 80, 0.28),
        step("str_replace_editor v", "u" * 19, "", 1.5),  # called as a function: the call is not in the response
        step("vim x", "v" * 35 + "vim x", "b" * 40, 0.0),  # blocked: it never ran
        step("", "w" * 40, "your output was not formatted", 0.0),
        step("submit", "w" * 34 + "submit", "diff --git", 0.5),
        {**step("", "Exit due to cost limit", "Exited (autosubmitted)", 0.0), "query": [{}]},
    ],
    "history": [
        {"role": "system", "content": "s" * 400, "agent": "main", "message_type": "system_prompt"},
        {"role": "user", "content": "d" * 40, "agent": "main", "is_demo": True},
        {"role": "assistant", "content": "d" * 40, "agent": "main", "is_demo": True},
        {"role": "user", "content": [{"type": "text", "text": "i" * 200}], "agent": "main", "message_type": "observation"},
        {"role": "assistant", "content": "t" * 26, "action": "find_file a.py", "agent": "main", "message_type": "action"},
        {"role": "user", "content": "o" * 80, "agent": "main", "message_type": "observation"},
    ],
    "info": {
        "exit_status": "submitted (exit_cost)",
        "submission": "diff --git",
        "model_stats": {"instance_cost": 0.5, "tokens_sent": 9000, "tokens_received": 125, "api_calls": 5},
    },
    "replay_config": json.dumps({"agent": {"model": {"name": "gpt-4o"}}}),
}


def told(tokens: Any) -> dict[str, Any]:
    return {**RUN, "info": {"model_stats": {"tokens_received": tokens}}}


def test_a_run(tmp_path):
    (item,), tally = known_and_read(swe_agent, tmp_path, json.dumps(RUN, indent=2), "astropy__astropy-1.2907.traj")
    assert (item.source, item.workload, item.prompt_id, item.model) == ("swe_agent", "coding", "astropy__astropy-1.2907", "gpt-4o")
    assert (item.prompt_tokens, item.reward, item.meta) == (170, None, {"truncated": True}), "system 100, demonstration 20, issue 50"
    assert [turn.tool for turn in item.steps] == ["find_file", "str_replace_editor", "vim", None, "submit"]
    assert [turn.tool_latency_s for turn in item.steps] == [0.28, 1.5, None, None, 0.5]
    assert [turn.output_tokens for turn in item.steps] == [25] * 5, "all are estimated as 10, and 125 were told"
    assert all(turn.output_est for turn in item.steps)
    assert [turn.input_tokens for turn in item.steps] == [0, 20, 0, 10, 7]
    assert [turn.ctx_tokens for turn in item.steps] == [170, 215, 240, 275, 307]
    assert not any(turn.ctx_reset for turn in item.steps)
    assert tally.known == {"total output tokens": 1, "tool seconds": 3} and tally.missing == {"tool seconds": 1}
    assert tally.left_out == {"steps not from a model": 1}


@pytest.mark.parametrize(
    ("tokens", "made"),
    [(7, [1, 1, 2, 1, 2]), (0, [10] * 5), (None, [10] * 5), (-5, [10] * 5), (nan, [10] * 5), ("125", [25] * 5), ([], [10] * 5)],
    ids=str,
)
def test_what_is_told_in_all_is_shared_out_to_the_last_token(tmp_path, tokens, made):
    (item,), _ = known_and_read(swe_agent, tmp_path, json.dumps(told(tokens)))
    assert [turn.output_tokens for turn in item.steps] == made and item.meta == {}
    assert item.steps[-1].ctx_tokens == 170 + sum(made[:-1]) + 37, "contexts have in them what was generated"


def test_with_a_tokenizer_what_is_shared_out_is_an_estimate_still():
    class Exact(Tally):
        exact = True

    (item,) = swe_agent.read([Document(RUN, "a.traj", 0)], Exact())
    assert all(turn.output_est for turn in item.steps)
    (item,) = swe_agent.read([Document(told(0), "a.traj", 0)], Exact())
    assert not any(turn.output_est for turn in item.steps)


def test_a_prompt_out_of_the_first_query(tmp_path):
    asked = [{"role": "system", "content": "s" * 40}, {"role": "user", "content": "u" * 40}]
    for key, said in (("query", asked), ("messages", [*asked, {"role": "assistant", "content": "a" * 400}])):
        run = {"trajectory": [{**step("ls", "ls", "x"), key: said}], "environment": "e"}
        (item,), _ = known_and_read(swe_agent, tmp_path, json.dumps(run))
        assert item.prompt_tokens == 20, key


def test_attempts_are_trajectories(tmp_path):
    second = {**RUN, "trajectory": RUN["trajectory"][:1], "info": {}}
    whole = {"attempts": [RUN, second], **RUN, "info": {"model_stats": {"tokens_received": 10**6}}, "instance_id": "i"}
    items, _ = known_and_read(swe_agent, tmp_path, json.dumps(whole))
    assert [(item.prompt_id, len(item.steps), item.output_tokens) for item in items] == [("i", 5, 125), ("i", 1, 10)]
    assert swe_agent.knows({"attempts": [RUN]})


@pytest.mark.parametrize(
    ("action", "called"),
    [
        ("ls -F", "ls"),
        ("./rock\n", "rock"),
        ("/usr/bin/python3.11 -m x", "python3.11"),
        ("TOKEN=hunter2 curl x", None),
        ("c" * 65, None),
        ("größe", None),
        ("", None),
        (" \n", None),
        ("a\nb", "a"),
    ],
)
def test_the_name_of_a_command_is_a_name_and_nothing_more(action, called):
    assert swe_agent.command_name(action) == called


@pytest.mark.parametrize(
    ("file", "stem"),
    [("a/b__c-1.traj", "b__c-1"), ("b-1.2.traj.json", "b-1.2"), ("b.traj.gz", "b"), ("output.jsonl.gz", "output"), (".traj", "")],
)
def test_the_stem_of_a_file(file, stem):
    assert swe_agent.stem(file) == stem


def test_a_file_without_a_stem_is_told_by_its_prompt(tmp_path):
    (item,), _ = known_and_read(swe_agent, tmp_path, json.dumps(RUN), ".traj")
    assert len(item.prompt_id) == 16, "a digest"


def test_other_formats_are_not_known():
    assert not [value for value in strangers(swe_agent) if swe_agent.knows(value) is not False]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (3, "trajectory: got NoneType; allowed: a list of steps"),
        ({"trajectory": "steps"}, "trajectory: got str"),
        ({"trajectory": [3]}, "trajectory[0]: got int; allowed: a step"),
        ({"attempts": [RUN, {"trajectory": 3}]}, "attempts[1].trajectory: got int"),
    ],
    ids=range(4),
)
def test_what_cannot_be_read_ends_in_a_line(value, words):
    assert words in (ended(swe_agent, RUN, value) or "") and "file.jsonl:2" in (ended(swe_agent, RUN, value) or "")


@pytest.mark.parametrize("value", [None, 3, nan, "text", [], {}])
def test_odd_attempts_and_queries_are_none(value):
    assert ended(swe_agent, {**RUN, "attempts": value}) is None
    assert ended(swe_agent, {"trajectory": [{**RUN["trajectory"][0], "query": value, "messages": value}]}) is None


@pytest.mark.parametrize("key", ["history", "info", "replay_config", "environment"])
@pytest.mark.parametrize("value", [None, 3, nan, "text", [], {}, [3], [None], "{", "[" * 10_000])
def test_what_is_odd_or_missing_costs_only_itself(key, value):
    assert ended(swe_agent, {**RUN, key: value}) is None
    assert ended(swe_agent, {one: RUN[one] for one in RUN if one != key}) is None


def test_a_run_without_steps_is_left_out(tmp_path):
    items, tally = known_and_read(swe_agent, tmp_path, lines({**RUN, "trajectory": []}))
    assert items == [] and tally.left_out == {"without an assistant message": 1}


@given(wrecked([RUN, {"attempts": [RUN]}]))
def test_nothing_else_is_raised(values):
    ended(swe_agent, *values)
