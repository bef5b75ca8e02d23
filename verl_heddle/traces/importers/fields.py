"""Extract values from foreign JSON, where any value may be missing or have the wrong type."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

from verl_heddle.traces.schema import MAX_DEPTH, MAX_TOKENS, MAX_UNIX_S

LARGEST = 1e300
"""Largest number the trace schema accepts."""


def get(value: Any, *path: str | int) -> Any:
    """The value at this path of keys and indices; None if there is none."""
    for key in path:
        try:
            value = value[key]
        except (KeyError, IndexError, TypeError):
            return None
    return value


def items(value: Any) -> list[Any]:
    """The list itself; empty if the value is not a list."""
    return value if isinstance(value, list) else []


def count(value: Any) -> int | None:
    """A token count; None if the value is not one."""
    if type(value) is int:  # nearly all are
        return value if 0 <= value <= MAX_TOKENS else None
    number = real(value)
    return int(number) if number is not None and 0 <= number <= MAX_TOKENS and number == int(number) else None


def real(value: Any) -> float | None:
    """A finite number, possibly given as text; None if the value is not one."""
    if type(value) is float:
        return value if abs(value) <= LARGEST else None  # NaN fails the comparison
    if isinstance(value, bool):
        return float(value)
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    if not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if abs(number) <= LARGEST else None  # NaN fails the comparison


def text(value: Any, depth: int = 0) -> str:
    """All text of a message's content: strings, lists of parts, and JSON for anything else; empty beyond `MAX_DEPTH`."""
    if depth > MAX_DEPTH:
        return ""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "\n".join(filter(None, (text(part, depth + 1) for part in value)))
    if isinstance(value, dict):
        for key in ("text", "content", "thinking", "reasoning", "output"):
            if isinstance(value.get(key), str | list):
                return text(value[key], depth + 1)
    try:
        return json.dumps(value, ensure_ascii=False, default=str)
    except RecursionError:
        return ""


def name(value: Any) -> str | None:
    """Non-empty text; None for anything else."""
    return value if isinstance(value, str) and value else None


def unix_s(value: Any) -> float | None:
    """A timestamp in Unix seconds, from seconds, milliseconds (numbers above `MAX_UNIX_S`) or ISO 8601 (UTC if without a zone)."""
    number = real(value)
    if number is not None and not isinstance(value, bool):
        return number / 1000 if number > MAX_UNIX_S else number
    if not isinstance(value, str):
        return None
    try:
        moment = datetime.fromisoformat(value)
    except ValueError:
        return None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
