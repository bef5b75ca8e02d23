"""Session logs of Claude Code: pieces of a message, results between them, sub-agents, compaction."""

from __future__ import annotations

from math import nan

import pytest
from hypothesis import given
from samples import lines
from test_import_swe_agent import strangers
from wrecked import ended, known_and_read, wrecked

from verl_heddle.traces.importers import claude_code

SESSION_ID = "f601a187-ac89-4568-9328-c564f9f0d455"


def line(number, kind, message=None, second=None, **more):
    return {
        "parentUuid": f"u{number - 1}" if number else None,
        "isSidechain": False,
        "userType": "external",
        "cwd": "/work",
        "sessionId": SESSION_ID,
        "version": "2.0.33",
        "gitBranch": "main",
        "type": kind,
        **({} if message is None else {"message": message}),
        "uuid": f"u{number}",
        **({} if second is None else {"timestamp": f"2025-11-19T21:24:{second:06.3f}Z"}),
        **more,
    }


def usage(new, written, read, made):
    return {
        "input_tokens": new,
        "cache_creation_input_tokens": written,
        "cache_read_input_tokens": read,
        "output_tokens": made,
        "service_tier": "standard",
    }


def says(key, block, used=None, stop=None):
    return {
        "model": "claude-sonnet-4-5",
        "id": key,
        "type": "message",
        "role": "assistant",
        "content": [block],
        "stop_reason": stop,
        "stop_sequence": None,
        **({} if used is None else {"usage": used}),
    }


def calls(key, name):
    return {"type": "tool_use", "id": key, "name": name, "input": {"content": "i" * 21}}


def gives(key, content):
    return {"role": "user", "content": [{"tool_use_id": key, "type": "tool_result", "content": content}]}


def text(said):
    return {"type": "text", "text": said}


FIRST = [
    {"type": "summary", "summary": "Fixing it", "leafUuid": "7f3c9d2e"},
    {"type": "file-history-snapshot", "messageId": "4cd88dd4", "snapshot": {"messageId": "4cd88dd4"}, "isSnapshotUpdate": False},
    {"type": "queue-operation", "operation": "enqueue", "sessionId": SESSION_ID, "timestamp": "2025-11-19T21:24:00.000Z"},
    {"type": "system", "subtype": "init", "sessionId": SESSION_ID, "uuid": "u"},
]

SESSION = [
    *FIRST[:3],
    line(0, "user", {"role": "user", "content": "fix it"}, 1, isMeta=True),
    line(1, "assistant", says("msg_1", {"type": "thinking", "thinking": "t" * 9, "signature": "s" * 400}, usage(4, 3000, 1000, 2)), 4),
    line(2, "assistant", says("msg_1", text("l" * 9), usage(4, 3000, 1000, 2)), 5),
    line(3, "assistant", says("msg_1", calls("toolu_1", "Bash"), usage(4, 3000, 1000, 2)), 6),
    line(4, "user", gives("toolu_1", "r" * 40), 9, toolUseResult={"stdout": "r" * 40, "stderr": "", "interrupted": False}),
    line(5, "assistant", says("msg_1", calls("toolu_2", "Task"), usage(4, 3000, 1000, 150), "tool_use"), 10),
    line(6, "progress", data={"type": "hook"}),
    line(7, "user", {"role": "user", "content": "look there"}, 11, isSidechain=True, agentId="a1b2", parentUuid=None),
    line(8, "assistant", says("msg_s", calls("toolu_s", "Read"), usage(3, 500, 0, 20), "tool_use"), 12, isSidechain=True, agentId="a1b2"),
    line(9, "user", gives("toolu_s", [text("r" * 40), {"type": "image", "source": {"data": "x"}}]), 13, isSidechain=True, agentId="a1b2"),
    line(10, "assistant", says("msg_e", text("found"), usage(1, 60, 500, 5), "end_turn"), 14, isSidechain=True, agentId="a1b2"),
    line(23, "assistant", says("msg_e", text("it")), 14, isSidechain=True, agentId="a1b2"),
    line(11, "user", gives("toolu_2", [text("found")]), 12),
    line(12, "assistant", says("msg_2", text("=" * 400), usage(1, 200, 4004, 30), "end_turn"), 20),
    line(13, "system", subtype="turn_duration"),
    line(
        14, "user", {"role": "user", "content": [text("g" * 20), {"type": "image", "source": {"type": "base64", "data": "x" * 9000}}]}, 50
    ),
    line(15, "assistant", says("api", text("No response requested."), usage(0, 0, 0, 0)) | {"model": "<synthetic>"}, 51),
    line(22, "assistant", says("api", text("API Error"), usage(0, 0, 0, 0)), 51, isApiErrorMessage=True),
    line(16, "assistant", says("msg_3", calls("toolu_3", "Write"), usage(9, 40, 4205, 1)), 52),
    line(17, "user", gives("toolu_3", "ok")),
    line(18, "system", subtype="compact_boundary", compactMetadata={"trigger": "auto", "preTokens": 4255}),
    line(19, "user", {"role": "user", "content": "This session is being continued"}, 57, isCompactSummary=True),
    line(20, "assistant", says("msg_4", text("going on"), usage(0, 1200, 300, 40), "end_turn"), 58),
    line(16, "assistant", says("msg_3", calls("toolu_3", "Write"), usage(9, 40, 4205, 1)), 52),  # a session that was resumed
    line(21, "attachment", {"role": "user", "content": "x"}, 59),
]


def test_a_session(tmp_path):
    (item, _), tally = known_and_read(claude_code, tmp_path, lines(*SESSION))
    assert (item.source, item.workload, item.prompt_id, item.meta) == ("claude_code", "coding", SESSION_ID, {})
    assert (item.model, item.prompt_tokens, item.reward) == ("claude-sonnet-4-5", 4004, None)
    assert [turn.tool for turn in item.steps] == ["Bash+Task", "user", "Write", None]
    assert [turn.tool_latency_s for turn in item.steps] == [3.0, 30.0, None, None], "Bash began before the message had ended, Task took 2 s"
    assert [turn.output_tokens for turn in item.steps] == [150, 30, 9, 40]
    assert [turn.output_est for turn in item.steps] == [False, False, True, False], "1 is the count of a message that just began"
    assert [turn.ctx_tokens for turn in item.steps] == [4004, 4205, 4254, 1500]
    assert [turn.input_tokens for turn in item.steps] == [0, 51, 19, 0]
    assert [turn.ctx_reset for turn in item.steps] == [False, False, False, True], "it was compacted"
    assert tally.left_out == {"unknown message type": 1, "assistant messages not from a model": 2}


def test_a_sub_agent(tmp_path):
    (_, item), _ = known_and_read(claude_code, tmp_path, lines(*SESSION))
    assert (item.prompt_id, item.meta, item.prompt_tokens) == (f"{SESSION_ID}:a1b2", {"parent": SESSION_ID}, 503)
    assert [(turn.tool, turn.tool_latency_s, turn.ctx_tokens, turn.output_tokens) for turn in item.steps] == [
        ("Read", 1.0, 503, 20),
        (None, None, 561, 5),
    ]


def test_sub_agents_without_a_name_are_told_apart_by_their_beginning(tmp_path):
    def side(number, parent, message, kind="assistant"):
        return line(number, kind, message, isSidechain=True, parentUuid=parent)

    log = [
        line(0, "user", {"role": "user", "content": "go"}),
        line(1, "assistant", says("m", calls("t", "Task"))),
        side(10, None, {"role": "user", "content": "a"}, "user"),
        side(20, None, {"role": "user", "content": "b"}, "user"),
        side(21, "u20", says("m2", text("x" * 40))),
        side(11, "u10", says("m1", text("x" * 20))),
        side(12, "u11", {"role": "user", "content": "again"}, "user"),
        side(13, "u12", says("m3", text("x" * 8))),
    ]
    items, _ = known_and_read(claude_code, tmp_path, lines(*log))
    assert [(item.prompt_id, [turn.output_tokens for turn in item.steps]) for item in items] == [
        (SESSION_ID, [9]),
        (f"{SESSION_ID}:u10", [5, 2]),
        (f"{SESSION_ID}:u20", [10]),
    ]


def test_the_file_of_a_sub_agent(tmp_path):
    (item,), _ = known_and_read(claude_code, tmp_path, lines(*(one for one in SESSION if one.get("agentId"))))
    assert (item.prompt_id, item.meta) == (f"{SESSION_ID}:a1b2", {"parent": SESSION_ID})


def test_without_usage_and_times_the_texts_are_counted(tmp_path):
    picture = {"type": "image", "source": {"type": "base64", "data": "x" * 9000}}
    log = [
        line(0, "user", {"role": "user", "content": [text("q" * 40), picture]}),
        line(1, "assistant", {"role": "assistant", "content": [text("a" * 22), calls("t1", "Bash"), calls("t2", "Bash")]}),
        line(
            2,
            "user",
            {"role": "user", "content": [gives("t1", "r" * 20)["content"][0], gives("t2", [text("r" * 20), picture])["content"][0]]},
        ),
        line(3, "user", {"role": "user", "content": "[Request interrupted by user]"}),
        line(4, "assistant", {"role": "assistant", "content": "b" * 40}),
        line(5, "user", {"role": "user", "content": []}),
        line(6, "assistant", {"role": "assistant", "content": "c" * 40}),
    ]
    (item,), tally = known_and_read(claude_code, tmp_path, lines(*log))
    assert [turn.tool for turn in item.steps] == ["Bash+Bash", None, None], "messages without an id are messages of their own"
    assert (item.prompt_tokens, [turn.output_tokens for turn in item.steps]) == (10, [24, 10, 10]), (
        "22 + 2 x 36 characters of input and 2 breaks"
    )
    assert [turn.input_tokens for turn in item.steps] == [0, 17, 0] and all(turn.output_est for turn in item.steps)
    assert tally.missing == {"tool seconds": 1} and item.model is None


def test_a_session_without_an_id_is_told_by_its_prompt(tmp_path):
    log = [{key: value for key, value in one.items() if key != "sessionId"} for one in SESSION[3:]]
    items, _ = known_and_read(claude_code, tmp_path, lines(*log))
    assert len(items[0].prompt_id) == 16 and (items[1].prompt_id, items[1].meta) == ("a1b2", {})


def test_every_line_may_come_first():
    assert all(claude_code.knows(value) for value in [*FIRST, *SESSION[:4], SESSION[4]])


def test_other_formats_are_not_known():
    assert not [value for value in strangers(claude_code) if claude_code.knows(value) is not False]
    for value in (
        {"timestamp": "2025", "type": "session_meta", "payload": {"id": "x"}, "sessionId": "x"},
        {"sessionId": "x", "messageId": 0, "type": "user", "message": "hello"},
        {"sessionId": "x", "messageId": 0, "type": "info", "message": "hello"},
        {"type": "message", "id": "x"},
    ):
        assert not claude_code.knows(value), value


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (3, "got int; allowed: an event"),
        ([], "got list"),
        (line(1, "user", "hello"), "message: got str; allowed: a message"),
        (line(1, "assistant"), "message: got NoneType"),
    ],
    ids=range(4),
)
def test_what_cannot_be_read_ends_in_a_line(value, words):
    report = ended(claude_code, SESSION[3], value) or ""
    assert words in report and "file.jsonl:2" in report


ODD = [
    None,
    3,
    nan,
    "text",
    [],
    {},
    [3],
    [None],
    {"output_tokens": nan, "input_tokens": "many"},
    [{"type": "tool_use", "id": ["x"], "name": []}],
]


@pytest.mark.parametrize("value", ODD, ids=range(len(ODD)))
@pytest.mark.parametrize("key", ["uuid", "parentUuid", "timestamp", "sessionId", "isSidechain", "agentId", "type", "requestId"])
def test_what_is_odd_costs_only_itself(key, value):
    assert ended(claude_code, *({**one, key: value} for one in SESSION)) is None


@pytest.mark.parametrize("value", ODD, ids=range(len(ODD)))
@pytest.mark.parametrize("key", ["id", "usage", "content", "model", "stop_reason"])
def test_what_is_odd_in_a_message_costs_only_itself(key, value):
    assert ended(claude_code, *({**one, "message": {**one["message"], key: value}} for one in SESSION if "message" in one)) is None


@given(wrecked(SESSION))
def test_nothing_else_is_raised(values):
    ended(claude_code, *values)
