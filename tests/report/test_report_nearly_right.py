"""Traces that are nearly right, through every command that reads one: one plain line, what can be used is used, and never a traceback."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from dataclasses import fields
from html.parser import HTMLParser

import pytest
from drawn import examples
from hypothesis import given
from hypothesis import strategies as st
from nearly_right import COMMANDS, LIVES, ask, lines, page, run

from verl_heddle.traces import TraceError, from_dict
from verl_heddle.traces.schema import _META
from verl_heddle.trajectory import Trajectory, Turn

GONE = object()
PLACES = (
    [("top", field.name) for field in fields(Trajectory)]
    + [("turn", field.name) for field in fields(Turn)]
    + [("meta", name) for name in _META]
)
NASTY = (
    GONE,
    None,
    True,
    0,
    1,
    -1,
    0.5,
    2**40,
    10**30,
    1e9,
    1e300,
    -1e300,
    float("nan"),
    float("inf"),
    "",
    "x",
    "\ud800\x1b[31m\n",
    [],
    {},
    [{}],
)
MARKUP = "<img src=x onerror=alert(1)>\"'&</style></svg>"


def broken(record: dict) -> str | None:
    """The field that the schema complains about, after a trip through JSON."""
    try:
        from_dict(json.loads(json.dumps(record)))
    except TraceError as error:
        return error.field
    return None


def change(record: dict, where: str, name: str, value: object) -> None:
    for target in record["steps"] if where == "turn" else [record["meta"] if where == "meta" else record]:
        if value is GONE:
            target.pop(name, None)
        else:
            target[name] = value


@pytest.mark.parametrize("command", COMMANDS)
def test_any_value_in_any_field_is_answered_or_is_one_line(command, tmp_path_factory):
    folder = tmp_path_factory.mktemp("asked")

    @examples(15)
    @given(st.sampled_from(PLACES), st.sampled_from(NASTY), st.integers(0, 2 * LIVES - 1), st.booleans())
    def check(place, value, line, everywhere):
        records = run()
        for record in records if everywhere else [records[line]]:
            change(record, *place, value)
        faults = [(number, field) for number, record in enumerate(records, start=1) if (field := broken(record)) is not None]
        code, _, said = ask(command, folder, lines(records))
        if faults:
            assert code == 2 and "trace.jsonl:{}: {}: ".format(*faults[0]) in said
        else:
            assert code in (0, 2), said
        assert code == 0 or (said.count("\n") == 1 and said.startswith(f"verl-heddle {command}: ")), said

    check()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (lambda good: b"", "trace.jsonl: empty file"),
        (lambda good: b"\n \n", "empty file"),
        (lambda good: bytes(range(256)) * 10, "trace.jsonl:1: not JSON"),
        (lambda good: b"\x89PNG\r\n\x1a\n" + bytes(99), "trace.jsonl:1: not UTF-8"),
        (lambda good: gzip.compress(good)[:20], "cut off"),
        (lambda good: good[:50], "the last line has no newline: cut off while being written?"),
        (lambda good: good + b"[1]\n", f"trace.jsonl:{2 * LIVES + 1}: got a list; allowed: an object"),
        (lambda good: good + b'{"a": 1, "a": 2}\n' * 2 + b"{}\n", f"trace.jsonl:{2 * LIVES + 3}: source: missing"),
    ],
)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_that_is_no_trace_is_one_line_and_exit_2(command, content, says, tmp_path):
    code, out, said = ask(command, tmp_path, content(lines(run())))
    assert code == 2 and says in said and said.count("\n") == 1 and out == ""


@pytest.mark.parametrize("command", COMMANDS)
def test_a_torn_line_costs_itself_only_and_is_told(command, tmp_path):
    records = run()
    torn = lines(records[:3]) + b'{"source": "verl", "work' + lines(records[3:]) + lines(records)[:99]
    code, out, said = ask(command, tmp_path, torn)
    seen = out if command != "compare" else (tmp_path / "compare.json").read_text()
    assert code == 0 and "2 lines left out: " in seen and "trace.jsonl:4: not JSON" in seen, said


@pytest.mark.parametrize("command", COMMANDS)
def test_a_compressed_trace_that_is_cut_off_is_used_as_far_as_it_goes(command, tmp_path):
    code, out, said = ask(command, tmp_path, gzip.compress(lines(run() * 20))[:-200])
    seen = out if command != "compare" else (tmp_path / "compare.json").read_text()
    assert code == 0 and "the compressed file is cut off" in seen, said


def test_lines_that_are_there_twice_count_once(tmp_path):
    once = ask("explain", tmp_path, lines(run()))[1]
    code, twice, _ = ask("explain", tmp_path, lines(run() * 2))
    assert code == 0 and f"{2 * LIVES} trajectories left out: recorded twice" in twice
    assert [line for line in twice.splitlines() if line.startswith("- Step")] == [
        line for line in once.splitlines() if line.startswith("- Step")
    ]
    code, out, _ = ask("simulate", tmp_path, lines(run() * 2))
    assert code == 0 and f"{2 * LIVES} trajectories left out: recorded twice" in out


@pytest.mark.parametrize("same_uid", [True, False])
def test_a_step_of_a_resumed_run_counts_as_in_its_latest_run(same_uid, tmp_path):
    again = run()
    for record in again:
        record["meta"]["run"] = "r2"
        record["meta"]["start_s"] += 5000.0
        record["meta"]["end_s"] += 5001.0
        if not same_uid:
            record["meta"]["uid"] += "-2"
    for command in ("explain", "simulate"):
        code, out, _ = ask(command, tmp_path, lines(run() + again))
        assert code == 0 and "trajectories left out: of earlier runs of the same step" in out


def test_trajectories_of_no_live_run_are_left_out_of_an_explanation(tmp_path):
    records = run()
    for record in records[:2]:
        record["meta"] = {}
    code, out, _ = ask("explain", tmp_path, lines(records))
    assert (
        code == 0
        and "2 trajectories left out, not recorded by a live run; the first: " in out
        and "trace.jsonl:1: meta.step: missing" in out
    )
    code, _, said = ask("explain", tmp_path, lines(records[:2]))
    assert code == 2 and "trace.jsonl:1: meta.step: missing; allowed: a number, as recorded by a live run" in said


def test_a_trace_that_does_not_say_how_trajectories_ended_is_explained(tmp_path):
    records = run()
    for record in records:
        del record["meta"]["outcome"]
    code, out, said = ask("explain", tmp_path, lines(records))
    assert code == 0 and f"{2 * LIVES} trajectories have no meta.outcome; assumed finished." in out, said


@pytest.mark.parametrize("command", COMMANDS)
def test_one_trajectory_of_one_turn_of_nothing(command, tmp_path):
    record = run()[0]
    zero = {
        "input_tokens": 0,
        "output_tokens": 0,
        "tool": None,
        "tool_latency_s": 0,
        "ctx_tokens": 0,
        "gen_s": 0,
        "replica": "r0",
        "start_s": 0,
    }
    for steps in ([], [zero]):
        code, _, said = ask(command, tmp_path, lines([record | {"steps": steps, "prompt_tokens": 0}]))
        assert code == 0 or (code == 2 and said.count("\n") == 1), said
        assert code == 0 or not steps


def test_a_prompt_that_a_step_visits_twice_is_explained(tmp_path):
    records = run()
    for record in records:
        record["meta"]["step"] = 1
    code, out, said = ask("explain", tmp_path, lines(records))
    assert code == 0 and "without the trajectory that ended last" in out, said


class Tags(HTMLParser):
    """Counts elements and the names of their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found[tag] += 1
        self.found.update(f"{tag}.{name}" for name, _ in attrs)


def named(name: str) -> bytes:
    """The run with this in every field that is free text."""
    records = run()
    for record in records:
        record.update(source=name, workload=name, model=name, prompt_id=f"{name} {record['prompt_id']}")
        record["meta"]["uid"] = f"{name} {record['meta']['uid']}"
        for turn in record["steps"]:
            turn.update(tool=name, replica=f"{name} {turn['replica']}", reason=name)
    return lines(records)


@pytest.mark.parametrize("command", ["simulate", "plan", "compare"])
def test_markup_in_names_stays_text_on_the_page(command, tmp_path):
    pages = []
    for name in ("name", MARKUP):
        code, _, said = ask(command, tmp_path, named(name))
        assert code == 0, said
        pages.append(Tags(page(command, tmp_path)).found)
    assert pages[0] == pages[1]


def test_control_characters_and_lone_surrogates_in_names_do_not_reach_the_terminal(tmp_path):
    for command in COMMANDS:
        code, out, said = ask(command, tmp_path, named("\x1b[2Jred\nline\ud800"))
        assert code == 0, said
        out.encode("utf-8")
        assert "\x1b" not in out and "\nline" not in out


def test_markup_in_names_stays_text_on_wandb(tmp_path):
    from verl_heddle.compare.outcome import _sentences, write
    from verl_heddle.compare.plan import read_plan

    told = []
    for name in ("name", MARKUP):
        ask("compare", tmp_path, named(name))
        told.append(Tags(_sentences(write(read_plan(tmp_path), tmp_path, 0, None, ""))).found)
    assert told[0] == told[1]
