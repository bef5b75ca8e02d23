"""Validate, encode and decode traces: one `Trajectory` per JSON line.

A line holds exactly the fields of `Trajectory` and `Turn`, in that order. All fields of a trajectory and the first four of a turn
are required; the other turn fields are omitted when None or False. Unknown fields are allowed only inside `meta`: anywhere else a
misspelt field would silently read as "unknown". The `meta` fields that a live run writes are validated too (`_META`), so readers of a
trace need not check them; each may be missing, and null is read as missing.

Source of the schema: the public traces it was designed for (see `describe`), plus what a live run records about a turn.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from math import isfinite
from sys import intern
from typing import Any, NamedTuple

from verl_heddle.schedule.preempt import Rule as PreemptRule
from verl_heddle.schedule.resident import ORDERS as RESIDENT_ORDERS
from verl_heddle.trajectory import Outcome, Trajectory, Turn

MAX_LINE_BYTES = 4 * 2**20
"""Longest line read or written. A live turn takes about 450 bytes, so this is 9,000 turns, 70 times the longest line of the public
traces. It also bounds the memory spent on a file without newlines."""

MAX_TOKENS = 2**40
"""Largest token count: far above any context, and sums over a trace stay exact in a float64 (2**53)."""

MAX_SECONDS = 1e9
"""Longest duration, 30 years: below today's Unix time, so a timestamp in a duration field is rejected."""

MAX_UNIX_S = 1e11
"""Latest timestamp, the year 5138: a time in milliseconds is rejected. Simulated steps start at 0."""

MAX_SLOTS, MAX_DEGREE, MAX_REPLICAS = 2**20, 2**10, 2**12
"""Largest recorded engine settings: far above any real engine, and small enough to simulate."""

MAX_DEPTH = 100
"""Deepest nesting inside `meta`: below the limit of JSON parsers, and low enough to reject a self-referencing object quickly."""

PSEUDO_TOOLS = frozenset({"human", "next_user_turn", "user"})
"""Tool names that stand for a person (real, scripted or simulated). Excluded from all tool-time statistics."""

_SHOWN = 60  # characters of a value quoted in an error: recognisable, and the message stays on one line


class TraceError(ValueError):
    """A trace cannot be read or written. One-line message: file, line number, field, problem, allowed values."""

    def __init__(self, problem: str, *, allowed: str = "", field: str = "", file: str | None = None, line: int | None = None) -> None:
        place = ":".join(str(part) for part in (file, line) if part is not None)
        super().__init__(plain(": ".join(part for part in (place, field, problem) if part) + (f"; allowed: {allowed}" if allowed else "")))
        self.problem, self.allowed, self.field, self.file, self.line = problem, allowed, field, file, line


class UnreadableError(TraceError):
    """A line is not JSON; if other lines of the file are valid, it was most likely torn by an interrupted write."""


def plain(text: object) -> str:
    """Text from a trace made safe for a terminal: control characters, line breaks and lone surrogates are escaped."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in str(text))


class _Rule(NamedTuple):
    holds: Callable[[Any], bool]
    allowed: str


class _Fault(NamedTuple):
    field: str
    problem: str
    allowed: str


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_TOKENS


def _is_number(value: Any, low: float, high: float) -> bool:
    return isinstance(value, int | float) and type(value) is not bool and low <= value <= high  # NaN fails the comparison


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _is_rule(value: Any) -> bool:
    """Whether `schedule.preempt.Rule` accepts these settings."""
    try:
        return isinstance(value, dict) and bool(PreemptRule.of(value))
    except (ValueError, OverflowError):
        return False


def _or_null(rule: _Rule) -> _Rule:
    return _Rule(lambda value: value is None or rule.holds(value), f"{rule.allowed}, or null")


def _one_of(*names: str) -> _Rule:
    return _Rule(lambda value: isinstance(value, str) and value in names, f"one of {', '.join(names)}")


def _up_to(most: int) -> _Rule:
    return _Rule(lambda value: type(value) is int and 1 <= value <= most, f"a whole number from 1 to {most}")


_NAME = _Rule(_is_name, "non-empty text")
_TRIAL = _Rule(lambda value: _is_count(value) or _is_name(value), "a whole number from 0, or a name")
_COUNT = _or_null(_Rule(_is_count, "a whole number from 0 to 2**40"))
_SECONDS = _or_null(_Rule(lambda value: _is_number(value, 0, MAX_SECONDS), "seconds from 0 to 1e9"))
_TOKENS = _or_null(_Rule(lambda value: _is_number(value, 0, MAX_TOKENS), "tokens from 0 to 2**40"))
_REWARD = _or_null(_Rule(lambda value: _is_number(value, -1e300, 1e300), "a finite number"))
_PRIORITY = _or_null(_Rule(lambda value: type(value) is int and abs(value) < 2**63, "a whole number of 64 bits"))
_TEXT = _or_null(_NAME)
_TOOL = _or_null(_Rule(lambda value: isinstance(value, str), "text"))  # empty: a public source without the tool name
_FLAG = _Rule(lambda value: type(value) is bool, "true or false")

_TOP: Mapping[str, _Rule] = {
    "source": _NAME,
    "workload": _NAME,
    "prompt_id": _NAME,
    "trial": _TRIAL,
    "prompt_tokens": _COUNT,
    "steps": _Rule(lambda value: isinstance(value, list), "a list of turns"),
    "reward": _REWARD,
    "model": _TEXT,
    "meta": _Rule(lambda value: isinstance(value, dict), "an object"),
}
_STEP: Mapping[str, _Rule] = {
    "input_tokens": _COUNT,
    "output_tokens": _COUNT,
    "tool": _TOOL,
    "tool_latency_s": _SECONDS,
    "gen_s": _SECONDS,
    "ctx_tokens": _COUNT,
    "ctx_reset": _FLAG,
    "output_est": _FLAG,
    "route_s": _SECONDS,
    "queue_s": _SECONDS,
    "transport_s": _SECONDS,
    "between_s": _SECONDS,
    "replica": _TEXT,
    "priority": _PRIORITY,
    "reason": _TEXT,
    "predicted_remaining": _TOKENS,
    "predicted_upper": _TOKENS,
    "preemptions": _COUNT,
    "cached_tokens": _COUNT,
    "start_s": _SECONDS,
    "legs": _COUNT,
    "paused_s": _SECONDS,
    "reread_tokens": _COUNT,
    "weights": _TEXT,
}
_WHEN = _or_null(_Rule(lambda value: _is_number(value, 0, MAX_UNIX_S), "unix time in seconds"))
_MAYBE = _or_null(_FLAG)
_META: Mapping[str, _Rule] = {
    "uid": _or_null(_TRIAL),
    "run": _TEXT,
    "step": _COUNT,
    "validate": _MAYBE,
    "outcome": _or_null(_one_of(*Outcome)),
    "truncated": _MAYBE,
    "kept": _MAYBE,
    "start_s": _WHEN,
    "end_s": _WHEN,
    "setup_s": _SECONDS,
    "score_s": _SECONDS,
    "wait_s": _SECONDS,
    "tp": _or_null(_up_to(MAX_DEGREE)),
    "slots": _or_null(_up_to(MAX_SLOTS)),
    "replicas": _or_null(_up_to(MAX_REPLICAS)),
    "order": _or_null(_one_of("fcfs", "priority")),
    "utilization": _or_null(_Rule(lambda value: _is_number(value, 0, 1) and value > 0, "above 0, at most 1")),
    "kv_tokens": _or_null(_up_to(MAX_TOKENS)),
    "residents": _or_null(_Rule(lambda value: value is False or value in RESIDENT_ORDERS, "false, or a residency order")),
    "per_slot": _or_null(_Rule(lambda value: _is_number(value, 0, MAX_SLOTS), "turns per slot from 0")),
    "preempt": _or_null(_Rule(lambda value: value is False or _is_rule(value), "false, or settings for preemption on arrival")),
}
_REPEATED = ("tool", "replica", "reason", "weights")
"""Text fields that repeat across turns. Interning them and the names in `meta` saves a third of the memory of a long trace."""
_STEP_REQUIRED = tuple(_STEP)[:4]
_STEP_OPTIONAL = tuple(_STEP)[4:]


def from_dict(record: object, *, file: str | None = None, line: int | None = None) -> Trajectory:
    """Convert the JSON object of one line to a trajectory. `file` and `line` are used only in errors.

    Raises:
        TraceError: at the first field that is missing, unknown, of the wrong type, negative, NaN or infinite.
    """
    fields = _checked(record, file, line)
    meta = {intern(name): value for name, value in fields["meta"].items() if value is not None or name not in _META}
    for step in fields["steps"]:
        for name in _REPEATED:
            if type(text := step.get(name)) is str:
                step[name] = intern(text)
    return Trajectory(**{**fields, "steps": tuple(Turn(**step) for step in fields["steps"]), "meta": meta})


def to_dict(trajectory: Trajectory, *, file: str | None = None, line: int | None = None) -> dict[str, Any]:
    """The JSON object of a trajectory, validated by the rules of `from_dict`, so that everything written can be read."""
    record = {name: getattr(trajectory, name) for name in _TOP}
    record["steps"] = [_step_to_dict(turn) for turn in trajectory.steps]
    return _checked(record, file, line)


def encode(trajectory: Trajectory, *, file: str | None = None, line: int | None = None) -> bytes:
    """Encode one line, newline included, as ASCII; any number of lines can be appended to a file in one write.

    Raises:
        TraceError: for a value that does not fit the schema, `meta` that is not JSON, or a line over `MAX_LINE_BYTES`.
    """
    record = to_dict(trajectory, file=file, line=line)
    try:
        text = json.dumps(record, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise TraceError(f"not JSON ({_clip(str(error))})", allowed="JSON values", field="meta", file=file, line=line) from None
    if len(text) + 1 > MAX_LINE_BYTES:
        raise too_long(file, line)
    return text.encode("ascii") + b"\n"


def decode(text: bytes, *, file: str | None = None, line: int | None = None) -> Trajectory:
    """Decode one line, with or without its newline.

    Raises:
        UnreadableError: the bytes are not UTF-8 or not JSON.
        TraceError: the JSON is not one object, or not a trajectory.
    """
    try:
        record = _JSON.decode(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        problem = f"not UTF-8 text (byte 0x{text[error.start]:02x} at column {error.start + 1})"
    except json.JSONDecodeError as error:
        bom = "UTF-8 byte-order mark" if text.startswith(b"\xef\xbb\xbf") else error.msg
        problem = f"not JSON ({bom} at column {error.colno})"
    except ValueError as error:  # a duplicate key, or a number with thousands of digits
        problem = f"not JSON ({_clip(str(error))})"
    except RecursionError:
        problem = "not a trajectory (JSON nested too deeply)"
    else:
        return from_dict(_encodable(record) if rb"\ud" in text or rb"\uD" in text else record, file=file, line=line)
    raise UnreadableError(problem, allowed="one JSON object per line, UTF-8", file=file, line=line) from None


def _encodable(value: Any) -> Any:
    """Replace lone surrogates, which no page or table can encode, in all text outside `meta`."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, list):
        return [_encodable(item) for item in value]
    if isinstance(value, dict):
        return {name: item if name == "meta" else _encodable(item) for name, item in value.items()}
    return value


def too_long(file: str | None, line: int | None) -> TraceError:
    """The error for a line over `MAX_LINE_BYTES`."""
    limit = f"lines of at most {MAX_LINE_BYTES} bytes"
    return TraceError("line too long; is this a trace file?", allowed=limit, file=file, line=line)


def _step_to_dict(turn: Turn) -> dict[str, Any]:
    step = {name: getattr(turn, name) for name in _STEP_REQUIRED}
    for name in _STEP_OPTIONAL:
        value = getattr(turn, name)
        if value is not None and value is not False:
            step[name] = value
    return step


def _checked(record: object, file: str | None, line: int | None) -> dict[str, Any]:
    """Return `record` unchanged if every rule holds; raise for the first that fails."""
    for field, problem, allowed in _faults(record):
        raise TraceError(problem, allowed=allowed, field=field, file=file, line=line)
    fields: dict[str, Any] = record  # type: ignore[assignment]  # an object, or a fault would have been raised
    return fields


def _faults(record: Any) -> Iterator[_Fault]:
    """Broken rules, evaluated lazily: later checks rely on earlier ones having passed."""
    if fault := _fault(record, _TOP, tuple(_TOP), ""):
        yield fault
    for index, step in enumerate(record["steps"]):
        if fault := _fault(step, _STEP, _STEP_REQUIRED, f"steps[{index}]"):
            yield fault
    for name, value in record["meta"].items():
        if name in _META and not _META[name].holds(value):
            yield _Fault(f"meta.{name}", f"got {_shown(value)}", _META[name].allowed)
    if fault := _meta_fault(record["meta"]):
        yield fault


def _fault(record: object, rules: Mapping[str, _Rule], required: tuple[str, ...], place: str) -> _Fault | None:
    if not isinstance(record, dict):
        return _Fault(place, f"got {_shown(record)}", "an object")
    prefix = f"{place}." if place else ""
    for name, value in record.items():
        rule = rules.get(name)
        if rule is None:
            return _Fault(prefix + _clip(str(name)), "unknown field", ", ".join(rules) + ("" if place else " (put other fields into meta)"))
        if not rule.holds(value):
            return _Fault(prefix + name, f"got {_shown(value)}", rule.allowed)
    for name in required:
        if name not in record:
            return _Fault(prefix + name, "missing", rules[name].allowed)
    return None


def _meta_fault(meta: dict[str, Any]) -> _Fault | None:
    """Check `meta`: any JSON except non-finite numbers (which Python's JSON accepts) and non-text keys."""
    todo: list[tuple[str, int, Any]] = [("meta", 0, meta)]
    while todo:
        place, depth, value = todo.pop()
        if depth > MAX_DEPTH:
            return _Fault(_clip(place), "nested too deeply", f"{MAX_DEPTH} levels")
        if isinstance(value, float) and not isfinite(value):
            return _Fault(_clip(place), f"got {_shown(value)}", "a finite number")
        if isinstance(value, dict):
            if not all(isinstance(key, str) for key in value):
                return _Fault(_clip(place), "got a non-text key", "text keys")
            todo += ((f"{_clip(place)}.{_clip(key)}", depth + 1, item) for key, item in value.items())
        elif isinstance(value, list | tuple):
            todo += ((f"{_clip(place)}[]", depth + 1, item) for item in value)
    return None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record: dict[str, Any] = {}
    for name, value in pairs:
        if name in record:
            raise ValueError(f"duplicate key {_shown(name)}")
        record[name] = value
    return record


_JSON = json.JSONDecoder(object_pairs_hook=_unique)


def _shown(value: object) -> str:
    """Short description of a bad value, in JSON terms."""
    if isinstance(value, dict | list | tuple):
        return "an object" if isinstance(value, dict) else "a list"
    if isinstance(value, int) and abs(value) >= 10**_SHOWN:
        return "a number with more than 60 digits"
    if isinstance(value, str):
        return repr(_clip(value))
    return {"None": "null", "True": "true", "False": "false"}.get(text := repr(value), _clip(text))


def _clip(text: str) -> str:
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
