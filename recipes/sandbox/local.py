"""Run untrusted programs on this machine: `Sandbox`. Thread-safe; from asyncio use `arun`.

One run: a slot is taken (at most `parallel` runs at a time), the job is written into an anonymous file, and `launch.py` becomes the
program, inside bubblewrap where that works. This process reads the output, looks at the clock and at memory, and ends everything of the
run when a limit is passed. Nothing of a run remains: no process, no file.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import marshal
import os
import queue
import selectors
import signal
import subprocess
import sysconfig
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from recipes.sandbox import launch, levels
from recipes.sandbox.limits import MIB, Limits, Result, Status
from recipes.sandbox.usage import LOOK_S, larger, many_files, process_table, resident

log = logging.getLogger(__name__)

END_S = 5.0
"""How long a killed run may take to be gone; the kernel needs milliseconds."""
FIRST_UID, UIDS = 61184, 4336
"""User ids for programs when we are root: the range that Linux distributions leave to services made on the fly."""
NAMESPACED_NPROC = (5, 14)
"""From this kernel on, the process limit in a user namespace counts that namespace alone."""

MARSHAL_VERSION = 2
"""Any Python 3 reads it: the one inside may be another than ours."""

_warned = False


def take_uids(count: int) -> list[tuple[int, Any]]:
    """`count` user ids that no other sandbox on this machine uses, each with the open lock file that says so.

    Raises:
        RuntimeError: too many sandboxes.
    """
    folder = Path("/run" if os.access("/run", os.W_OK) else tempfile.gettempdir()) / "heddle-sandbox"
    folder.mkdir(mode=0o700, exist_ok=True)
    taken: list[tuple[int, Any]] = []
    for uid in range(FIRST_UID, FIRST_UID + UIDS):
        if len(taken) == count:
            return taken
        lock = open(folder / str(uid), "w")  # noqa: SIM115  open for as long as the id is ours
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            continue
        taken.append((uid, lock))
    raise RuntimeError(f"no {count} free user ids for sandboxed programs: {UIDS} are in use on this machine")


class Sandbox:
    """A pool of places to run programs.

    Args:
        limits: of each run.
        level: `auto` (the strongest that works, with a warning if that is not bubblewrap), `bubblewrap` or `process`.
        parallel: runs at a time; more wait. 0: one per CPU.
        packages: let programs import what is installed in this environment (SymPy, NumPy), read-only.

    Raises:
        ValueError, RuntimeError: see `levels.find`.
    """

    def __init__(self, limits: Limits | None = None, level: str = "auto", parallel: int = 0, packages: bool = False) -> None:
        global _warned
        self.limits, self.level = limits or Limits(), levels.find(level)
        self.parallel = parallel or os.cpu_count() or 1
        self._python, prefix = levels.interpreter(self.level.bwrap)
        installed = sysconfig.get_paths()["purelib"]
        self._packages = (levels.PACKAGES if self.level.bwrap else installed) if packages else None
        self._readable = {prefix: prefix} | ({installed: levels.PACKAGES} if packages else {})
        self._root = os.geteuid() == 0
        self._slots: queue.Queue[int | None] = queue.Queue()
        self._locks = take_uids(self.parallel) if self._root else []
        for slot in [uid for uid, _ in self._locks] or [None] * self.parallel:
            self._slots.put(slot)
        self._executor = ThreadPoolExecutor(self.parallel, thread_name_prefix="sandbox")
        if self.level.lacks and not _warned:
            _warned = True
            log.warning("SANDBOX IS WEAKER THAN IT COULD BE (level %s): %s", self.level.name, "; ".join(self.level.lacks))

    def run(
        self,
        files: Mapping[str, str],
        argv: Sequence[str] = ("python", "main.py"),
        stdin: str = "",
        cancel: threading.Event | None = None,
    ) -> Result:
        """Run `argv` in a fresh folder that holds `files` (relative path -> text); never raises for what the program does.

        "python" as the first word is the sandbox's interpreter, anything else an absolute path. `cancel`, when set, ends the run.
        """
        problem = next((name for name in files if os.path.isabs(name) or ".." in Path(name).parts or "\0" in name), None)
        if problem is not None:
            return Result(Status.UNAVAILABLE, None, "", f"file name {problem!r} leaves the folder", 0.0)
        uid = self._slots.get()
        try:
            return self._run(files, [self._python if word == "python" else word for word in argv], stdin, uid, cancel)
        finally:
            self._slots.put(uid)

    async def arun(self, files: Mapping[str, str], argv: Sequence[str] = ("python", "main.py"), stdin: str = "") -> Result:
        """As `run`, beside the event loop. Cancelling it ends the run."""
        cancel = threading.Event()
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, self.run, files, argv, stdin, cancel)
        except asyncio.CancelledError:
            cancel.set()
            raise

    def close(self) -> None:
        """Wait for what runs and give the user ids back."""
        self._executor.shutdown(wait=True)
        for _, lock in self._locks:
            lock.close()
        self._locks = []

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, files: Mapping[str, str], argv: list[str], stdin: str, uid: int | None, cancel: threading.Event | None) -> Result:
        start = time.monotonic()
        with contextlib.ExitStack() as stack:
            folder = None
            if not self.level.bwrap:
                folder = tempfile.mkdtemp(prefix="heddle-sandbox-")
                stack.callback(_remove, folder)
                if uid is not None:
                    os.chown(folder, uid, uid)
            job = os.memfd_create("job")
            stack.callback(os.close, job)
            with open(job, "wb", closefd=False) as file:
                header = marshal.dumps(self._job(files, argv, folder, uid), MARSHAL_VERSION)
                file.write(b"%d\n%s%s" % (len(header), header, stdin.encode(errors="surrogateescape")))
            reader = os.open(f"/proc/self/fd/{job}", os.O_RDONLY)
            stack.callback(os.close, reader)
            command = [self._python, "-I", "-S", str(levels.LAUNCHER)]
            if self.level.bwrap:
                command[3] = "/launch.py"
                command = [*levels.wrapper(self.level.bwrap, self.level.proc, self._readable, self.limits.disk_mb), *command]
            try:
                process = subprocess.Popen(
                    command, stdin=reader, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={}, cwd="/", start_new_session=True
                )
            except OSError as error:
                return Result(Status.UNAVAILABLE, None, "", str(error), time.monotonic() - start)
            with process:
                ended, out, err = self._watch(process, start + self.limits.wall_s, folder, cancel)
        return self._result(ended, process.returncode, out, err, time.monotonic() - start)

    def _job(self, files: Mapping[str, str], argv: list[str], folder: str | None, uid: int | None) -> dict[str, Any]:
        limits, home = self.limits, folder or levels.WORK
        processes = limits.processes
        release = tuple(int("".join(filter(str.isdigit, part)) or 0) for part in os.uname().release.split(".")[:2])
        if uid is None and (folder or release < NAMESPACED_NPROC):  # then the kernel counts everything this user runs
            processes += sum(threads for _, _, owner, threads in process_table() if owner == os.getuid())
        rlimits = {
            "RLIMIT_AS": limits.address_mb * MIB,
            "RLIMIT_FSIZE": limits.disk_mb * MIB,
            "RLIMIT_NPROC": processes,
            "RLIMIT_NOFILE": limits.open_files,
            "RLIMIT_CORE": 0,
            "RLIMIT_MEMLOCK": 0,
        }
        environment = {"PATH": "/usr/bin:/bin", "HOME": home, "TMPDIR": home, "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"}
        environment |= {"PYTHONDONTWRITEBYTECODE": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
        if self._packages:
            environment["PYTHONPATH"] = self._packages
        readable = [*levels.SYSTEM, "/etc/ld.so.cache", "/etc/alternatives", *self._readable]
        return {
            "argv": argv,
            "env": environment,
            "cwd": home,
            "files": dict(files),
            "uid": uid,
            "rlimits": {name: [value, value] for name, value in rlimits.items()} | {"RLIMIT_CPU": [limits.cpu_s, limits.cpu_s + 1]},
            "seccomp": self.level.seccomp.hex(),
            "landlock": {"read": readable, "write": [home, *levels.DEVICES]} if folder and self.level.landlock else None,
            "supervise": folder is not None,
        }

    def _watch(
        self, process: subprocess.Popen[bytes], deadline: float, folder: str | None, cancel: threading.Event | None
    ) -> tuple[Status | None, bytes, bytes]:
        """(why we ended it or None, standard output, standard error); on return everything of the run is gone."""
        assert process.stdout is not None and process.stderr is not None
        parts: dict[Any, bytearray] = {process.stdout: bytearray(), process.stderr: bytearray()}
        room, look, gone_by = self.limits.output_kb << 10, time.monotonic() + LOOK_S, 0.0
        ended: Status | None = None
        with selectors.DefaultSelector() as selector:
            for pipe in parts:
                selector.register(pipe, selectors.EVENT_READ)
            while selector.get_map() or process.poll() is None:
                now = time.monotonic()
                if ended is None:
                    if room < 0:
                        ended = Status.OUTPUT
                    elif now >= deadline:
                        ended = Status.TIMEOUT
                    elif now >= look:
                        ended, look = self._over(process.pid, folder, cancel), now + LOOK_S
                    if ended is not None:
                        gone_by = now + END_S
                        _end(process, folder is not None)
                elif now > gone_by:  # cannot happen while the kernel keeps its word
                    log.error("a sandboxed program could not be ended (process %d)", process.pid)
                    process.kill()
                    break
                wait = max(0.0, min(LOOK_S, (deadline if ended is None else gone_by) - now))
                if not selector.get_map():  # it closed its output and goes on
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(wait)
                for key, _ in selector.select(wait) if selector.get_map() else ():
                    data = os.read(key.fd, 1 << 16)
                    if not data:
                        selector.unregister(key.fileobj)
                    parts[key.fileobj] += data[: max(room, 0)]
                    room -= len(data)
        return ended, bytes(parts[process.stdout]), bytes(parts[process.stderr])

    def _over(self, pid: int, folder: str | None, cancel: threading.Event | None) -> Status | None:
        """Which limit that no kernel watches is passed, if one is."""
        if cancel is not None and cancel.is_set():
            return Status.CANCELLED
        below = launch.descendants(pid, process_table())
        if sum(map(resident, below)) > self.limits.memory_mb * MIB:
            return Status.MEMORY
        size = self.limits.disk_mb * MIB
        full = larger(folder, size) if folder else any(many_files(last, size) for last in below[-1:])
        return Status.DISK if full else None

    def _result(self, ended: Status | None, code: int, out: bytes, err: bytes, wall_s: float) -> Result:
        stdout, stderr = out.decode(errors="replace"), err.decode(errors="replace")
        if ended is not None:
            return Result(ended, None, stdout, stderr, wall_s)
        code = 128 - code if code < 0 else code
        failed_launch = code == launch.LAUNCH_FAILED and stderr.startswith("sandbox: ")
        if failed_launch or (code and not out and stderr.startswith("bwrap: ")):
            return Result(Status.UNAVAILABLE, None, stdout, stderr, wall_s)
        if code == 128 + 24:  # SIGXCPU
            return Result(Status.TIMEOUT, None, stdout, stderr, wall_s)
        status = Status.OK if code == 0 else Status.SIGNAL if 128 < code < 193 else Status.FAILED
        return Result(status, code, stdout, stderr, wall_s)


def _end(process: subprocess.Popen[bytes], supervised: bool) -> None:
    """Begin the end of a run. A supervisor is asked, as it must kill first.

    Of bubblewrap the first process inside is killed, and the kernel kills its namespace; bubblewrap itself then reaps it and leaves. Killed
    first, it would leave a zombie in containers whose process 1 reaps nobody.
    """
    inside = [pid for pid, parent, _, _ in launch.processes() if parent == process.pid]
    if supervised:
        process.terminate()
    elif not inside:
        process.kill()
    for pid in [] if supervised else inside:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _remove(folder: str) -> None:
    """Delete a run's folder, whatever it made of it: folders without permissions, folders thousands deep."""
    with contextlib.suppress(OSError):  # nearly always there are only files
        for entry in os.scandir(folder):
            os.unlink(entry.path)
        os.rmdir(folder)
        return
    for command in (["rm", "-rf"], ["chmod", "-R", "u+rwX"], ["rm", "-rf"]):
        if os.path.exists(folder):
            subprocess.run([*command, folder], capture_output=True)
