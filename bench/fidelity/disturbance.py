"""How much of the machine others used, from /proc.

Law: foreign share = (CPU seconds of the whole machine - CPU seconds of our processes) / (cores * seconds), where time that a hypervisor
took away (steal) is foreign too. It knows nothing of predictions, so runs may be delayed and repeated by it without favouring anyone.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

TICK_S = 1.0 / os.sysconf("SC_CLK_TCK")
"""CPU time is counted in ticks, usually of 10 ms: 0.1 % of a run."""

LOOK_S = 2.0
"""How long to look before calling the machine calm or busy."""


@dataclass(frozen=True, slots=True)
class Mark:
    """CPU counters at one moment, seconds."""

    at_s: float
    machine_s: float
    own_s: float

    @classmethod
    def now(cls) -> Mark:
        """Read them; takes about 10 ms."""
        return cls(time.monotonic(), machine_s(), cpu_s(os.getpid()))

    def foreign_since(self, before: Mark) -> float:
        """Share of the machine that others used between two marks; 0 at least."""
        foreign = (self.machine_s - before.machine_s) - (self.own_s - before.own_s)
        return max(0.0, foreign / ((os.cpu_count() or 1) * (self.at_s - before.at_s)))


def wait_for_calm(limit: float, patience_s: float) -> float:
    """Wait until others use less than `limit` of the machine, at most about `patience_s` seconds; returns the seconds waited."""
    began = before = Mark.now()
    while before.at_s - began.at_s < patience_s:
        time.sleep(LOOK_S)
        now = Mark.now()
        if now.foreign_since(before) < limit:
            break
        before = now
    return Mark.now().at_s - began.at_s


def machine_s() -> float:
    """CPU seconds the machine has spent on anything but idling since it started."""
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, _read(Path("/proc/stat")).split("\n")[0].split()[1:9])
    return (user + nice + system + irq + softirq + steal) * TICK_S


def cpu_s(pid: int) -> float:
    """CPU seconds of a process and its descendants so far, with all their threads and the children they have waited for."""
    texts = (_read(Path(f"/proc/{one}/stat")) for one in family(pid))
    return TICK_S * sum(sum(map(int, text.rpartition(")")[2].split()[11:15])) for text in texts if text)


def family(pid: int) -> Iterator[int]:
    """A process and its descendants; those that end meanwhile are left out."""
    yield pid
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in _read(path).split():
            yield from family(int(child))


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # the process has ended
        return ""
