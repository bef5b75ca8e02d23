"""Trace files: streaming, compression, directories, atomic writes, and every way a file can be bad."""

import gzip
import itertools
import os
import random
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from verl_heddle.traces import TraceError, encode, read, segment, segments, trace_files, write
from verl_heddle.traces.schema import MAX_LINE_BYTES
from verl_heddle.trajectory import Trajectory, Turn


def made_up(count: int) -> list[Trajectory]:
    steps = (Turn(0, 10, "ls", 0.25, gen_s=1.5, ctx_tokens=5), Turn(3, 7))
    return [Trajectory("made-up", "coding", f"p{index // 2}", index % 2, 5, steps, 1.0, None, {"n": index}) for index in range(count)]


LINE = encode(made_up(1)[0])


def fails(path: Path) -> str:
    """The one error of reading `path`: one line, naming the file."""
    with pytest.raises(TraceError) as caught:
        list(read(path))
    assert "\n" not in str(caught.value) and str(caught.value).startswith(str(path))
    return str(caught.value)


@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.gz"])
def test_write_then_read(tmp_path: Path, name: str) -> None:
    path, trajectories = tmp_path / name, made_up(20)
    assert write(path, iter(trajectories)) == 20
    assert list(read(path)) == trajectories
    assert list(read(str(path))) == trajectories
    assert os.listdir(tmp_path) == [name]
    assert path.read_bytes().startswith(b"\x1f\x8b") == name.endswith(".gz")
    again = tmp_path / f"again-{name}"
    write(again, trajectories)
    assert again.read_bytes() == path.read_bytes()


def test_the_first_bytes_decide_not_the_name(tmp_path: Path) -> None:
    (tmp_path / "packed.jsonl").write_bytes(gzip.compress(LINE, mtime=0))
    (tmp_path / "plain.jsonl.gz").write_bytes(LINE)
    assert list(read(tmp_path)) == made_up(1) * 2


def test_a_directory_is_read_by_name_and_other_files_are_left_alone(tmp_path: Path) -> None:
    write(tmp_path / "b.jsonl", made_up(1))
    write(tmp_path / "a.jsonl.gz", made_up(2))
    (tmp_path / "manifest.json").write_text("{}")
    (tmp_path / ".hidden.jsonl").write_text("no")
    (tmp_path / "folder.jsonl").mkdir()
    assert [file.name for file in trace_files(tmp_path)] == ["a.jsonl.gz", "b.jsonl"]
    assert list(read(tmp_path)) == [*made_up(2), *made_up(1)]


def test_the_segments_of_a_rotated_trace_come_oldest_first_and_the_live_file_last(tmp_path: Path) -> None:
    live = tmp_path / "trace.jsonl"
    assert segment(live, 1).name == "trace.0001.jsonl.gz" and segment(live, 12345).name == "trace.12345.jsonl.gz"
    every = made_up(5)
    for place, number in enumerate((10000, 2, 9999, 1)):
        write(segment(live, number), [every[(3, 1, 2, 0)[place]]])
    write(live, [every[4]])
    write(tmp_path / "other.0001.jsonl.gz", made_up(1))
    (tmp_path / "trace.12.jsonl.gz").write_bytes(b"too short a number to be a segment")
    assert segments(live) == [segment(live, number) for number in (1, 2, 9999, 10000)]
    assert trace_files(live) == [*segments(live), live] and list(read(live)) == every
    (tmp_path / "trace.12.jsonl.gz").unlink()
    assert [file.name for file in trace_files(tmp_path)][:2] == ["other.0001.jsonl.gz", "trace.0001.jsonl.gz"]
    assert list(read(tmp_path)) == [*made_up(1), *every]
    assert list(read(segment(live, 2))) == [every[1]], "a segment that is named is read alone"
    live.unlink()
    assert list(read(live)) == every[:4], "the live file was not begun again"
    assert segments(tmp_path / "nothing.jsonl") == segments(tmp_path / "no" / "trace.jsonl") == segments(segment(live, 1)) == []


def test_a_trace_that_somebody_compressed_is_found_by_its_old_name(tmp_path: Path) -> None:
    write(tmp_path / "trace.jsonl.gz", made_up(2))
    assert list(read(tmp_path / "trace.jsonl")) == made_up(2)


def test_reading_streams(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(LINE * 3 + b"garbage\n")
    assert list(itertools.islice(read(path), 3)) == made_up(1) * 3
    assert ":4: not JSON" in fails(path)


def test_small_untidiness_is_read(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(b"\n" + LINE.replace(b"\n", b"\r\n") + b"  \n" + LINE.rstrip())
    assert list(read(path)) == made_up(1) * 2
    path.write_bytes(gzip.compress(LINE, mtime=0) + gzip.compress(LINE, mtime=0))
    assert list(read(path)) == made_up(1) * 2


def truncated(data: bytes) -> bytes:
    return gzip.compress(data, mtime=0)[:-20]


def flipped(data: bytes, place: int) -> bytes:
    packed = bytearray(gzip.compress(data, mtime=0))
    packed[place] ^= 0xFF
    return bytes(packed)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty file; allowed: at least one trajectory"),
        (b"\n \n", "empty file"),
        (gzip.compress(b"", mtime=0), "empty file"),
        (truncated(LINE * 50), "compressed file is cut off; allowed: a complete gzip file"),
        (b"\x1f\x8b", "compressed file is cut off"),
        (flipped(LINE * 50, -6), "compressed file is damaged"),
        (gzip.compress(LINE, mtime=0) + b"tail", "compressed file is damaged"),
        (b"hello world\n", ":1: not JSON (Expecting value at column 1); allowed: one JSON object per line, UTF-8"),
        (b"source,workload\n1,2\n", ":1: not JSON"),
        (bytes(range(256)) * 100, ":1: not JSON"),
        (random.Random(0).randbytes(1000).replace(b"\n", b"") + b"\xff\n", ":1: not"),
        (b"PK\x03\x04" + bytes(200), ":1: not"),
        (LINE.decode().encode("utf-16"), ":1: not UTF-8 text"),
        (LINE.replace(b"made-up", "größer".encode("latin-1")), ":1: not UTF-8 text"),
        (LINE + LINE[:40], ":2: not JSON"),
        (LINE + b'{"messages": [], "reward": 1}\n', ":2: messages: unknown field"),
        (LINE + b"[]\n", ":2: got a list; allowed: an object"),
        (LINE + LINE.replace(b'"output_tokens":7', b'"output_tokens":-7'), ":2: steps[1].output_tokens: got -7"),
    ],
)
def test_bad_files(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(content)
    assert words in fails(path)


def test_any_flipped_byte_of_a_compressed_file_is_harmless_or_an_error(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl.gz"
    errors = 0
    for place in range(len(gzip.compress(LINE, mtime=0))):
        path.write_bytes(flipped(LINE, place))
        try:
            assert list(read(path)) == made_up(1)
        except TraceError:
            errors += 1
    assert errors > 0.9 * place  # only the header's time stamp and system do not matter


def test_a_torn_last_line_is_called_one(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(LINE + LINE[:40])
    assert "the last line has no newline: cut off while being written?" in fails(path)


def sparse_zeros(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(200 * 2**20)


def one_long_line(path: Path) -> None:
    with open(path, "wb") as file:
        for _ in range(64):
            file.write(b"x" * 2**20)


def packed_zeros(path: Path) -> None:
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(64):
            file.write(bytes(2**20))


@pytest.mark.parametrize("make", [sparse_zeros, one_long_line, packed_zeros])
def test_a_huge_line_fails_in_bounded_memory(tmp_path: Path, make: Callable[[Path], None]) -> None:
    path = tmp_path / "t.jsonl"
    make(path)
    tracemalloc.start()
    try:
        assert f":1: line too long; is this a trace file?; allowed: lines of at most {MAX_LINE_BYTES} bytes" in fails(path)
        assert tracemalloc.get_traced_memory()[1] < 4 * MAX_LINE_BYTES
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(LINE * 5_000)
    tracemalloc.start()
    try:
        assert sum(1 for _ in read(path)) == 5_000
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_missing_files_fail_at_once(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="no such file; allowed: a trace file or a directory of them"):
        read(tmp_path / "nothing.jsonl")
    with pytest.raises(TraceError, match=r"no trace files in this directory; allowed: files ending in \.jsonl or \.jsonl\.gz"):
        read(tmp_path)
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "nowhere")
    with pytest.raises(TraceError, match="no such file"):
        read(tmp_path / "link.jsonl")


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "t.jsonl", made_up(1))

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    assert "cannot be read (Permission denied)" in fails(tmp_path / "t.jsonl")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    write(path, made_up(2))

    def broken() -> Iterator[Trajectory]:
        yield from made_up(5)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write(path, broken())
    bad = Trajectory("made-up", "coding", "p", 0, -1, ())
    with pytest.raises(TraceError, match=r"t\.jsonl:3: prompt_tokens: got -1"):
        write(path, [*made_up(2), bad])
    with pytest.raises(TraceError, match="no trajectories to write"):
        write(path, [])
    assert list(read(path)) == made_up(2)
    assert os.listdir(tmp_path) == ["t.jsonl"]


def test_a_file_can_be_rewritten_from_itself(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl.gz"
    write(path, made_up(10))
    assert write(path, (trajectory for trajectory in read(path) if trajectory.trial == 0)) == 5
    assert list(read(path)) == made_up(10)[::2]


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"cannot be written \(No such file or directory\)"):
        write(tmp_path / "no" / "t.jsonl", made_up(1))
    (tmp_path / "folder").mkdir()
    with pytest.raises(TraceError, match="cannot be written"):
        write(tmp_path / "folder", made_up(1))
