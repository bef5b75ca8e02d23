"""One trajectory, one line: round trips, and one plain error for everything else."""

import json
import pickle
from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verl_heddle.traces import TraceError, decode, encode, from_dict, to_dict
from verl_heddle.traces.schema import _META, MAX_LINE_BYTES, MAX_SECONDS, MAX_TOKENS
from verl_heddle.trajectory import Reason, Trajectory, Turn

STEP = {"input_tokens": 0, "output_tokens": 5, "tool": "ls", "tool_latency_s": 0.5}
RECORD = {
    "source": "made-up",
    "workload": "coding",
    "prompt_id": "p",
    "trial": 0,
    "prompt_tokens": 7,
    "steps": [STEP],
    "reward": 1.0,
    "model": None,
    "meta": {},
}

names = st.text(min_size=1, max_size=20)
counts = st.none() | st.integers(0, MAX_TOKENS)
seconds = st.none() | st.floats(0, MAX_SECONDS)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=8,
)
turns = st.builds(
    Turn,
    input_tokens=counts,
    output_tokens=counts,
    tool=st.none() | st.text(max_size=20),
    tool_latency_s=seconds,
    gen_s=seconds,
    ctx_tokens=counts,
    ctx_reset=st.booleans(),
    output_est=st.booleans(),
    route_s=seconds,
    queue_s=seconds,
    transport_s=seconds,
    between_s=seconds,
    replica=st.none() | names,
    priority=st.none() | st.integers(-(2**63) + 1, 2**63 - 1),
    reason=st.none() | names,
    predicted_remaining=st.none() | st.floats(0, MAX_TOKENS),
    predicted_upper=st.none() | st.floats(0, MAX_TOKENS),
    preemptions=counts,
    cached_tokens=counts,
    start_s=seconds,
)
trajectories = st.builds(
    Trajectory,
    source=names,
    workload=names,
    prompt_id=names,
    trial=st.integers(0, 100) | names,
    prompt_tokens=counts,
    steps=st.lists(turns, max_size=4).map(tuple),
    reward=st.none() | st.floats(-1e300, 1e300),
    model=st.none() | names,
    meta=st.dictionaries(
        names.filter(lambda name: name not in _META),
        st.none() | st.booleans() | st.integers() | names | st.lists(st.floats(-1, 1)),
        max_size=3,
    ),
)


def fault(record: object) -> TraceError:
    with pytest.raises(TraceError) as caught:
        from_dict(record, file="t.jsonl", line=3)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    assert str(caught.value).startswith("t.jsonl:3: ")
    return caught.value


@given(trajectories)
def test_dict_and_line_round_trip(trajectory: Trajectory) -> None:
    assert from_dict(to_dict(trajectory)) == trajectory
    line = encode(trajectory)
    assert line.endswith(b"\n") and line.count(b"\n") == 1 and line.isascii()
    assert decode(line) == trajectory
    assert encode(decode(line)) == line


@given(trajectories)
def test_fields_come_in_the_order_of_the_nouns(trajectory: Trajectory) -> None:
    record = to_dict(trajectory)
    assert list(record) == [field.name for field in fields(Trajectory)]
    order = [field.name for field in fields(Turn)]
    for step in record["steps"]:
        assert list(step)[:4] == order[:4]
        assert list(step) == [name for name in order if name in step]
        assert not any(step[name] is None or step[name] is False for name in list(step)[4:])


@given(st.sampled_from(sorted(RECORD)), values)
def test_any_value_in_any_field_is_read_or_is_a_trace_error(name: str, value: object) -> None:
    try:
        assert isinstance(from_dict({**RECORD, name: value}), Trajectory)
    except TraceError as error:
        assert error.field.startswith(name)


@given(st.sampled_from([field.name for field in fields(Turn)]), values)
def test_any_value_in_any_field_of_a_turn_is_read_or_is_a_trace_error(name: str, value: object) -> None:
    try:
        assert isinstance(from_dict({**RECORD, "steps": [STEP, {**STEP, name: value}]}), Trajectory)
    except TraceError as error:
        assert error.field == f"steps[1].{name}"


@given(st.binary(max_size=200))
def test_any_bytes_are_a_trace_error(garbage: bytes) -> None:
    with pytest.raises(TraceError):
        decode(garbage)


@pytest.mark.parametrize(
    ("change", "field", "words"),
    [
        ({"prompt_tokens": -1}, "prompt_tokens", "got -1; allowed: a whole number from 0"),
        ({"prompt_tokens": 3.0}, "prompt_tokens", "got 3.0"),
        ({"prompt_tokens": True}, "prompt_tokens", "got true"),
        ({"prompt_tokens": "7"}, "prompt_tokens", "got '7'"),
        ({"prompt_tokens": 10**400}, "prompt_tokens", "more than 60 digits"),
        ({"source": None}, "source", "got null; allowed: non-empty text"),
        ({"prompt_id": ""}, "prompt_id", "got ''"),
        ({"trial": -1}, "trial", "got -1"),
        ({"trial": 0.5}, "trial", "a whole number from 0, or a name"),
        ({"reward": float("nan")}, "reward", "got nan; allowed: a finite number"),
        ({"reward": float("inf")}, "reward", "got inf"),
        ({"steps": {}}, "steps", "got an object; allowed: a list of turns"),
        ({"steps": [1]}, "steps[0]", "got 1; allowed: an object"),
        ({"meta": None}, "meta", "got null; allowed: an object"),
        ({"meta": {"a": {"b": [1, float("nan")]}}}, "meta.a.b[]", "got nan"),
        ({"step": []}, "step", "unknown field; allowed: source, workload"),
    ],
)
def test_wrong_top_level_fields(change: dict, field: str, words: str) -> None:
    error = fault({**RECORD, **change})
    assert error.field == field and words in str(error)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"output_tokens": -5}, "steps[1].output_tokens: got -5; allowed: a whole number from 0 to 2**40, or null"),
        ({"tool_latency_s": -0.1}, "steps[1].tool_latency_s: got -0.1; allowed: seconds from 0 to 1e9, or null"),
        ({"tool_latency_s": 1.7e9}, "got 1700000000.0"),
        ({"gen_s": float("inf")}, "steps[1].gen_s: got inf"),
        ({"gen_s": float("nan")}, "steps[1].gen_s: got nan"),
        ({"ctx_reset": 1}, "steps[1].ctx_reset: got 1; allowed: true or false"),
        ({"priority": 0.5}, "steps[1].priority: got 0.5"),
        ({"tool": ["ls"]}, "steps[1].tool: got a list; allowed: text, or null"),
        ({"tool_latency": 1.0}, "steps[1].tool_latency: unknown field; allowed: input_tokens, output_tokens"),
        ({"x" * 10_000: 1}, "..."),
    ],
)
def test_wrong_fields_of_a_turn(change: dict, words: str) -> None:
    assert words in str(fault({**RECORD, "steps": [STEP, {**STEP, **change}]}))


@pytest.mark.parametrize("name", sorted(RECORD))
def test_every_top_level_field_is_required(name: str) -> None:
    error = fault({key: value for key, value in RECORD.items() if key != name})
    assert (error.field, error.problem) == (name, "missing")


@pytest.mark.parametrize("name", sorted(STEP))
def test_four_fields_of_a_turn_are_required(name: str) -> None:
    error = fault({**RECORD, "steps": [{key: value for key, value in STEP.items() if key != name}]})
    assert (error.field, error.problem) == (f"steps[0].{name}", "missing")


def test_unknown_fields_are_welcome_in_meta() -> None:
    assert from_dict({**RECORD, "meta": {"anything": {"goes": [1, None]}}}).meta == {"anything": {"goes": [1, None]}}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "not JSON"),
        (b"\n", "not JSON"),
        (b"{", "not JSON"),
        (b"[1, 2]", "got a list; allowed: an object"),
        (b'{"source": 1, "source": 2}', "duplicate key 'source'"),
        (b"\xef\xbb\xbf{}", "UTF-8 byte-order mark"),
        (json.dumps(RECORD).encode("utf-16"), "not UTF-8 text (byte 0xff at column 1)"),
        ('{"source": "é"}'.encode("latin-1"), "not UTF-8 text (byte 0xe9"),
        (b"[" * 100_000, "nested too deeply"),
        (b"9" * 10_000, "not JSON"),
        (json.dumps(RECORD).replace("1.0", "NaN").encode(), "reward: got nan"),
        (json.dumps(RECORD).replace("1.0", "1e999").encode(), "reward: got inf"),
        (json.dumps({**RECORD, "source": "a\nb", "step\n": 1}).encode(), r"step\n: unknown field"),
    ],
)
def test_wrong_lines(text: bytes, words: str) -> None:
    with pytest.raises(TraceError) as caught:
        decode(text, file="a\nb", line=1)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(r"a\nb:1: ")


def test_what_cannot_be_read_is_not_written() -> None:
    good = from_dict(RECORD)
    wide = "x" * MAX_LINE_BYTES
    loop: dict = {}
    loop["again"] = [loop]
    for bad in (
        replace(good, prompt_tokens=-1),
        replace(good, steps=(Turn(0, 1, tool_latency_s=float("nan")),)),
        replace(good, meta={"a": float("inf")}),
        replace(good, meta={1: "key"}),  # type: ignore[dict-item]
        replace(good, meta={"set": {1}}),
        replace(good, meta={"wide": wide}),
        replace(good, meta=loop),
    ):
        with pytest.raises(TraceError):
            encode(bad)


def test_live_values_are_written_as_plain_json() -> None:
    live = replace(from_dict(RECORD), steps=(Turn(0, 1, reason=Reason.STICKY, priority=-3),), meta={"lone": "\ud800"})
    assert decode(encode(live)) == live
    assert b'"reason":"sticky"' in encode(live)


def test_the_error_survives_pickling() -> None:
    error = fault({**RECORD, "trial": -1})
    copy = pickle.loads(pickle.dumps(error))
    assert str(copy) == str(error) and (copy.file, copy.line, copy.field) == ("t.jsonl", 3, "trial")
