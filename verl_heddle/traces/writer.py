"""Write a run's trace in a background thread that appends, closes segments and compresses them.

Law: `put` never blocks, even on a stalled disk. Batches are written in order, in whole lines; a record that does not fit the schema is
dropped alone. When the live file (`trace.jsonl`) reaches `segment_bytes`, the next batch starts a new one: the full file is renamed to
the next `trace.0001.jsonl.gz` and then replaced by its compressed version. So every line is always in exactly one file, under a name
that `traces.io` reads (it detects gzip by content; a segment left plain by a crash is compressed when the next run starts).

`flush` waits until everything is written: before the last step of a run ends, at every checkpoint, and when the process exits. Once
`MOST_PENDING` batches wait for a stalled disk, further ones are dropped rather than kept in memory, and reported as failures.
"""

from __future__ import annotations

import atexit
import gzip
import os
import queue
import shutil
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from verl_heddle.traces.columns import Columns
from verl_heddle.traces.io import segment, segments
from verl_heddle.traces.schema import encode

MOST_PENDING = 8
"""Limit on pending batches (one per step or validation): a disk this far behind has stalled."""

FLUSH_S = 120.0
"""Default timeout of `flush`. A batch of 10,000 trajectories with 20 turns each takes about 5 s to write."""

CHUNK_BYTES = 2**20
"""Size of one write: large enough for few calls, small enough in memory."""

_GZIP_MAGIC = b"\x1f\x8b"

_writers: weakref.WeakSet[TraceWriter] = weakref.WeakSet()


class TraceWriter:
    """Writer of one trace file.

    Args:
        path: the live file; its folder is created.
        segment_bytes: size at which the live file is closed and compressed; 0: never.
        failed: called with each error: from `put` if the batch is dropped, otherwise in the writer's thread.
    """

    def __init__(self, path: str | os.PathLike[str], segment_bytes: int, failed: Callable[[Exception], None]) -> None:
        self._path, self._segment_bytes, self._failed = Path(path), segment_bytes, failed
        self._batches: queue.Queue[tuple[Columns, dict[str, Any]]] = queue.Queue()
        self._done = threading.Condition()
        self._pending = 0
        self._thread: threading.Thread | None = None
        _writers.add(self)

    def put(self, records: Columns, meta: dict[str, Any]) -> None:
        """Queue records for writing; `meta` is merged into the `meta` of each."""
        with self._done:
            if self._pending >= MOST_PENDING:
                return self._failed(OSError(f"{self._path}: {self._pending} batches are waiting to be written; this one is dropped"))
            self._pending += 1
        self._batches.put((records, meta))
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="heddle-trace", daemon=True)
            self._thread.start()

    def flush(self, timeout_s: float = FLUSH_S) -> bool:
        """Wait until everything is written; False on timeout."""
        with self._done:
            return self._done.wait_for(lambda: not self._pending, timeout_s)

    def _run(self) -> None:
        self._guarded(self._compress_leftovers)
        while True:
            records, meta = self._batches.get()
            try:
                self._guarded(lambda records=records, meta=meta: self._write(records, meta))  # type: ignore[misc]
            finally:
                del records, meta
                with self._done:
                    self._pending -= 1
                    self._done.notify_all()

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            self._failed(error)

    def _write(self, records: Columns, meta: dict[str, Any]) -> None:
        os.makedirs(self._path.parent, exist_ok=True)
        if self._segment_bytes and self._path.exists() and self._path.stat().st_size >= self._segment_bytes:
            self._guarded(self._close_segment)
        with open(self._path, "ab") as file:
            lines, size = [], 0
            for record in records.records():
                record.meta.update(meta)
                try:
                    line = encode(record, file=str(self._path))
                except Exception as error:
                    self._failed(error)
                    continue
                lines.append(line)
                size += len(line)
                if size >= CHUNK_BYTES:
                    file.write(b"".join(lines))
                    lines, size = [], 0
            file.write(b"".join(lines))

    def _close_segment(self) -> None:
        closed = segments(self._path)
        last = int(closed[-1].name.split(".")[-3]) if closed else 0
        name = segment(self._path, last + 1)
        os.rename(self._path, name)
        _compress(name)

    def _compress_leftovers(self) -> None:
        for file in segments(self._path):
            with open(file, "rb") as content:
                plain = content.read(2) != _GZIP_MAGIC
            if plain:
                _compress(file)


def _compress(file: Path) -> None:
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with open(file, "rb") as plain, open(draft, "wb") as raw, gzip.GzipFile("", "wb", 6, raw, mtime=0) as packed:
            shutil.copyfileobj(plain, packed, CHUNK_BYTES)
        os.replace(draft, file)
    finally:
        draft.unlink(missing_ok=True)


def flush_all(timeout_s: float = FLUSH_S) -> bool:
    """Flush every writer of this process; False if any times out."""
    return all([writer.flush(timeout_s) for writer in list(_writers)])


atexit.register(flush_all)
