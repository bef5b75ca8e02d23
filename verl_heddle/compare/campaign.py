"""Makes the runs of a plan one after the other, keeps what is finished, and lets no failing arm cost the others.

Killed at any moment and called again, it goes on: finished runs are kept; an interrupted one is stopped, if it still runs, and made again;
a failed one is tried again. Two calls on one folder exclude each other by a file lock, which the kernel releases with the process.

One run as a process: started so that it can be found and stopped whatever happens to us, watched through its log.

The log is written by the run itself, not through a pipe, so it is complete even where this process is killed. Every process of a run
carries an environment variable naming its folder (`launch.MARK`); Ray's daemons start sessions of their own, but inherit it.
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
from verl_heddle.compare.progress import Progress, Say, decoded, duration
from verl_heddle.traces import segments

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


SILENCE_S = 1800.0
"""A run that prints nothing for so long is hung. Loading a large model and a long step of verl are silent for many minutes."""

GIVE_UP = 2
"""Failures of an arm, with no success, after which its other runs are not tried in this call: it is the arm, not bad luck."""

HUGE = 10**300
"""No metric is so large; what is cannot be reckoned with. NaN and infinity are left out by the same comparison."""

PORT_TAKEN = b"EADDRINUSE"
"""verl picks a port in one process and binds it in another; now and then somebody else is faster. Worth one more try."""


def traced(trace: Path) -> bool:
    """Whether a run has left a trace: its live file, or segments of it."""
    return trace.exists() or bool(segments(trace))


@dataclass
class Made:
    """What a call did: runs by what became of them."""

    finished: list[Key] = field(default_factory=list)
    kept: list[Key] = field(default_factory=list)
    failed: list[Key] = field(default_factory=list)
    skipped: list[Key] = field(default_factory=list)


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold the comparison's folder.

    Raises:
        ValueError: another call is at work in it.
    """
    with open(out / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"another verl-heddle compare is at work in {out}") from None
        yield


def make(plan: Plan, out: Path, say: Say, pair_done: Callable[[int], None], silence_s: float = SILENCE_S) -> Made:
    """Make every run that is not finished; needs the lock.

    Args:
        say: prints a line.
        pair_done: called with a pair's number when the last of its runs has been tried and at least one was new.

    Raises:
        ValueError: a run's folder holds something else.
        OSError: a run cannot be started, or the disk refuses.
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
            if _attempt(plan, key, out, ledger, title, say, silence_s):
                made.finished.append(key)
                succeeded.add(key.arm)
            else:
                made.failed.append(key)
                failures[key.arm] += 1
                if failures[key.arm] == GIVE_UP and key.arm not in succeeded:
                    say(f"{key.arm} failed {GIVE_UP} times and never worked: its other runs are left out of this call")
        left = [other for other in keys[number:] if not ledger.finished(other)]
        if left and key in made.finished:
            took = [entry.seconds for one in keys if (entry := ledger.entry(one)) and entry.seconds and entry.state == "finished"]
            say(f"{len(left)} run{'s' if len(left) > 1 else ''} to go, about {duration(len(left) * sum(took) / len(took))}")
        if number == len(keys) or keys[number].pair != key.pair:
            news = {*made.finished, *made.failed}
            if any(one.pair == key.pair for one in news):
                pair_done(key.pair)
    return made


def numbers(metrics: Path) -> dict[int, dict[str, float]]:
    """What verl logged of each training step of a run; empty where there is no such file."""
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


def _attempt(plan: Plan, key: Key, out: Path, ledger: Ledger, title: str, say: Say, silence_s: float) -> bool:
    """One run, with a second try for a port that was taken; whether it finished."""
    mark = str(ledger.folder(key))
    if (left := stop(mark)) > 0:
        say(f"{title}: stopped {left} processes of the interrupted run")
    for attempt in (1, 2):
        started = launch(plan, key, out, os.environ)
        folder = ledger.fresh(key)
        log = folder / LOG
        say(f"{title}: {' '.join(plan.arm(key.arm).overrides) or 'no plugin'}, seed {plan.seed_of(key.pair)} (log: {log})")
        begun = Entry("running", time.time(), attempts=attempt, command=started.command)
        ledger.write(key, begun)
        run = Run(started.command, {**os.environ, **started.environment}, log)
        try:
            ledger.write(key, replace(begun, pid=run.pid))
            progress = Progress(lambda text: say(f"{title}: {text}"), plan.steps, log, folder / METRICS)
            code = run.wait(silence_s, progress)
        except BaseException:
            run.stop()
            raise
        seconds = run.elapsed_s
        if (rest := outlived(mark)) > 0:
            say(f"{title}: {rest} processes outlived the run and were stopped")
        why = _trouble(plan, key, folder, code, silence_s)
        ended = replace(begun, state="failed" if why else "finished", seconds=seconds, code=code, why=why, pid=run.pid)
        ledger.write(key, ended)
        if not why:
            say(f"{title}: finished in {duration(seconds)}")
            return True
        if attempt == 1 and PORT_TAKEN in log.read_bytes():
            say(f"{title}: a port was taken by another process; trying once more")
            continue
        break
    for line in tail(log):
        say(f"    | {line}")
    say(f"{title}: FAILED after {duration(seconds)}: {why}; the whole log is {log}")
    return False


def _trouble(plan: Plan, key: Key, folder: Path, code: int | None, silence_s: float) -> str:
    """Why a run cannot be used, in one line; empty if it can."""
    if code is None:
        return f"it printed nothing for {duration(silence_s)} and was stopped (--silence-s)"
    if code:
        return f"killed by signal {-code}" if code < 0 else f"exit code {code}"
    if not numbers(folder / METRICS):
        return f"it ended well but logged no training step to {METRICS}: is this a verl trainer?"
    if not plan.arm(key.arm).bare and not traced(folder / TRACE / "trace.jsonl"):
        said = [line for line in tail(folder / LOG, 10**6) if "heddle:" in line]
        return "it ended well but wrote no trace" + (
            f": {said[-1].split('heddle:', 1)[1].strip()}" if said else ": is verl-heddle installed there?"
        )
    return ""
