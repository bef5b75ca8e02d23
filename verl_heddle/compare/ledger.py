"""Records the state of each run as `run.json` in the run's folder.

The file is replaced atomically, so after a crash it says `running` or the true outcome. States: `running` (started; without a live process
it was interrupted), `finished` (exit code 0 and metrics present), `failed`.
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
"""Upper limit of a valid time in seconds: unix time in the year 5138."""


@dataclass(frozen=True, slots=True)
class Entry:
    """The state of one run. `began` is unix time; `why` is the cause of a failure, in one line."""

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
        """The folder of a run's files."""
        return self._out / "runs" / key.folder

    def entry(self, key: Key) -> Entry | None:
        """The recorded state of a run; None if it was never started or its file is unreadable."""
        try:
            value: dict[str, Any] = json.loads((self.folder(key) / FILE).read_text(encoding="utf-8"))
            entry = Entry(**{**value, "command": tuple(value["command"])})
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            return None
        return entry if _sound(entry) else None

    def finished(self, key: Key) -> bool:
        """Whether the run has finished and need not be repeated."""
        entry = self.entry(key)
        return entry is not None and entry.state == "finished"

    def fresh(self, key: Key) -> Path:
        """Create an empty folder for a run; files of an interrupted or failed attempt are removed.

        Raises:
            ValueError: the folder holds files that are not a run's.
        """
        folder = self.folder(key)
        old = folder.with_name(f".{folder.name}.old")  # renamed before deletion: a crash must not leave half a run under this name
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            if not (folder / FILE).exists() and any(not item.name.startswith(".") for item in folder.iterdir()):
                raise ValueError(f"{folder} exists and is not a run of a comparison: move it away or use a different --out")
            folder.rename(old)
            shutil.rmtree(old, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def write(self, key: Key, entry: Entry) -> None:
        """Record the state of a run."""
        write_json(self.folder(key) / FILE, asdict(entry))


def _sound(entry: Entry) -> bool:
    """Whether each field has its declared type; readers of an entry do not check again."""

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
