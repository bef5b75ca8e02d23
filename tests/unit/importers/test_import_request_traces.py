"""Traces of requests: what a row says, that many of them take no memory; and that every importer knows its own files only."""

from __future__ import annotations

import json
import tempfile
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from samples import lines
from test_import_inspect import LOG
from test_import_openai import EPISODE
from test_import_tau2 import OLD, RESULTS
from test_import_verl_dump import ROW
from test_import_weave import ANTHROPIC, CALLS
from wrecked import JSON, ends_well, known_and_read, wrecked

from verl_heddle.traces.importers import inspect_log, openai_chat, request_traces, tau2, verl_dump, weave
from verl_heddle.traces.importers.counting import Tally
from verl_heddle.traces.importers.document import Document

MOONCAKE = [
    {"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47]},
    {"timestamp": 27482, "input_length": 6472, "output_length": 0, "hash_ids": [46]},
    {"timestamp": 30535, "input_length": 0, "output_length": 26, "hash_ids": []},
]
AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens\r
2023-11-16 18:15:46.6805900,374,44\r
2023-11-16 18:15:50.9951690,396,109\r
"""
AZURE_2024 = """TIMESTAMP,ContextTokens,GeneratedTokens
2024-05-10 00:00:00.009930+00:00,2162,5
2024-05-10 00:00:00.509930+00:00,2399,6
"""
BURSTGPT = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45.5,GPT-4,1087,0,1087,API log
118,GPT-4,417,276,693,API log
"""
BURSTGPT_2 = """Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type
5,7,3.5,ChatGPT,472,18,490,Conversation log
"""
VLLM = {
    "date": "20260101-000000",
    "endpoint_type": "openai",
    "model_id": "Qwen/Qwen3-8B",
    "num_prompts": 4,
    "request_rate": "inf",
    "duration": 9.5,
    "completed": 3,
    "input_lens": [100, 200, 300, 400],
    "output_lens": [3, 1, 0, 4],
    "ttfts": [0.5, 0.25, 0.0, 0.0],
    "itls": [[0.25, 0.5], [], [], []],
    "start_times": [1001.5, 1000.0, 1003.0, 1004.25],
    "generated_texts": ["a b c", "a", "", "abcd"],
    "errors": ["", "", "refused", ""],
}


def told(items):
    return [(item.workload, item.prompt_id, item.prompt_tokens, item.output_tokens, item.model, item.meta) for item in items]


def test_mooncake(tmp_path):
    items, tally = known_and_read(request_traces, tmp_path, lines(*MOONCAKE), "trace.jsonl")
    assert told(items) == [
        ("mooncake", "request-0", 6955, 52, None, {"arrival_s": 0.0}),
        ("mooncake", "request-2", 0, 26, None, {"arrival_s": 3.053}),
    ]
    (turn,) = items[0].steps
    assert (turn.input_tokens, turn.ctx_tokens, turn.output_est, turn.tool, turn.gen_s) == (0, 6955, False, None, None)
    assert tally.left_out == {"without output": 1} and tally.known == {"context": 2, "output tokens": 2}


def test_azure(tmp_path):
    items, _ = known_and_read(request_traces, tmp_path, AZURE, "code.csv")
    assert told(items) == [
        ("azure", "request-0", 374, 44, None, {"arrival_s": 0.0}),
        ("azure", "request-1", 396, 109, None, {"arrival_s": 4.314579}),
    ]
    items, _ = known_and_read(request_traces, tmp_path, AZURE_2024, "conv.csv")
    assert told(items)[1] == ("azure", "request-1", 2399, 6, None, {"arrival_s": 0.5})


def test_burstgpt(tmp_path):
    items, tally = known_and_read(request_traces, tmp_path, BURSTGPT, "BurstGPT_1.csv")
    assert told(items) == [
        ("burstgpt", "request-0", 472, 18, "ChatGPT", {"arrival_s": 0.0}),
        ("burstgpt", "request-2", 417, 276, "GPT-4", {"arrival_s": 113.0}),
    ]
    assert tally.left_out == {"without output": 1}
    assert told(known_and_read(request_traces, tmp_path, BURSTGPT_2)[0])[0][:4] == ("burstgpt", "request-0", 472, 18)


def test_vllm(tmp_path):
    items, tally = known_and_read(request_traces, tmp_path, json.dumps(VLLM), "vllm.json")
    assert told(items) == [
        ("vllm-bench", "request-0", 100, 3, "Qwen/Qwen3-8B", {"arrival_s": 1.5}),
        ("vllm-bench", "request-1", 200, 1, "Qwen/Qwen3-8B", {"arrival_s": 0.0}),
        ("vllm-bench", "request-3", 400, 4, "Qwen/Qwen3-8B", {"arrival_s": 4.25}),
    ]
    assert [item.steps[0].gen_s for item in items] == [1.25, 0.25, None], "a 0 is an answer that was not streamed"
    assert tally.left_out == {"without output": 1}


def test_vllm_of_several_runs_and_without_times(tmp_path):
    bare = {key: VLLM[key] for key in ("input_lens", "output_lens")}
    items, _ = known_and_read(request_traces, tmp_path, lines(VLLM, bare))
    assert told(items)[3] == ("vllm-bench", "request-4", 100, 3, None, {}) and items[3].steps[0].gen_s is None


def test_times_that_are_none_are_not_known(tmp_path):
    rows = [{**MOONCAKE[0], "timestamp": when} for when in ("late", 1000, None, 500, float("nan"), 1e300)]
    items, _ = known_and_read(request_traces, tmp_path, lines(*rows))
    assert [item.meta.get("arrival_s") for item in items] == [None, 0.0, None, -0.5, None, None], "from the first that is known"


def test_a_trace_may_begin_at_0(tmp_path):
    items, _ = known_and_read(request_traces, tmp_path, lines(*({**MOONCAKE[0], "timestamp": when} for when in (0, 3000, 4000))))
    assert [item.meta["arrival_s"] for item in items] == [0.0, 3.0, 4.0]


def test_a_million_rows_are_read_one_at_a_time():
    rows = (Document({"timestamp": number, "input_length": 9, "output_length": 1, "hash_ids": []}, "f", number) for number in range(50_000))
    tracemalloc.start()
    try:
        assert sum(1 for _ in request_traces.read(rows, Tally())) == 50_000
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1e6


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (lines(MOONCAKE[0], {"timestamp": 1}), ":2: input_length: got NoneType; allowed: a whole number of tokens"),
        (lines(MOONCAKE[0], {**MOONCAKE[0], "input_length": -1}), ":2: input_length: got -1"),
        (lines(MOONCAKE[0], {**MOONCAKE[0], "output_length": 1e300}), ":2: output_length: got 1e+300"),
        (lines(MOONCAKE[0], {**MOONCAKE[0], "output_length": float("nan")}), ":2: output_length: got nan"),
        (lines(MOONCAKE[0], {**MOONCAKE[0], "output_length": 2.5}), ":2: output_length: got 2.5"),
        (lines(MOONCAKE[0], {**MOONCAKE[0], "output_length": [1]}), ":2: output_length: got list"),
        (lines(MOONCAKE[0]) + "3\n", ":2: input_length: got NoneType"),
        (lines({"timestamp": 1}), ":1: no input token count; allowed: input_length or ContextTokens or Request tokens"),
        (AZURE + "2023-11-16 18:15:51,many,1\n", ":4: ContextTokens: got 'many'"),
        (AZURE + "2023-11-16 18:15:51,1\n", ":4: 2 values; allowed: 3, as in the header"),
        (AZURE + "2023-11-16 18:15:51,1,\n", ":4: GeneratedTokens: got ''"),
        (json.dumps({**VLLM, "output_lens": [1]}), "output_lens: 1 values; allowed: 4, as in input_lens"),
        (json.dumps({**VLLM, "input_lens": [1, 2, 3, "x"]}), "input_lens[3]: got 'x'"),
        (json.dumps({**VLLM, "output_lens": "abcd"}), "no input token count"),
        (json.dumps({**VLLM, "ttfts": 3, "itls": "fast", "start_times": None, "model_id": 3}), None),
        (json.dumps({**VLLM, "ttfts": [None, -1, "x", 1e300], "itls": [None, [None], ["x"], [float("nan")]]}), None),
        (json.dumps({**VLLM, "input_lens": [], "output_lens": []}), None),
        (json.dumps([MOONCAKE[0]]), "no input token count"),
    ],
    ids=range(18),
)
def test_what_is_odd_ends_in_a_trajectory_or_in_a_line(tmp_path, content, words):
    line = ends_well(request_traces, tmp_path, content)
    assert line is None if words is None else words in line


@given(value=wrecked(MOONCAKE))
def test_anything_else(value):
    with tempfile.TemporaryDirectory() as folder:
        ends_well(request_traces, Path(folder), lines(*value) if isinstance(value, list) and value else json.dumps(value))


@given(value=wrecked(VLLM))
def test_anything_else_of_vllm(value):
    with tempfile.TemporaryDirectory() as folder:
        ends_well(request_traces, Path(folder), json.dumps(value))


CSV_ROW = {"TIMESTAMP": "2023-11-16 18:15:46.6805900", "ContextTokens": "374", "GeneratedTokens": "44"}
BURST_ROW = {"Timestamp": "5", "Model": "ChatGPT", "Request tokens": "472", "Response tokens": "18", "Total tokens": "490", "Log Type": "x"}
FIRSTS = [
    (openai_chat, EPISODE),
    (openai_chat, [EPISODE]),
    (verl_dump, {**ROW, "output": "a"}),
    (tau2, RESULTS),
    (tau2, OLD),
    (inspect_log, LOG),
    (weave, CALLS[0]),
    (weave, CALLS),
    (weave, ANTHROPIC[0]),
    (request_traces, MOONCAKE[0]),
    (request_traces, CSV_ROW),
    (request_traces, BURST_ROW),
    (request_traces, VLLM),
]
OURS = (verl_dump, tau2, inspect_log, weave, request_traces)


@pytest.mark.parametrize(("owner", "first"), FIRSTS, ids=[f"{owner.NAME}-{number}" for number, (owner, _) in enumerate(FIRSTS)])
def test_a_file_is_known_by_its_own_importer_only(owner, first):
    assert [kind.NAME for kind in (openai_chat, *OURS) if kind.knows(first)] == [owner.NAME]


@given(value=JSON)
def test_no_importer_knows_just_anything(value):
    assert not any(kind.knows(value) for kind in OURS)


@pytest.mark.parametrize(("owner", "first"), [(owner, first) for owner, first in FIRSTS if owner in OURS])
@given(data=JSON)
def test_a_key_alone_makes_no_format(owner, first, data):
    """Every key there, of any value: it may be known, but never raises; the keys alone, without their neighbours, never are."""
    head = first[0] if isinstance(first, list) else first
    for kind in OURS:
        kind.knows(dict.fromkeys(head, data))
        kind.knows([dict.fromkeys(head, data)])
        assert not any(kind.knows({key: value}) for key, value in head.items())
