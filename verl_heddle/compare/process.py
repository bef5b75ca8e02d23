"""One run as a process: started so that it can be found and stopped whatever happens to us, watched through its log.

The log is written by the run itself, not through a pipe, so it is complete even where this process is killed. Every process of a run
carries an environment variable naming its folder (`launch.MARK`); Ray's daemons start sessions of their own, but inherit it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from verl_heddle.compare.launch import MARK

POLL_S = 0.5

GRACE_S = 20.0
"""From asking a process to end until it is killed: Ray stops its workers one by one."""


SETTLE_S = 15.0
"""Ray's daemons notice within seconds that their driver has gone."""


class Run:
    """A running command. `code` is its exit status once it has ended.

    Raises:
        OSError: the command cannot be started.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self._log = log
        self._mark = environment[MARK]
        self.started = self._heard = time.monotonic()
        self._size = 0
        with open(log, "wb") as file:
            self._process = subprocess.Popen(
                list(command),
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.pid = self._process.pid

    @property
    def elapsed_s(self) -> float:
        """Seconds since its start."""
        return time.monotonic() - self.started

    def wait(self, silence_s: float, seen: Callable[[], None]) -> int | None:
        """Its exit status, or None where it printed nothing for `silence_s` and was stopped. Calls `seen` twice a second."""
        while (code := self._process.poll()) is None:
            seen()
            size = self._log.stat().st_size if self._log.exists() else self._size
            now = time.monotonic()
            if size != self._size:
                self._size, self._heard = size, now
            elif now - self._heard > silence_s:
                self.stop()
                return None
            time.sleep(POLL_S)
        seen()
        return code

    def stop(self) -> None:
        """End it and everything it started; returns when nothing is left."""
        stop(self._mark, [self.pid])
        self._process.wait()


def stop(mark: str, also: Sequence[int] = ()) -> int:
    """End every process that carries `mark`, those below them, and `also`; returns how many there were.

    Asked politely at first, killed after `GRACE_S`.
    """
    found: set[int] = set()
    deadline = time.monotonic() + GRACE_S
    kind = signal.SIGTERM
    told: set[int] = set()
    while left := marked(mark) | {pid for pid in also if _alive(pid)}:
        found |= left
        if time.monotonic() > deadline:
            if kind is signal.SIGKILL:
                break  # not even killing helps: a process stuck in the kernel
            kind, deadline, told = signal.SIGKILL, time.monotonic() + GRACE_S, set()
        for pid in left - told:
            try:
                os.kill(pid, kind)
            except (ProcessLookupError, PermissionError):
                continue
            told.add(pid)
        time.sleep(0.1)
    return len(found)


def outlived(mark: str, wait_s: float = SETTLE_S) -> int:
    """How many processes of a run that has ended are still there after `wait_s`; they are ended."""
    deadline = time.monotonic() + wait_s
    while marked(mark):
        if time.monotonic() > deadline:
            return stop(mark)
        time.sleep(0.2)
    return 0


def marked(mark: str) -> set[int]:
    """Processes of this user that carry the mark, and all their descendants; never this one or one above it. None without /proc."""
    wanted = f"{MARK}={mark}".encode()
    parents: dict[int, int] = {}
    holders = set()
    for entry in os.scandir("/proc") if os.path.isdir("/proc") else ():
        if not entry.name.isdigit():
            continue
        pid = int(entry.name)
        try:
            with open(f"/proc/{pid}/stat", "rb") as file:
                state, parent = file.read().rsplit(b")", 1)[1].split()[:2]
            if state in (b"Z", b"X"):
                continue
            parents[pid] = int(parent)
            with open(f"/proc/{pid}/environ", "rb") as file:
                if wanted in file.read().split(b"\0"):
                    holders.add(pid)
        except OSError:
            continue
    spared = {os.getpid()}
    above = parents.get(os.getpid(), 0)
    while above and above not in spared:
        spared.add(above)
        above = parents.get(above, 0)
    family = set(holders)
    grown = True
    while grown:
        more = {pid for pid, parent in parents.items() if parent in family and pid not in family}
        family |= more
        grown = bool(more)
    return family - spared


def tail(log: Path, lines: int = 25) -> list[str]:
    """The last lines of a log."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 65536))
            return file.read().decode("utf-8", "replace").splitlines()[-lines:]
    except OSError:
        return []


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rsplit(b")", 1)[1].split()[0] not in (b"Z", b"X")
    except OSError:
        return False
