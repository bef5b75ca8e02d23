"""How much others on the machine disturbed a run, from /proc.

Law: while a replica has requests, its processes compute all the time (they hand over to each other on one core). So

    disturbed = 1 - CPU seconds of the replica's processes / seconds in which it had requests

is what others took from it, plus a few percent that the hand-overs themselves cost. It knows nothing of predictions, so runs may be
repeated by it without favouring anyone.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from verl_heddle.report.attribution import busy_s, engine_interval
from verl_heddle.trajectory import Trajectory

TICK_S = 1.0 / os.sysconf("SC_CLK_TCK")
"""CPU time is counted in ticks, usually of 10 ms: 0.1 % of a run."""


def family(pid: int) -> Iterator[int]:
    """A process and its descendants; those that end meanwhile are left out."""
    yield pid
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in _read(path).split():
            yield from family(int(child))


def cpu_s(pid: int) -> float:
    """CPU seconds of a process and its descendants so far, with all their threads and the children they have waited for."""
    texts = (_read(Path(f"/proc/{one}/stat")) for one in family(pid))
    return TICK_S * sum(sum(map(int, text.rpartition(")")[2].split()[11:15])) for text in texts if text)


def disturbed(records: Iterable[Trajectory], used_s: Mapping[str, float]) -> dict[str, float]:
    """By replica, the share of its busy time in which it did not compute; can fall a little below 0 by rounding.

    Args:
        records: of one run.
        used_s: CPU seconds of each replica's processes during the run; replicas that served nothing are left out.
    """
    spans: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for item in records:
        for turn in item.steps:
            spans[turn.replica or ""].append(engine_interval(item, turn))
    return {name: 1.0 - used_s[name] / busy for name, turns in sorted(spans.items()) if (busy := busy_s(turns)) > 0}


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # the process has ended
        return ""
