"""What became of each run, in its own folder as `run.json`. Written in one stroke, so a crash leaves `running` or the truth.

States: `running` (begun; without a live process it was interrupted), `finished` (exit 0 and the numbers are there), `failed`.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from verl_heddle.compare.plan import Key, write_json

FILE = "run.json"
STATES = ("running", "finished", "failed")
MOST_S = 1e11
"""Unix time in the year 5138."""


@dataclass(frozen=True, slots=True)
class Entry:
    """`began` is unix time. `why`: of a failed run, in one line."""

    state: str
    began: float
    seconds: float | None = None
    attempts: int = 1
    code: int | None = None
    why: str = ""
    pid: int | None = None
    command: tuple[str, ...] = ()


class Ledger:
    """The runs of the comparison in `out`."""

    def __init__(self, out: Path) -> None:
        self._out = out

    def folder(self, key: Key) -> Path:
        """Where a run's files are."""
        return self._out / "runs" / key.folder

    def entry(self, key: Key) -> Entry | None:
        """What is known of a run; None if it was never begun, or its file cannot be read."""
        try:
            value: dict[str, Any] = json.loads((self.folder(key) / FILE).read_text(encoding="utf-8"))
            entry = Entry(**{**value, "command": tuple(value["command"])})
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            return None
        return entry if _sound(entry) else None

    def finished(self, key: Key) -> bool:
        """Whether the run need not be made again."""
        entry = self.entry(key)
        return entry is not None and entry.state == "finished"

    def fresh(self, key: Key) -> Path:
        """An empty folder for a run; what an interrupted or failed one left is removed.

        Raises:
            ValueError: something is there that we did not make.
        """
        folder = self.folder(key)
        old = folder.with_name(f".{folder.name}.old")  # renamed before it is emptied: a crash must not leave half a run under its name
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            if not (folder / FILE).exists() and any(not item.name.startswith(".") for item in folder.iterdir()):
                raise ValueError(f"{folder} exists and is not a run of a comparison: move it away or use another --out")
            folder.rename(old)
            shutil.rmtree(old, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def write(self, key: Key, entry: Entry) -> None:
        """Record a state."""
        write_json(self.folder(key) / FILE, asdict(entry))


def _sound(entry: Entry) -> bool:
    """Whether each field is of its type, as nobody who reads an entry looks again."""

    def seconds(value: object) -> bool:
        return isinstance(value, int | float) and type(value) is not bool and 0 <= value < MOST_S

    whole = (entry.attempts, entry.code or 0, entry.pid or 0)
    return (
        entry.state in STATES
        and seconds(entry.began)
        and (entry.seconds is None or seconds(entry.seconds))
        and all(type(value) is int for value in whole)
        and all(isinstance(word, str) for word in (entry.why, *entry.command))
    )
