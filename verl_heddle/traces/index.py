"""Index a trace without decoding its turns, to select trajectories from a file too large to simulate or to hold in memory.

For lines in the format of `schema.encode` (every recorded run, and the output of `trace import`), only the head and tail are parsed, and
the output tokens between them are summed. The turns of such a line are validated when it is picked, in a second pass. Any other line is
decoded in full. Cost: about 3 microseconds per turn, an eighth of decoding.

Files of other tools are imported once, keeping only a sample in memory: all trajectories of the prompts whose hash is below a threshold,
which is halved whenever more than `KEPT_TURNS` are kept. The sample therefore does not depend on the order of the file.
"""

from __future__ import annotations

import gc
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from sys import intern
from typing import Any
from zlib import crc32

from verl_heddle.traces.importers.formats import trajectories
from verl_heddle.traces.io import Note, decode_line, lines
from verl_heddle.trajectory import Trajectory

KEPT_TURNS = 80_000
"""Most turns kept from another tool's file, unless a single prompt has more; 50 to 100 MB."""

_HASHES = 2**32

_TEXT = rb'"(?:[^"\\]|\\.)*"'
_HEAD = re.compile(
    rb'\{"source":%s,"workload":%s,"prompt_id":(%s),"trial":(\d+|%s),"prompt_tokens":(?:\d+|null),"steps":\[' % ((_TEXT,) * 4)
)
_OUTPUT = re.compile(rb'"output_tokens":(\d+)')
_TAIL = b'],"reward":'  # turns hold no lists, and quotes inside text are escaped: the first match ends the turns
_TAIL_KEYS = ["reward", "model", "meta"]


@dataclass(slots=True)
class Entry:
    """Index entry of a trajectory. `number`: its position in the path, from 0. `tokens`: generated, None if unknown for all turns."""

    number: int
    prompt_id: str
    trial: int | str
    turns: int
    tokens: int | None
    step: int | None = None
    run: str | None = None
    uid: int | str | None = None
    validate: bool = False

    @property
    def meta(self) -> dict[str, Any]:
        """The part of `Trajectory.meta` that `steps.latest` reads."""
        return {name: value for name, value in (("run", self.run), ("uid", self.uid)) if value is not None}


@dataclass(frozen=True)
class Catalogue:
    """Index of a file. `entries`: every trajectory in file order. `pick` reads those that `candidates` returned."""

    path: str
    entries: list[Entry]
    told: list[str]
    """The import report; empty for a trace."""
    kept: Mapping[int, Trajectory] | None = None
    """For another tool's file: the trajectories that can be picked, by number."""

    def candidates(self, entries: list[Entry]) -> list[Entry]:
        """The entries that can be picked: always whole prompts."""
        return entries if self.kept is None else [entry for entry in entries if entry.number in self.kept]

    def pick(self, numbers: Collection[int]) -> Iterator[Trajectory]:
        """Read the trajectories with these `Entry.number`, in file order.

        Raises:
            TraceError: as `traces.read`.
        """
        wanted = frozenset(numbers)
        if self.kept is not None:
            yield from (self.kept[number] for number in sorted(wanted))
            return
        last = max(wanted, default=-1)
        for number, (file, line, raw) in enumerate(lines(self.path, _whole_line, lambda text: None)):
            if number in wanted:
                yield decode_line(raw, file, line)
            if number >= last:
                return


def catalogue(path: str | os.PathLike[str], note: Note | None = None) -> Catalogue:
    """Index a trace, or a file of another tool.

    Raises:
        TraceError: as `traces.read`, except for faults inside turns.
    """
    collects = gc.isenabled()
    gc.disable()  # a million small objects and no cycles: collection would take a quarter of the time
    try:
        return _catalogue(path, note)
    finally:
        if collects:
            gc.enable()


def _catalogue(path: str | os.PathLike[str], note: Note | None) -> Catalogue:
    items, found = trajectories(path, note=note)
    if found is None:
        entries = [entry for _, _, entry in lines(path, _line_entry, note)]
        for number, entry in enumerate(entries):
            entry.number = number
        return Catalogue(str(path), entries, [])
    kept: dict[int, Trajectory] = {}
    entries, turns, limit = [], 0, _HASHES
    for number, item in enumerate(items):
        entries.append(_entry(number, item))
        if crc32(item.prompt_id.encode("utf-8", "replace")) < limit:
            kept[number] = item
            turns += len(item.steps)
            while turns > KEPT_TURNS and limit > 1:
                limit //= 2
                kept = {key: held for key, held in kept.items() if crc32(held.prompt_id.encode("utf-8", "replace")) < limit}
                turns = sum(len(held.steps) for held in kept.values())
    return Catalogue(str(path), entries, found.told(), kept)


def _whole_line(line: bytes, file: str, number: int) -> bytes:
    """The raw line; a torn line raises, because torn lines are not numbered."""
    if _split(line) is None:
        decode_line(line, file, number)
    return line


def _line_entry(line: bytes, file: str, number: int) -> Entry:
    parts = _split(line)
    if parts is None:
        return _entry(0, decode_line(line, file, number))
    prompt, trial, start, end, meta = parts
    outputs = _OUTPUT.findall(line, start, end)
    return Entry(
        0,
        json.loads(prompt),
        json.loads(trial),
        line.count(b'"input_tokens":', start, end),
        sum(map(int, outputs)) if outputs else None,
        meta.get("step"),
        None if meta.get("run") is None else intern(meta["run"]),
        meta.get("uid"),
        bool(meta.get("validate")),
    )


def _split(line: bytes) -> tuple[bytes, bytes, int, int, dict[str, Any]] | None:
    """Prompt and trial as JSON, start and end offset of the turns, and `meta`; None if the line is not in the encoder's format."""
    head = _HEAD.match(line)
    end = -1 if head is None else line.find(_TAIL, head.end())
    if head is None or end < 0 or not line.endswith(b"}\n"):
        return None
    try:
        tail = json.loads(b"{" + line[end + 2 :])
    except (ValueError, RecursionError):
        return None
    meta = tail.get("meta")
    if list(tail) != _TAIL_KEYS or not isinstance(meta, dict):
        return None
    if type(meta.get("step")) not in (int, type(None)) or type(meta.get("run")) not in (str, type(None)):
        return None
    return head[1], head[2], head.end(), end, meta


def _entry(number: int, item: Trajectory) -> Entry:
    known = [turn.output_tokens for turn in item.steps if turn.output_tokens is not None]
    meta = item.meta
    return Entry(
        number,
        item.prompt_id,
        item.trial,
        len(item.steps),
        sum(known) if known else None,
        meta.get("step"),
        meta.get("run"),
        meta.get("uid"),
        bool(meta.get("validate")),
    )
