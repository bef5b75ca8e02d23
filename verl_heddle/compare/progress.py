"""Progress lines while a run executes: one per milestone, and one per finished step, at most every `EVERY_S`."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

EVERY_S = 15.0
"""Shortest time between two step lines; the first and the last step of a run are always printed."""

MILESTONES = (
    (re.compile(rb"Started a local Ray instance|Connected to Ray cluster"), "Ray is up; trainer and engines are starting"),
    (re.compile(rb"LLMServerManager: \["), "engines are up"),
    (re.compile(rb"heddle: ([^\r\n]*(?:OFF|error:|warning:)[^\r\n]*)"), None),
)
"""Patterns of log lines to report, and the text to print; None prints the matched part of the line."""

Log = Callable[[str], None]


class Progress:
    """Follows one run through its log and its metrics file; call it periodically."""

    def __init__(self, log: Log, steps: int | None, log_file: Path, metrics: Path) -> None:
        self._emit, self._steps = log, steps
        self._start = time.monotonic()
        self._printed = float("-inf")
        self._log, self._metrics = Follower(log_file), Follower(metrics)
        self._seen: set[str] = set()
        self.last_step = 0

    def __call__(self) -> None:
        """Print what is new since the last call."""
        for line in self._log():
            for pattern, text in MILESTONES:
                if (found := pattern.search(line)) and (message := text or found[1].decode("utf-8", "replace").strip()) not in self._seen:
                    self._seen.add(message)
                    self._line(message)
        for line in self._metrics():
            self._step(line)

    def _step(self, line: bytes) -> None:
        record = decoded(line)
        if record is None or "timing_s/step" not in record["data"]:
            return
        self.last_step, data, now = record["step"], record["data"], time.monotonic()
        if now - self._printed < EVERY_S and self.last_step != self._steps:
            return
        self._printed = now
        of = f" of {self._steps}" if self._steps else ""
        what = f"step {data['timing_s/step']:.2f} s"
        if (rollout := data.get("heddle/makespan_s")) is not None:
            what = f"rollout {rollout:.2f} s"
        elif (rate := data.get("heddle/trained/tokens_per_s")) is not None:
            what = f"trained on {rate:.0f} tokens/s"
        self._line(f"step {self.last_step}{of}: {what}")

    def _line(self, text: str) -> None:
        self._emit(f"{time.monotonic() - self._start:5.0f} s  {text}")


class Follower:
    """Returns the complete lines added to a file since the last call; none while the file does not exist."""

    def __init__(self, path: Path) -> None:
        self._path, self._at, self._rest = path, 0, b""

    def __call__(self) -> list[bytes]:
        try:
            with open(self._path, "rb") as file:
                file.seek(self._at)
                data = file.read()
        except OSError:
            return []
        self._at += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        return lines


def decoded(line: bytes) -> dict[str, Any] | None:
    """A line of verl's `file` logger, {"step": n, "data": {name: number}}; None for anything else, such as a torn last line."""
    try:
        record = json.loads(line)
        return record if type(record["step"]) is int and isinstance(record["data"], dict) else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def duration(seconds: float) -> str:
    """A duration as "45 s", "12 min" or "2 h 05 min"."""
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 120 else f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"
