"""What is told while runs are made: one line at each milestone, each step's rollout as it ends (not more often than a reader wants)."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

EVERY_S = 15.0
"""Steps are told at most so often; the first one of a run always."""

MILESTONES = (
    (re.compile(rb"Started a local Ray instance|Connected to Ray cluster"), "Ray is up; trainer and engines are starting"),
    (re.compile(rb"LLMServerManager: \["), "engines are up"),
    (re.compile(rb"heddle: ([^\r\n]*(?:OFF|error:|warning:)[^\r\n]*)"), None),
)
"""Lines of a run's log worth repeating; None: the line itself."""

Say = Callable[[str], None]


class Progress:
    """Follows one run through its log and its metrics file; call it often."""

    def __init__(self, say: Say, steps: int | None, log: Path, metrics: Path) -> None:
        self._say, self._steps = say, steps
        self._start = time.monotonic()
        self._told = float("-inf")
        self._log, self._metrics = Follower(log), Follower(metrics)
        self._seen: set[str] = set()
        self.last_step = 0

    def __call__(self) -> None:
        """Tell what is new."""
        for line in self._log():
            for pattern, text in MILESTONES:
                if (found := pattern.search(line)) and (told := text or found[1].decode("utf-8", "replace").strip()) not in self._seen:
                    self._seen.add(told)
                    self._line(told)
        for line in self._metrics():
            self._step(line)

    def _step(self, line: bytes) -> None:
        record = decoded(line)
        if record is None or "timing_s/step" not in record["data"]:
            return
        self.last_step, data, now = record["step"], record["data"], time.monotonic()
        if now - self._told < EVERY_S and self.last_step != self._steps:
            return
        self._told = now
        of = f" of {self._steps}" if self._steps else ""
        what = f"step {data['timing_s/step']:.2f} s"
        if (rollout := data.get("heddle/makespan_s")) is not None:
            what = f"rollout {rollout:.2f} s"
        elif (rate := data.get("heddle/trained/tokens_per_s")) is not None:
            what = f"trained on {rate:.0f} tokens/s"
        self._line(f"step {self.last_step}{of}: {what}")

    def _line(self, text: str) -> None:
        self._say(f"{time.monotonic() - self._start:5.0f} s  {text}")


class Follower:
    """The whole lines added to a file since the last call; a file that does not exist yet has none."""

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
    """A line of verl's `file` logger, {"step": n, "data": {name: number}}; None for anything else (a torn last line)."""
    try:
        record = json.loads(line)
        return record if type(record["step"]) is int and isinstance(record["data"], dict) else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def duration(seconds: float) -> str:
    """As "45 s", "12 min", "2 h 05 min"."""
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 120 else f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"
