"""`verl-heddle trace`: what is imported, described, cut and merged, and what is refused in a line."""

from __future__ import annotations

import json

import pytest

from verl_heddle.cli import main
from verl_heddle.traces import generate, read, write

CHAT = {
    "messages": [
        {"role": "user", "content": "q" * 400},
        {"role": "assistant", "content": "a" * 800, "tool_calls": [{"function": {"name": "look", "arguments": ""}}], "timestamp": 10.0},
        {"role": "tool", "content": "r" * 40, "timestamp": 12.0},
        {"role": "assistant", "content": "b" * 80},
    ]
}


@pytest.fixture
def chats(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text(f"{json.dumps(CHAT)}\n" * 6)
    return path


def command(*words):
    return main(["trace", *map(str, words)])


def test_import_writes_a_trace_and_says_what_it_rests_on(chats, tmp_path, capsys):
    out = tmp_path / "out.jsonl.gz"
    assert command("import", chats, "--out", out) == 0
    items = list(read(out))
    assert [item.trial for item in items] == list(range(6)) and items[0].prompt_tokens == 100 and items[0].output_tokens == 220
    said = capsys.readouterr()
    assert "6 trajectories, 12 turns" in said.err and "estimated as characters / 4" in said.err and "wrote" in said.out


def test_what_is_there_is_not_overwritten(chats, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    out.write_text("precious")
    assert command("import", chats, "--out", out) == 2 and out.read_text() == "precious"
    assert "--force replaces it" in capsys.readouterr().err
    assert command("import", chats, "--out", out, "--force") == 0 and len(list(read(out))) == 6
    assert command("merge", out, "--out", out, "--force") == 2 and len(list(read(out))) == 6


def test_a_fault_leaves_no_file(chats, tmp_path, capsys):
    chats.write_text(chats.read_text() + '{"messages": 1}\n')
    assert command("import", chats, "--out", tmp_path / "out.jsonl") == 2
    said = capsys.readouterr().err.strip()
    assert f"{chats}:7: messages: got int" in said and len(said.splitlines()) == 1 and not (tmp_path / "out.jsonl").exists()
    assert command("import", chats, "--out", tmp_path / "out.jsonl", "--format", "magic") == 2
    assert "unknown format 'magic'; allowed: " in capsys.readouterr().err


def test_a_header_without_rows_ends_in_a_line(tmp_path, capsys):
    path = tmp_path / "code.csv"
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n")
    assert command("describe", path) == 2
    said = capsys.readouterr().err
    assert str(path) in said and len(said.splitlines()) == 1


def test_describe_tells_lengths_spread_tools_and_contexts(chats, tmp_path, capsys):
    assert command("describe", chats) == 0
    said = capsys.readouterr().out
    assert said.startswith("6 trajectories of 1 prompts, 6 samples each, 2 turns in the median, 2 at most.")
    assert "They generate 220 tokens in the median" in said and "A context grows to 330 tokens in the median" in said
    assert "A tool call takes 2.00 s in the median" in said and said.rstrip().endswith(" 6"), "one bar, of all"
    assert command("describe", tmp_path / "nowhere.jsonl") == 2 and "no such file" in capsys.readouterr().err


def test_head_and_merge(tmp_path, capsys):
    one, two, out = (tmp_path / name for name in ("one.jsonl", "two.jsonl.gz", "out.jsonl"))
    write(one, generate("math", 4, 2, seed=1))
    write(two, generate("search", 3, 1, seed=2))
    assert command("merge", one, two, "--out", out) == 0 and list(read(out)) == [*read(one), *read(two)]
    assert command("head", out, "-n", "9", "--out", one, "--force") == 0 and len(list(read(one))) == 9


def test_simulate_takes_a_foreign_file_as_its_import(chats, tmp_path, capsys):
    out = tmp_path / "chats.trace.jsonl"
    assert command("import", chats, "--out", out) == 0
    answers = []
    for path in (chats, out):
        words = (
            "simulate",
            "--trace",
            str(path),
            "--model",
            "qwen3-8b",
            "--gpus",
            "1",
            "--seeds",
            "1",
            "--jobs",
            "1",
            "--arms",
            "stock",
            "--json",
            "-",
        )
        capsys.readouterr()
        assert main(list(words)) == 0
        answers.append(json.loads(capsys.readouterr().out)["arms"][0]["makespan_s"])
    assert answers[0] == answers[1]
