"""Read the documents of a JSON Lines, single-value JSON or CSV file, plain or gzip, one line at a time."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

from verl_heddle.traces.schema import TraceError

MAX_LINE_BYTES = 64 * 2**20
"""Longest line of JSON Lines: a whole conversation with its text."""

MAX_DOCUMENT_BYTES = 2**30
"""Largest single-value JSON file, which must fit in memory at once."""

_GZIP_MAGIC = b"\x1f\x8b"


@dataclass(frozen=True, slots=True)
class Document:
    """A JSON value, or a CSV row as a dict of text, with its position. `line`: from 1; 0 for a single-value file."""

    value: Any
    file: str
    line: int

    def list_of(self, value: Any, what: str, field: str) -> list[Any]:
        """Return `value`, which must be a list of `what`.

        Raises:
            TraceError: it is not a list.
        """
        if not isinstance(value, list):
            self.fault(f"got {type(value).__name__}", field=field, allowed=f"a list of {what}")
        return value

    def fault(self, problem: str, *, field: str = "", allowed: str = "") -> NoReturn:
        """Reject the document.

        Raises:
            TraceError: always.
        """
        raise TraceError(problem, allowed=allowed, field=field, file=self.file, line=self.line or None)


def documents(path: Path) -> Iterator[Document]:
    """Yield the documents in order; a file with one JSON list or object is one document.

    Raises:
        TraceError: the file is missing, unreadable, not text, truncated, too long, or neither JSON nor CSV with a header.
    """
    file = str(path)
    try:
        with open(path, "rb") as raw:
            packed = raw.peek(len(_GZIP_MAGIC)).startswith(_GZIP_MAGIC)
            yield from _documents(gzip.GzipFile(fileobj=raw) if packed else raw, file)  # type: ignore[arg-type]
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise TraceError(f"compressed file is cut off or damaged ({error})", allowed="a complete gzip file", file=file) from None
    except OSError as error:
        raise TraceError(f"cannot be read ({error.strerror or error})", file=file) from None


def _documents(stream: IO[bytes], file: str) -> Iterator[Document]:
    number = 0
    while first := _line(stream, file, number := number + 1):
        if not first.isspace():
            break
    else:
        raise TraceError("empty file", allowed="at least one trajectory", file=file)
    text = _text(first, file, number)
    if text.lstrip()[0] not in "{[":
        yield from _rows(text, stream, file, number)
        return
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        yield Document(_whole(first, stream, file), file, 0)
        return
    if number == 1 and isinstance(value, list) and not stream.read(1024).strip():
        yield Document(value, file, 0)
        return
    if isinstance(value, list):
        raise TraceError("got a list", allowed="JSON Lines of objects, or one JSON value", file=file, line=number)
    yield Document(value, file, number)
    while line := _line(stream, file, number := number + 1):
        if not line.isspace():
            yield Document(_json(_text(line, file, number), file, number), file, number)


def _line(stream: IO[bytes], file: str, number: int) -> bytes:
    line = stream.readline(MAX_LINE_BYTES + 1)
    if len(line) > MAX_LINE_BYTES:
        raise TraceError(
            f"a line of more than {MAX_LINE_BYTES // 2**20} MiB", allowed="JSON Lines, or one JSON value", file=file, line=number
        )
    return line


def _text(line: bytes, file: str, number: int) -> str:
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError:
        raise TraceError("not UTF-8 text", allowed="JSON Lines, one JSON value, or CSV", file=file, line=number) from None


def _json(text: str, file: str, number: int) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        column = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        raise TraceError(f"not JSON{column}", allowed="one JSON object per line", file=file, line=number) from None


def _whole(first: bytes, stream: IO[bytes], file: str) -> Any:
    """Read one JSON value that spans several lines."""
    data = first + stream.read(MAX_DOCUMENT_BYTES)
    if len(data) > MAX_DOCUMENT_BYTES:
        raise TraceError(f"one JSON value of more than {MAX_DOCUMENT_BYTES // 2**20} MiB", allowed="JSON Lines", file=file)
    try:
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise TraceError("not UTF-8 text", allowed="JSON Lines, one JSON value, or CSV", file=file) from None
    except (ValueError, RecursionError) as error:
        line = error.lineno if isinstance(error, json.JSONDecodeError) else None
        raise TraceError("not JSON", allowed="JSON Lines, or one JSON value", file=file, line=line) from None


def _rows(head: str, stream: IO[bytes], file: str, number: int) -> Iterator[Document]:
    names = next(csv.reader([head]), [])
    if len(names) < 2 or not all(name.strip().isprintable() and name.strip() for name in names):
        raise TraceError("neither JSON nor CSV", allowed="JSON Lines, one JSON value, or CSV with a header", file=file, line=number)
    names = [name.strip() for name in names]
    try:
        for row in csv.reader(io.TextIOWrapper(stream, encoding="utf-8", newline="")):  # type: ignore[type-var]
            number += 1
            if row:
                if len(row) != len(names):
                    raise TraceError(f"{len(row)} values", allowed=f"{len(names)}, as in the header", file=file, line=number)
                yield Document(dict(zip(names, row, strict=True)), file, number)
    except UnicodeDecodeError:
        raise TraceError("not UTF-8 text", allowed="CSV", file=file, line=number + 1) from None
    except csv.Error as error:
        raise TraceError(f"not CSV ({error})", allowed="CSV with a header", file=file, line=number + 1) from None
