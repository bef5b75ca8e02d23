"""verl's dumps: where the text is cut into turns, what is estimated, and that nothing in it can break the import."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from samples import lines
from wrecked import ends_well, known_and_read, wrecked

from verl_heddle.traces.importers import verl_dump

SEARCH, READ = (f'<tool_call>\n{{"name": "{tool}", "arguments": {{"q": 1}}}}\n</tool_call>' for tool in ("search", "read"))
RESULT = f"<tool_response>\n{'r' * 40}\n</tool_response>"
ROW = {"input": "system\nYou help.\nuser\nWhat?\nassistant\n", "gts": "4", "score": 0.5, "step": 7, "uid": "0d44-9c_0_0"}
TWO_TURNS = f"{SEARCH}\nuser\n{RESULT}\nassistant\nThe answer is 4."


def taken(tmp_path, output, **more):
    (item,), tally = known_and_read(verl_dump, tmp_path, lines({**ROW, "output": output, **more}), "7.jsonl")
    return item, tally


def tools(item):
    return [turn.tool for turn in item.steps]


def test_a_line(tmp_path):
    item, tally = taken(tmp_path, TWO_TURNS)
    assert (item.source, item.workload, item.reward, item.meta, item.trial) == ("verl_dump", "verl", 0.5, {"step": 7}, 0)
    assert item.prompt_tokens == round(len(ROW["input"]) / 4)
    first, second = item.steps
    assert (first.output_tokens, first.tool, first.output_est, first.input_tokens) == (round(len(SEARCH) / 4), "search", True, 0)
    heard = round(len(f"user\n{RESULT}") / 4)
    assert (second.input_tokens, second.output_tokens, second.tool) == (heard, 4, None)
    assert (first.ctx_tokens, second.ctx_tokens) == (item.prompt_tokens, item.prompt_tokens + first.output_tokens + heard)
    assert (first.tool_latency_s, first.gen_s) == (None, None), "a dump has no times"
    assert tally.estimated == {"input tokens": 2, "output tokens": 2} and tally.missing == {"tool seconds": 1}


@pytest.mark.parametrize(
    ("output", "names"),
    [
        ("Just an answer.", [None]),
        (TWO_TURNS, ["search", None]),
        (f"{SEARCH}user\n{RESULT}\nassistant\nDone.", ["search", None]),  # no line break between the call's tokens and the result's
        (f"{SEARCH}\n{READ}\nuser\n{RESULT}\n{RESULT}\nassistant\nDone.", ["search+read", None]),
        (f"{SEARCH}\nuser\n{RESULT}\nuser\n{RESULT}\nassistant\nDone.", ["search", None]),
        (f"{SEARCH}\nuser\n{RESULT}\nassistant\n{READ}\nuser\n{RESULT}\nassistant\nDone.", ["search", "read", None]),
        (f"{SEARCH}\ntool\n{RESULT}\nassistant\nDone.", ["search", None]),
        (
            f"<tool_call>\n<function=run>\n<parameter=x>1</parameter>\n</function>\n</tool_call>user\n{RESULT}\nassistant\nOk.",
            ["run", None],
        ),
        (f"<tool_call>{{torn</tool_call>\nuser\n{RESULT}\nassistant\nOk.", ["tool", None]),
        (f"{SEARCH}\nuser\n{RESULT}", ["search"]),  # the limit was reached with the result
        (f"{SEARCH}\nuser\n{RESULT}\nassistant\n", ["search"]),
        (f"Thinking {SEARCH}", ["search"]),
        ('<tool_call>\n{"name": "search"}', [None]),  # cut off: verl does not call it
        ("{torn}<|im_end|>\n<|im_start|>tool\n42<|im_end|>\n<|im_start|>assistant\nDone.<|im_end|>", ["tool", None]),
        ("A question?\nuser\nYes.\nassistant\nThen 4.", ["user", None]),
        ("There is a\nuser\nin the text.", [None]),
        (f"There is a\nuser\nin the text. {SEARCH}\nuser\n{RESULT}\nassistant\nDone.", ["search", None]),
        (f"{SEARCH}\nuser\n<tool_response>\na\nassistant\nb\n</tool_response>\nassistant\nDone.", ["search", None]),
        (f"{SEARCH}<|im_end|>\n<|im_start|>user\n{RESULT}<|im_end|>\n<|im_start|>assistant\nDone.<|im_end|>", ["search", None]),
        (f"{SEARCH}<|im_end|>\n<|im_start|>tool\n42<|im_end|>\n<|im_start|>assistant\nDone.<|im_end|>", ["search", None]),
        ("Why?<|im_end|>\n<|im_start|>user\nSo.<|im_end|>\n<|im_start|>assistant\nOk.<|im_end|><|endoftext|>", ["user", None]),
    ],
    ids=range(21),
)
def test_where_the_text_is_cut(tmp_path, output, names):
    item, _ = taken(tmp_path, output)
    assert tools(item) == names


def test_a_word_on_a_line_of_its_own_stays_with_the_model(tmp_path):
    item, _ = taken(tmp_path, "There is a\nuser\nin the text.")
    assert item.output_tokens == round(len("There is a\nuser\nin the text.") / 4)


@pytest.mark.parametrize("heard", ["user\n<tool_response>\na\nassistant\nb\n</tool_response>", f"user\n{RESULT}\nuser\n{RESULT}"])
def test_a_result_is_heard_to_its_end(tmp_path, heard):
    item, _ = taken(tmp_path, f"{SEARCH}\n{heard}\nassistant\nDone")
    assert (item.steps[1].input_tokens, item.steps[1].output_tokens) == (round(len(heard) / 4), 1)


def test_samples_of_a_prompt_share_it_and_empty_ones_are_left_out(tmp_path):
    rows = [{**ROW, "output": output} for output in ("a", "", "b")] + [{**ROW, "input": "other", "output": "c", "data_source": "gsm8k"}]
    items, tally = known_and_read(verl_dump, tmp_path, lines(*rows))
    assert items[0].prompt_id == items[1].prompt_id != items[2].prompt_id
    assert [item.workload for item in items] == ["verl", "verl", "gsm8k"]
    assert tally.left_out == {"without output": 1}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"output": None}, "output: got NoneType; allowed: text"),
        ({"input": ["a"]}, "input: got list; allowed: text"),
        ({"output": 3}, "output: got int"),
        ({"score": float("nan"), "step": -1}, None),
        ({"score": "high", "step": "seven"}, None),
        ({"score": {}, "step": 10**30}, None),
        ({"score": [1, 2], "step": 1.5, "uid": None}, None),
        ({"output": "user"}, None),
        ({"output": "<|im_start|>"}, None),
        ({"output": "<|im_start|><|im_start|>user\n"}, None),
        ({"output": "\nuser\nassistant\nuser\n</tool_response>\nassistant\n<tool_call></tool_call>"}, None),
        ({"output": f"<tool_call>{'[' * 100_000}</tool_call>"}, None),
    ],
    ids=range(12),
)
def test_what_is_odd_ends_in_a_trajectory_or_in_a_line(tmp_path, change, words):
    said = ends_well(verl_dump, tmp_path, lines({**ROW, "output": "a"}, {**ROW, "output": "a", **change}))
    assert said is None if words is None else f":2: {words}" in said


@pytest.mark.parametrize("value", [[], "text", 3, None, {}, [[]], [ROW]])
def test_what_is_no_line_of_it_ends_in_a_line(tmp_path, value):
    assert not verl_dump.knows(value)
    assert ends_well(verl_dump, tmp_path, json.dumps(value) + "\n") is not None


def test_a_meta_step_only_where_it_is_one(tmp_path):
    item, _ = taken(tmp_path, "a", step="late", score=None)
    assert item.meta == {} and item.reward is None


@pytest.mark.parametrize("piece", ["user\n", "<tool_call>", "user\n<tool_response>\n", "assistant\n", "<|im_start|>", "user\n\n\n"])
def test_a_long_text_of_nothing_but_marks_is_read_in_one_pass(tmp_path, piece):
    taken(tmp_path, "a" + piece * 200_000)  # twice over each mark would be 40 billion steps


@given(row=wrecked({**ROW, "output": TWO_TURNS}))
def test_anything_else(row):
    with tempfile.TemporaryDirectory() as folder:
        ends_well(verl_dump, Path(folder), lines(row))
