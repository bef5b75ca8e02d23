"""Values out of other people's JSON, where anything may be missing or of another type."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

from verl_heddle.traces.schema import MAX_DEPTH, MAX_TOKENS, MAX_UNIX_S

LARGEST = 1e300
"""The trace schema takes no larger number."""


def get(value: Any, *path: str | int) -> Any:
    """What lies below these keys and indices; None where there is nothing."""
    for key in path:
        try:
            value = value[key]
        except (KeyError, IndexError, TypeError):
            return None
    return value


def items(value: Any) -> list[Any]:
    """What is in a list; nothing where it is none."""
    return value if isinstance(value, list) else []


def count(value: Any) -> int | None:
    """A number of tokens; None for what is none."""
    if type(value) is int:  # nearly all are
        return value if 0 <= value <= MAX_TOKENS else None
    number = real(value)
    return int(number) if number is not None and 0 <= number <= MAX_TOKENS and number == int(number) else None


def real(value: Any) -> float | None:
    """A finite number, also as text; None for what is none."""
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
    """Everything that is said in a message's content: text, lists of parts, and JSON of what else there is; nothing below `MAX_DEPTH`."""
    if depth > MAX_DEPTH:
        return ""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "\n".join(filter(None, (text(one, depth + 1) for one in value)))
    if isinstance(value, dict):
        for key in ("text", "content", "thinking", "reasoning", "output"):
            if isinstance(value.get(key), str | list):
                return text(value[key], depth + 1)
    try:
        return json.dumps(value, ensure_ascii=False, default=str)
    except RecursionError:
        return ""


def name(value: Any) -> str | None:
    """A name, None for what is none."""
    return value if isinstance(value, str) and value else None


def unix_s(value: Any) -> float | None:
    """A time of day: unix seconds, milliseconds (what is later than the trace schema takes) or ISO 8601 (UTC where it names no zone)."""
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
