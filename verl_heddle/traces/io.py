"""Trace files: read as a stream, write in one piece.

A trace file is JSON Lines, plain or gzip, told apart by its first bytes. Reading holds one line at a time, so memory is bounded by
`schema.MAX_LINE_BYTES` whatever the file is. Whatever is wrong with a file ends in one `TraceError` of one line.

A run that writes long rotates: `trace.jsonl` is the live file, `trace.0001.jsonl.gz`, `trace.0002.jsonl.gz`, ... beside it are its closed
segments, oldest first (`segments`). The name of the live file stands for the whole trace.
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
"""Is told in one line what was left out."""

SUFFIXES = (".jsonl", ".jsonl.gz")
"""What a directory's trace files are called; other files in it (a manifest, say) are not read."""

_GZIP_MAGIC = b"\x1f\x8b"  # RFC 1952

_SEGMENT = re.compile(r"(?P<trace>.+)\.(?P<number>\d{4,9})\.jsonl\.gz")


def segment(path: str | os.PathLike[str], number: int) -> Path:
    """Name of the closed segment `number` (from 1) of the trace whose live file is `path`: `trace.jsonl` gives `trace.0001.jsonl.gz`."""
    path = Path(path)
    return path.with_name(f"{path.name.removesuffix('.jsonl')}.{number:04d}.jsonl.gz")


def segments(path: str | os.PathLike[str]) -> list[Path]:
    """The closed segments of the trace whose live file is `path`, oldest first; none for a name that does not end in `.jsonl`.

    The live file itself is not among them, and need not exist: between two segments it may not have been begun.

    Raises:
        OSError: the folder cannot be read.
    """
    path = Path(path)
    if path.suffix != ".jsonl" or not path.parent.is_dir():
        return []
    found = ((_SEGMENT.fullmatch(file.name), file) for file in path.parent.iterdir())
    mine = [(int(match["number"]), file) for match, file in found if match and match["trace"] == path.stem and file.is_file()]
    return [file for _, file in sorted(mine)]


def trace_of(run: str | os.PathLike[str]) -> Path:
    """The trace in a run's folder, where `heddle.trace.dir` puts it by default, or right inside; else `run` itself."""
    inside = [Path(run, *folder, "trace.jsonl") for folder in (("heddle",), ())]
    return next((file for file in inside if file.is_file() or segments(file)), Path(run))


def read(path: str | os.PathLike[str], note: Note | None = None) -> Iterator[Trajectory]:
    """The trajectories of a trace file, its closed segments first, or of all trace files of a directory by name.

    A faulty file yields the trajectories before the fault and then raises. Blank lines are passed over, and files without a line where
    another has one: a run that has just rotated leaves such a live file.

    Args:
        note: told in one line each what was left out, where a killed run or a full disk explains it: lines that are torn (no JSON, with a
            good one before them) and the rest of a compressed file that is cut off. Without it these are errors.

    Raises:
        TraceError: at once if there is no such file; while iterating if a file cannot be read, is damaged, cut off, not text, has a
            line that is too long or is not a trajectory, or if there is not one trajectory.
    """
    return (item for _, _, item in placed(path, note))


def placed(path: str | os.PathLike[str], note: Note | None = None) -> Iterator[tuple[str, int, Trajectory]]:
    """As `read`, each trajectory with its file and the number of its line."""
    return lines(path, decode_line, note)


def lines(path: str | os.PathLike[str], decoder: Callable[[bytes, str, int], T], note: Note | None = None) -> Iterator[tuple[str, int, T]]:
    """As `placed`, with what `decoder(line, file, number)` makes of each line, where all of a trajectory is not needed.

    Raises:
        TraceError: as `read`, and what the decoder raises.
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
    """The files that `read` reads: `segments` of `path` and `path` itself, or those of a directory ending in `SUFFIXES`.

    A directory's traces are sorted by name, the segments of each before its live file. A live file that is not there is left out where
    there are segments, and stands for the same name with `.gz` where there are none.

    Raises:
        TraceError: if there is none.
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
    """Sorts by trace, a trace's segments by number, its live file last."""
    match = _SEGMENT.fullmatch(file.name)
    if match:
        return match["trace"], int(match["number"]), file.name
    return re.sub(r"\.jsonl(\.gz)?$", "", file.name), float("inf"), file.name


def write(path: str | os.PathLike[str], trajectories: Iterable[Trajectory]) -> int:
    """Write a trace file and return how many trajectories it holds; gzip if the name ends in `.gz`.

    Atomic: the file appears, or replaces the old one, complete and on disk, or not at all. The same trajectories give the same bytes.

    Raises:
        TraceError: if a trajectory does not fit the schema, there are none (no reader takes an empty file), or the disk refuses.
    """
    path = Path(path)
    count = 0
    try:
        with TemporaryDirectory(prefix=".trace-", dir=path.parent) as folder:  # beside the target: a rename must not cross disks
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
        note(f"left out: what came after line {number} of {file}: the compressed file is cut off")
    except (gzip.BadGzipFile, zlib.error) as error:
        problem = f"compressed file is damaged ({error})"
        raise TraceError(problem, allowed="a complete gzip file", file=file, line=number + 1) from None
    except OSError as error:
        raise _failed("read", path, error) from error
    if note is not None and first is not None:
        note(f"{torn} line{'s' if torn > 1 else ''} left out: {first}")


def decode_line(line: bytes, file: str, number: int) -> Trajectory:
    """One line of a file; says where the last one is cut off.

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
