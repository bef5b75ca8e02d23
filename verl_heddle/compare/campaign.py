"""Executes the runs of a plan one after the other, keeps the finished ones, and continues with the other arms when one fails.

Resumption: this process can be killed at any moment and called again. Finished runs are kept; an interrupted run is stopped, if it is
still alive, and started over; a failed run is retried. A file lock, which the kernel releases with the process, prevents two calls from
working in one folder.

Processes: every process of a run carries an environment variable naming the run's folder (`launch.MARK`), so a run can be found and stopped
even after this process has died. Ray's daemons start their own sessions but inherit the variable. The run writes its log file directly, not
through a pipe, so the log is complete even if this process is killed.
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from verl_heddle.compare.launch import LOG, MARK, METRICS, TRACE, launch
from verl_heddle.compare.ledger import Entry, Ledger
from verl_heddle.compare.plan import Key, Plan
from verl_heddle.compare.progress import Log, Progress, decoded, duration
from verl_heddle.traces import segments

POLL_S = 0.5

GRACE_S = 20.0
"""Time from SIGTERM to SIGKILL: Ray stops its workers one by one."""

SETTLE_S = 15.0
"""How long processes may outlive their run: Ray's daemons notice within seconds that their driver has exited."""


class Run:
    """One run as a process, started in its own session and watched through its log.

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
        """Seconds since the start."""
        return time.monotonic() - self.started

    def wait(self, silence_s: float, seen: Callable[[], None]) -> int | None:
        """Wait for the exit status; None if the run printed nothing for `silence_s` and was stopped. Calls `seen` twice a second."""
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
        """End the run and every process it started; returns when none is left."""
        stop(self._mark, [self.pid])
        self._process.wait()


def stop(mark: str, also: Sequence[int] = ()) -> int:
    """End every process that carries `mark`, their descendants, and `also`; returns how many there were.

    Sends SIGTERM first, and SIGKILL after `GRACE_S`.
    """
    found: set[int] = set()
    deadline = time.monotonic() + GRACE_S
    kind = signal.SIGTERM
    signalled: set[int] = set()
    while left := marked(mark) | {pid for pid in also if _alive(pid)}:
        found |= left
        if time.monotonic() > deadline:
            if kind is signal.SIGKILL:
                break  # SIGKILL has no effect: the process is stuck in the kernel
            kind, deadline, signalled = signal.SIGKILL, time.monotonic() + GRACE_S, set()
        for pid in left - signalled:
            try:
                os.kill(pid, kind)
            except (ProcessLookupError, PermissionError):
                continue
            signalled.add(pid)
        time.sleep(0.1)
    return len(found)


def outlived(mark: str, wait_s: float = SETTLE_S) -> int:
    """End the processes that are still alive `wait_s` after their run ended; returns how many there were."""
    deadline = time.monotonic() + wait_s
    while marked(mark):
        if time.monotonic() > deadline:
            return stop(mark)
        time.sleep(0.2)
    return 0


def marked(mark: str) -> set[int]:
    """Processes of this user that carry the mark, and all their descendants, except this process and its ancestors. Empty without /proc."""
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


SILENCE_S = 1800.0
"""A run that prints nothing for this long is considered hung. Loading a large model and a long verl step are silent for many minutes."""

GIVE_UP = 2
"""After this many failures and no success, the other runs of an arm are skipped in this call: the arm is broken, not unlucky."""

HUGE = 10**300
"""No real metric is this large, and larger values cannot be computed with. The same comparison drops NaN and infinity."""

PORT_TAKEN = b"EADDRINUSE"
"""verl picks a port in one process and binds it in another; sometimes a different process takes it in between. Worth one retry."""


def traced(trace: Path) -> bool:
    """Whether a run has left a trace: its live file or its segments."""
    return trace.exists() or bool(segments(trace))


@dataclass
class Made:
    """The runs of one call, by outcome."""

    finished: list[Key] = field(default_factory=list)
    kept: list[Key] = field(default_factory=list)
    failed: list[Key] = field(default_factory=list)
    skipped: list[Key] = field(default_factory=list)


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Lock the comparison's folder.

    Raises:
        ValueError: another call holds the lock.
    """
    with open(out / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"another verl-heddle compare is running in {out}") from None
        yield


def make(plan: Plan, out: Path, log: Log, pair_done: Callable[[int], None], silence_s: float = SILENCE_S) -> Made:
    """Execute every run that is not finished. The caller must hold the lock.

    Args:
        log: prints a line.
        pair_done: called with a pair's number when the last of its runs has been tried and at least one was new.

    Raises:
        ValueError: a run's folder holds files that are not a run.
        OSError: a run cannot be started, or a file cannot be written.
    """
    ledger, made, keys = Ledger(out), Made(), list(plan.runs())
    failures: Counter[str] = Counter()
    succeeded = {key.arm for key in keys if ledger.finished(key)}
    for number, key in enumerate(keys, start=1):
        if ledger.finished(key):
            made.kept.append(key)
        elif failures[key.arm] >= GIVE_UP and key.arm not in succeeded:
            made.skipped.append(key)
        else:
            title = f"[{number}/{len(keys)}] pair {key.pair}, {key.arm}"
            if _attempt(plan, key, out, ledger, title, log, silence_s):
                made.finished.append(key)
                succeeded.add(key.arm)
            else:
                made.failed.append(key)
                failures[key.arm] += 1
                if failures[key.arm] == GIVE_UP and key.arm not in succeeded:
                    log(f"{key.arm} failed {GIVE_UP} times without a success: skipping its other runs in this call")
        left = [other for other in keys[number:] if not ledger.finished(other)]
        if left and key in made.finished:
            took = [entry.seconds for other in keys if (entry := ledger.entry(other)) and entry.seconds and entry.state == "finished"]
            log(f"{len(left)} run{'s' if len(left) > 1 else ''} to go, about {duration(len(left) * sum(took) / len(took))}")
        if number == len(keys) or keys[number].pair != key.pair:
            attempted = {*made.finished, *made.failed}
            if any(other.pair == key.pair for other in attempted):
                pair_done(key.pair)
    return made


def numbers(metrics: Path) -> dict[int, dict[str, float]]:
    """verl's metrics by training step, from a run's metrics file; empty if the file does not exist."""
    steps: dict[int, dict[str, float]] = {}
    try:
        lines = metrics.read_bytes().split(b"\n")
    except OSError:
        return {}
    for line in lines:
        record = decoded(line)
        if record is not None:
            found = {name: float(value) for name, value in record["data"].items() if isinstance(value, int | float) and abs(value) < HUGE}
            steps.setdefault(record["step"], {}).update(found)
    return {step: found for step, found in sorted(steps.items()) if "timing_s/step" in found}


def _attempt(plan: Plan, key: Key, out: Path, ledger: Ledger, title: str, log: Log, silence_s: float) -> bool:
    """Execute one run, with one retry if a port was taken; returns whether it finished."""
    mark = str(ledger.folder(key))
    if (left := stop(mark)) > 0:
        log(f"{title}: stopped {left} processes of the interrupted run")
    for attempt in (1, 2):
        started = launch(plan, key, out, os.environ)
        folder = ledger.fresh(key)
        log_file = folder / LOG
        log(f"{title}: {' '.join(plan.arm(key.arm).overrides) or 'no plugin'}, seed {plan.seed_of(key.pair)} (log: {log_file})")
        begun = Entry("running", time.time(), attempts=attempt, command=started.command)
        ledger.write(key, begun)
        run = Run(started.command, {**os.environ, **started.environment}, log_file)
        try:
            ledger.write(key, replace(begun, pid=run.pid))
            progress = Progress(lambda text: log(f"{title}: {text}"), plan.steps, log_file, folder / METRICS)
            code = run.wait(silence_s, progress)
        except BaseException:
            run.stop()
            raise
        seconds = run.elapsed_s
        if (rest := outlived(mark)) > 0:
            log(f"{title}: {rest} processes outlived the run and were stopped")
        why = _trouble(plan, key, folder, code, silence_s)
        ended = replace(begun, state="failed" if why else "finished", seconds=seconds, code=code, why=why, pid=run.pid)
        ledger.write(key, ended)
        if not why:
            log(f"{title}: finished in {duration(seconds)}")
            return True
        if attempt == 1 and PORT_TAKEN in log_file.read_bytes():
            log(f"{title}: a port was taken by another process; retrying once")
            continue
        break
    for line in tail(log_file):
        log(f"    | {line}")
    log(f"{title}: FAILED after {duration(seconds)}: {why}; full log: {log_file}")
    return False


def _trouble(plan: Plan, key: Key, folder: Path, code: int | None, silence_s: float) -> str:
    """Why a run is unusable, in one line; empty if it is usable."""
    if code is None:
        return f"it printed nothing for {duration(silence_s)} and was stopped (--silence-s)"
    if code:
        return f"killed by signal {-code}" if code < 0 else f"exit code {code}"
    if not numbers(folder / METRICS):
        return f"it exited with 0 but logged no training step to {METRICS}: is this a verl trainer?"
    if not plan.arm(key.arm).bare and not traced(folder / TRACE / "trace.jsonl"):
        messages = [line for line in tail(folder / LOG, 10**6) if "heddle:" in line]
        return "it exited with 0 but wrote no trace" + (
            f": {messages[-1].split('heddle:', 1)[1].strip()}" if messages else ": is verl-heddle installed there?"
        )
    return ""
