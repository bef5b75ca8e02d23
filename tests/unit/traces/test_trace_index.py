"""A catalogue knows of every trajectory what its decoded line would say, and picks the very same trajectories."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_heddle.traces import TraceError, generate, read, write
from verl_heddle.traces import index as module
from verl_heddle.traces.index import catalogue
from verl_heddle.traces.schema import decode, encode
from verl_heddle.trajectory import Trajectory, Turn

NASTY = st.sampled_from(['],"reward":', '"steps":[', '"output_tokens":7', "]", "é", '"', "\\", "a"])
TEXTS = st.lists(NASTY, min_size=1, max_size=3).map("".join)
TURNS = st.builds(
    Turn,
    st.integers(0, 9) | st.none(),
    st.integers(0, 9) | st.none(),
    TEXTS | st.none(),
    st.floats(0, 9) | st.none(),
    ctx_tokens=st.integers(1, 9) | st.none(),
)
META = st.fixed_dictionaries(
    {"free": st.lists(TEXTS) | st.dictionaries(st.sampled_from(["reward", "steps", "step"]), st.lists(st.integers()))},
    optional={"step": st.integers(0, 5), "run": TEXTS, "uid": TEXTS | st.integers(0, 5), "validate": st.booleans()},
)
ITEMS = st.builds(
    Trajectory,
    TEXTS,
    TEXTS,
    TEXTS,
    TEXTS | st.integers(0, 9),
    st.integers(1, 9) | st.none(),
    st.lists(TURNS, max_size=3).map(tuple),
    meta=META,
)


@given(ITEMS)
@settings(max_examples=300)
def test_an_entry_says_what_the_line_says(item):
    line = encode(item)
    assert module._split(line) is not None, "what the encoder writes is not parsed as a whole"
    fast, slow = module._line_entry(line, "f", 1), module._entry(0, decode(line))
    assert fast == slow


def test_a_line_in_another_order_is_decoded_as_a_whole(tmp_path):
    (item,) = generate("coding", 1, 1)
    record = dict(reversed(json.loads(encode(item)).items()))
    (tmp_path / "t.jsonl").write_text(json.dumps(record) + "\n")
    found = catalogue(tmp_path / "t.jsonl")
    assert [one.tokens for one in found.entries] == [item.output_tokens] and list(found.pick([0])) == [item]


@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.gz"])
def test_picks_in_the_order_of_the_file(tmp_path, name):
    work = generate("search", 5, 4, seed=3)
    write(tmp_path / name, work)
    found = catalogue(tmp_path / name)
    assert [one.number for one in found.entries] == list(range(20)) and found.candidates(found.entries) == found.entries
    assert list(found.pick([17, 2, 5])) == [list(read(tmp_path / name))[number] for number in (2, 5, 17)]


def test_torn_lines_are_left_out_and_numbers_stay(tmp_path):
    lines = [encode(item) for item in generate("math", 2, 2)]
    path = tmp_path / "t.jsonl"
    path.write_bytes(lines[0] + lines[1][:50] + b"\n" + lines[2] + lines[3])
    notes: list[str] = []
    found = catalogue(path, notes.append)
    assert len(found.entries) == 3 and len(notes) == 1
    assert [item.trial for item in found.pick([1, 2])] == [decode(lines[2]).trial, decode(lines[3]).trial]
    with pytest.raises(TraceError):
        catalogue(path)


def test_a_fault_inside_a_turn_is_told_when_it_is_picked(tmp_path):
    line = encode(generate("math", 1, 1)[0]).replace(b'"input_tokens":0', b'"input_tokens":-1')
    (tmp_path / "t.jsonl").write_bytes(line)
    found = catalogue(tmp_path / "t.jsonl")
    with pytest.raises(TraceError, match="input_tokens"):
        list(found.pick([0]))


def requests(path, number):
    rows = [{"timestamp": k, "input_length": 5 + k, "output_length": 1 + k % 7} for k in range(number)]
    with gzip.open(path, "wt") as out:
        out.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def test_of_a_foreign_file_whole_prompts_are_kept_up_to_a_limit(tmp_path, monkeypatch):
    path = requests(tmp_path / "r.jsonl.gz", 3000)
    all_of_it = catalogue(path)
    assert len(all_of_it.candidates(all_of_it.entries)) == len(all_of_it.entries) == 3000 and all_of_it.told
    monkeypatch.setattr(module, "KEPT_TURNS", 500)
    found = catalogue(path)
    assert len(found.entries) == 3000 and 100 < len(found.candidates(found.entries)) <= 500
    some = [one.number for one in found.candidates(found.entries)][:3]
    assert [item.steps for item in found.pick(some)] == [item.steps for item in all_of_it.pick(some)]
    assert len({one.number // 1000 for one in found.candidates(found.entries)}) == 3, "the begin of the file is not preferred"


def test_meta_of_an_entry_is_what_counts_runs():
    item = replace(generate("math", 1, 1)[0], meta={"run": "b", "uid": "u", "step": 3, "validate": True})
    entry = module._line_entry(encode(item), "f", 1)
    assert entry.meta == {"run": "b", "uid": "u"} and entry.step == 3 and entry.validate
