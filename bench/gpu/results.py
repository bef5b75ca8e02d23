"""What an experiment leaves behind: one JSON file, rewritten after every row, in which each prediction stands beside its measurement.

Invariants: predictions are written before the first measurement, and no later call changes them; a file is replaced in one stroke, so a
killed run leaves the last whole one; `kind` is `measured` only on a GPU of the profile's name, anything else is a `rehearsal` and is
never shown as a GPU figure (`schema.json` ties kind and device together, `page.py` refuses). A number that does not exist is null.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from math import isfinite
from pathlib import Path
from typing import Any

SCHEMA = Path(__file__).with_name("schema.json")
MEASURED, REHEARSAL, FORECAST = "measured", "rehearsal", "forecast"
OVER = ("done", "cut", "failed")
"""States in which nothing more is written. `cut`: the deadline came first; rows so far count."""


@dataclass(frozen=True, slots=True)
class Row:
    """One quantity. `predicted` None: nobody predicts it; `measured` None: not measured. `better`: which way is good, for readers."""

    name: str
    unit: str
    predicted: float | None = None
    measured: float | None = None
    detail: Mapping[str, Any] = field(default_factory=dict)

    @property
    def error(self) -> float | None:
        """Relative: predicted / measured - 1; None where there is no such thing (a yes or no has none)."""
        if self.predicted is None or not self.measured or self.unit == "yes":
            return None
        return self.predicted / self.measured - 1.0

    def as_json(self) -> dict[str, Any]:
        """For the file."""
        told = {"name": self.name, "unit": self.unit, "predicted": self.predicted, "measured": self.measured, "error": self.error}
        return told | {"detail": dict(self.detail)}


@dataclass(frozen=True, slots=True)
class Prediction:
    """What an experiment expects: rows without measurements, and where they come from."""

    rows: tuple[Row, ...]
    source: str
    seeds: tuple[int, ...] = ()


class Record:
    """The file of one experiment under way."""

    def __init__(self, path: Path, header: Mapping[str, Any], prediction: Prediction) -> None:
        self.path = path
        self.rows = {row.name: row for row in prediction.rows}
        self.detail: dict[str, Any] = {}
        self._told = dict(header) | {
            "schema": 1,
            "status": "predicted",
            "seeds": list(prediction.seeds),
            "prediction": {"made": now(), "source": prediction.source},
            "error": None,
            "finished": None,
            "wall_s": None,
        }
        self.write()

    def put(self, name: str, measured: float | bool, unit: str | None = None, **detail: Any) -> None:
        """A measurement of a predicted row, or, with its `unit`, of a quantity nobody predicted. Written at once.

        Raises:
            ValueError: neither predicted nor given a unit, measured before, or not a finite number.
        """
        old = self.rows.get(name)
        if old is None and unit is None:
            raise ValueError(f"row {name!r} was not predicted and has no unit")
        if old is not None and old.measured is not None:
            raise ValueError(f"row {name!r} was measured before")
        value = float(measured)
        if not isfinite(value):
            raise ValueError(f"row {name!r}: {measured} is no measurement")
        self.rows[name] = Row(name, unit or (old.unit if old else ""), old.predicted if old else None, value, detail)
        shown = f"{name}: {value:.4g} {self.rows[name].unit}"
        guess = self.rows[name].predicted
        print(shown + (f" (predicted {guess:.4g})" if guess is not None else ""), flush=True)
        self.write("running")

    def note(self, **detail: Any) -> None:
        """Facts beside the rows."""
        self.detail |= detail
        self.write("running")

    def close(self, status: str, wall_s: float, error: str | None = None, **facts: Any) -> None:
        """Nothing follows; `status` is one of `OVER`."""
        self._told |= {"finished": now(), "wall_s": round(wall_s, 2), "error": error, **facts}
        self.write(status)

    def write(self, status: str | None = None) -> None:
        """To the file."""
        self._told |= {
            "status": status or self._told["status"],
            "rows": [row.as_json() for row in self.rows.values()],
            "detail": self.detail,
        }
        store(self.path, self._told)


def now() -> str:
    """UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def store(path: Path, document: Mapping[str, Any]) -> None:
    """Write JSON in one stroke; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    part.replace(path)


def read(path: Path) -> dict[str, Any]:
    """A result, checked.

    Raises:
        ValueError: not JSON, or not what `schema.json` says; one line.
        FileNotFoundError: there is none.
    """
    try:
        document: dict[str, Any] = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if problem := next(iter(problems(document)), None):
        raise ValueError(f"{path}: {problem}")
    return document


def problems(document: Any) -> Iterable[str]:
    """How a document differs from the schema; nothing when it fits."""
    import jsonschema  # here, because an installer's host may lack it

    validator = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text()))
    for error in sorted(validator.iter_errors(document), key=lambda one: [str(part) for part in one.path]):
        where = "/".join(map(str, error.path)) or "document"
        yield f"{where}: {error.message[:200]}"


def is_over(path: Path) -> bool:
    """Whether an experiment's file says that it was measured to its end."""
    try:
        return read(path)["status"] == "done"
    except (OSError, ValueError, KeyError):
        return False
