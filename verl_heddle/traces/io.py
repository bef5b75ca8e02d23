"""Read trace files as a stream; write them atomically.

A trace file is JSON Lines, plain or gzip, detected by its first bytes. Reading holds one line at a time, so memory is bounded by
`schema.MAX_LINE_BYTES` for any file. Any fault in a file raises one `TraceError` with a one-line message.

A long run rotates its trace: `trace.jsonl` is the live file, and `trace.0001.jsonl.gz`, `trace.0002.jsonl.gz`, ... next to it are the
closed segments, oldest first (`segments`). The name of the live file denotes the whole trace.
"""

from __future__ import annotations

import gzip
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, TypeVar

from verl_heddle.traces.schema import MAX_LINE_BYTES, TraceError, UnreadableError, decode, encode, too_long
from verl_heddle.trajectory import Trajectory

T = TypeVar("T")

Note = Callable[[str], None]
"""Receives one line for each kind of data left out."""

SUFFIXES = (".jsonl", ".jsonl.gz")
"""Suffixes of trace files in a directory; other files (such as a manifest) are ignored."""

_GZIP_MAGIC = b"\x1f\x8b"  # RFC 1952

_SEGMENT = re.compile(r"(?P<trace>.+)\.(?P<number>\d{4,9})\.jsonl\.gz")


def segment(path: str | os.PathLike[str], number: int) -> Path:
    """Name of the closed segment `number` (from 1) of the trace whose live file is `path`: `trace.jsonl` gives `trace.0001.jsonl.gz`."""
    path = Path(path)
    return path.with_name(f"{path.name.removesuffix('.jsonl')}.{number:04d}.jsonl.gz")


def segments(path: str | os.PathLike[str]) -> list[Path]:
    """The closed segments of the trace whose live file is `path`, oldest first; none for a name that does not end in `.jsonl`.

    The live file is not included and need not exist: it may not yet have been created after a rotation.

    Raises:
        OSError: the folder cannot be read.
    """
    path = Path(path)
    if path.suffix != ".jsonl" or not path.parent.is_dir():
        return []
    found = ((_SEGMENT.fullmatch(file.name), file) for file in path.parent.iterdir())
    matching = [(int(match["number"]), file) for match, file in found if match and match["trace"] == path.stem and file.is_file()]
    return [file for _, file in sorted(matching)]


def trace_of(run: str | os.PathLike[str]) -> Path:
    """The trace of a run folder: in `heddle/` (the default of `heddle.trace.dir`), else directly inside; otherwise `run` itself."""
    inside = [Path(run, *folder, "trace.jsonl") for folder in (("heddle",), ())]
    return next((file for file in inside if file.is_file() or segments(file)), Path(run))


def read(path: str | os.PathLike[str], note: Note | None = None) -> Iterator[Trajectory]:
    """Read a trace file (closed segments first), or all trace files of a directory in name order.

    A faulty file yields the trajectories before the fault and then raises. Blank lines are skipped. Empty files are skipped if another
    file has a line: a run that has just rotated leaves an empty live file.

    Args:
        note: receives one line for each kind of damage that a killed run or a full disk explains: torn lines (not JSON, after a valid
            line) and the missing rest of a truncated gzip file. Without `note` these raise.

    Raises:
        TraceError: immediately if there is no such file; while iterating if a file cannot be read, is damaged, truncated or not text, if
            a line is too long or not a trajectory, or if there are no trajectories.
    """
    return (item for _, _, item in placed(path, note))


def placed(path: str | os.PathLike[str], note: Note | None = None) -> Iterator[tuple[str, int, Trajectory]]:
    """Like `read`, with the file and line number of each trajectory."""
    return lines(path, decode_line, note)


def lines(path: str | os.PathLike[str], decoder: Callable[[bytes, str, int], T], note: Note | None = None) -> Iterator[tuple[str, int, T]]:
    """Like `placed`, with `decoder(line, file, number)` applied to each line; for callers that do not need whole trajectories.

    Raises:
        TraceError: as `read`, and from the decoder.
    """
    files = trace_files(path)

    def every() -> Iterator[tuple[str, int, T]]:
        found = False
        for file in files:
            for place in _read_file(file, note, decoder):
                found = True
                yield place
        if not found:
            raise TraceError("empty file", allowed="at least one trajectory", file=str(files[-1]))

    return every()


def trace_files(path: str | os.PathLike[str]) -> list[Path]:
    """The files that `read` reads: the `segments` of `path` and `path` itself, or the files of a directory that end in `SUFFIXES`.

    Traces in a directory are sorted by name, with the segments of each before its live file. A missing live file is skipped if the trace
    has segments; otherwise the same name with `.gz` is used.

    Raises:
        TraceError: there are no files.
    """
    path = Path(path)
    try:
        if path.is_dir():
            inside = (file for file in path.iterdir() if file.name.endswith(SUFFIXES) and not file.name.startswith(".") and file.is_file())
            if files := sorted(inside, key=_order):
                return files
            raise TraceError("no trace files in this directory", allowed=f"files ending in {' or '.join(SUFFIXES)}", file=str(path))
        live = [path] if path.exists() else []
        if files := segments(path) + live:
            return files
        if path.suffix == ".jsonl" and (packed := path.with_name(f"{path.name}.gz")).is_file():
            return [packed]
    except OSError as error:
        raise _failed("read", path, error) from error
    raise TraceError("no such file", allowed="a trace file or a directory of them", file=str(path))


def _order(file: Path) -> tuple[str, float, str]:
    """Sort key: by trace, then segments by number, then the live file."""
    match = _SEGMENT.fullmatch(file.name)
    if match:
        return match["trace"], int(match["number"]), file.name
    return re.sub(r"\.jsonl(\.gz)?$", "", file.name), float("inf"), file.name


def write(path: str | os.PathLike[str], trajectories: Iterable[Trajectory]) -> int:
    """Write a trace file and return the number of trajectories; gzip if the name ends in `.gz`.

    Atomic: the complete file is synced to disk and replaces any old one, or nothing changes. The same trajectories give the same bytes.

    Raises:
        TraceError: a trajectory does not fit the schema, there are no trajectories (readers reject empty files), or the write fails.
    """
    path = Path(path)
    count = 0
    try:
        with TemporaryDirectory(prefix=".trace-", dir=path.parent) as folder:  # next to the target: a rename must stay on one file system
            draft = Path(folder) / "draft"
            with open(draft, "wb") as raw:
                with gzip.GzipFile("", "wb", fileobj=raw, mtime=0) if path.name.endswith(".gz") else nullcontext(raw) as out:
                    for count, trajectory in enumerate(trajectories, start=1):
                        out.write(encode(trajectory, file=str(path), line=count))
                raw.flush()
                os.fsync(raw.fileno())
            if not count:
                raise TraceError("no trajectories to write", allowed="at least one", file=str(path))
            os.replace(draft, path)
    except OSError as error:
        raise _failed("written", path, error) from error
    return count


def _read_file(path: Path, note: Note | None, decoder: Callable[[bytes, str, int], T]) -> Iterator[tuple[str, int, T]]:
    file, number, found, torn = str(path), 0, False, 0
    first: TraceError | None = None
    try:
        with open(path, "rb") as raw:
            packed = raw.peek(len(_GZIP_MAGIC)).startswith(_GZIP_MAGIC)
            stream: IO[bytes] | gzip.GzipFile = gzip.GzipFile(fileobj=raw) if packed else raw
            while line := stream.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > MAX_LINE_BYTES:
                    raise too_long(file, number)
                if line.isspace():
                    continue
                try:
                    item = decoder(line, file, number)
                except UnreadableError as error:
                    if note is None or not found:
                        raise
                    first, torn = first or error, torn + 1
                    continue
                yield file, number, item
                found = True
    except EOFError:
        problem = "compressed file is cut off"
        cut = TraceError(problem, allowed="a complete gzip file", file=file, line=number + 1)
        if note is None or not found:
            raise cut from None
        note(f"left out: everything after line {number} of {file}: the compressed file is cut off")
    except (gzip.BadGzipFile, zlib.error) as error:
        problem = f"compressed file is damaged ({error})"
        raise TraceError(problem, allowed="a complete gzip file", file=file, line=number + 1) from None
    except OSError as error:
        raise _failed("read", path, error) from error
    if note is not None and first is not None:
        note(f"{torn} line{'s' if torn > 1 else ''} left out: {first}")


def decode_line(line: bytes, file: str, number: int) -> Trajectory:
    """Decode one line of a file; the error points out a truncated last line.

    Raises:
        TraceError: as `schema.decode`.
    """
    try:
        return decode(line, file=file, line=number)
    except TraceError as error:
        if line.endswith(b"\n"):
            raise
        problem = f"{error.problem}; the last line has no newline: cut off while being written?"
        raise type(error)(problem, allowed=error.allowed, field=error.field, file=file, line=number) from None


def _failed(verb: str, path: Path, error: OSError) -> TraceError:
    return TraceError(f"cannot be {verb} ({error.strerror or error})", file=str(path))
