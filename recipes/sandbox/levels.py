"""How strong can the sandbox be on this machine? Tried once per process by running something, never guessed from versions.

| level | what holds |
|---|---|
| `bubblewrap` | own mount, PID, network, IPC, UTS namespaces: a program sees the system read-only, a folder in memory, and itself |
| `process` | no namespaces; a supervisor that kills every descendant, and what there is of: own user id, Landlock, seccomp |

Both: resource limits, no new privileges, seccomp filter, clean environment, deadline. `Level.lacks` says what does not hold here.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from recipes.sandbox.launch import LANDLOCK_CREATE_RULESET
from recipes.sandbox.seccomp import filter_program

LAUNCHER = Path(__file__).with_name("launch.py")
WORK = "/work"
"""The program's folder inside bubblewrap."""
PACKAGES = "/packages"
"""Where it finds installed packages, if it may."""
PROBE_S = 20
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64")
"""Read-only inside: interpreters, the C library, coreutils. Nothing here is a secret on any distribution."""
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")


@dataclass(frozen=True)
class Level:
    """`bwrap`: bubblewrap's path, empty for the level `process`. `landlock`: the kernel's version of it, 0 if there is none."""

    name: str
    bwrap: str
    proc: bool
    """Whether /proc can be mounted anew, for the program's own processes."""
    landlock: int
    seccomp: bytes
    lacks: tuple[str, ...]
    """What does not hold on this machine, each in plain words."""


def interpreter(bwrap: str) -> tuple[str, str]:
    """(path of the Python for untrusted programs, folder it needs): the one under this environment, never the environment itself.

    Without bubblewrap a program of another user must be able to reach it; if it lies in a closed home folder, the system's Python serves.

    Raises:
        RuntimeError: there is none.
    """
    own = os.path.realpath(sys.executable), os.path.realpath(sys.base_prefix)
    if bwrap or os.geteuid() != 0 or _open_to_all(own[0]):
        return own
    for path in ("/usr/bin/python3", "/usr/local/bin/python3"):
        if os.path.exists(path) and _open_to_all(os.path.realpath(path)):
            return os.path.realpath(path), str(Path(path).parents[1])
    raise RuntimeError(f"no Python that other users may run: {own[0]} is closed to them, and there is no /usr/bin/python3")


def _open_to_all(path: str) -> bool:
    return all(part.stat().st_mode & 0o001 for part in (Path(path), *Path(path).parents))


def wrapper(bwrap: str, proc: bool, readable: Mapping[str, str] = MappingProxyType({}), disk_mb: int = 64) -> tuple[str, ...]:
    """bubblewrap's arguments: an empty root with the system and `readable` (path here -> path inside) read-only, and `disk_mb` of memory.

    As root no user namespace is made: the launcher takes a user id of its own instead, which the kernel can count processes by.
    """
    root = os.geteuid() == 0
    words = [bwrap, "--die-with-parent", "--new-session", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts"]
    words += ["--unshare-cgroup-try", "--cap-drop", "ALL"]
    words += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"] if root else ["--unshare-user"]
    for path in SYSTEM:
        if os.path.islink(path):
            words += ["--symlink", os.readlink(path), path]
        elif os.path.isdir(path):
            words += ["--ro-bind", path, path]
    for path, inside in {"/etc/ld.so.cache": "/etc/ld.so.cache", "/etc/alternatives": "/etc/alternatives", **readable}.items():
        for parent in reversed(Path(inside).parents[:-1]):  # else made without permissions for others when the real one has none
            words += ["--perms", "0755", "--dir", str(parent)] if str(parent) not in SYSTEM else []
        words += ["--ro-bind-try", path, inside]
    words += ["--proc", "/proc"] if proc else ["--dir", "/proc"]
    words += ["--dev", "/dev", "--size", "1048576", "--perms", "1777", "--tmpfs", "/dev/shm", "--remount-ro", "/dev"]
    words += ["--size", str(disk_mb << 20), "--perms", "1777", "--tmpfs", WORK]
    if not any(inside.startswith("/tmp/") for inside in readable.values()):  # an interpreter may lie there
        words += ["--symlink", WORK, "/tmp"]
    return (*words, "--ro-bind", str(LAUNCHER), "/launch.py", "--remount-ro", "/", "--chdir", WORK)


def _runs(words: tuple[str, ...]) -> str:
    """Empty if bubblewrap works with these arguments, else what it said."""
    try:
        done = subprocess.run([*words, "/usr/bin/true"], capture_output=True, text=True, timeout=PROBE_S)
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    return "" if done.returncode == 0 else done.stderr.strip() or f"exit code {done.returncode}"


def _landlock() -> int:
    return max(0, ctypes.CDLL(None).syscall(LANDLOCK_CREATE_RULESET, None, 0, 1))


@functools.cache
def find(wanted: str = "auto") -> Level:
    """The strongest level that works here, or the one named.

    Raises:
        ValueError: no such level.
        RuntimeError: the level named does not work here; says why.
    """
    if wanted not in ("auto", "bubblewrap", "process"):
        raise ValueError(f"sandbox level must be auto, bubblewrap or process, got {wanted!r}")
    filter_bytes = filter_program()
    lacks = () if filter_bytes else ("no system-call filter for this machine's architecture",)
    reason = "bubblewrap is not installed (Debian, Ubuntu: apt-get install bubblewrap)"
    bwrap = shutil.which("bwrap")
    if bwrap and wanted != "process":
        for proc in (True, False):  # inside some containers /proc cannot be mounted anew
            reason = _runs(wrapper(bwrap, proc))
            if not reason:
                return Level("bubblewrap", bwrap, proc, 0, filter_bytes, lacks)
        reason = f"bubblewrap does not work here ({reason})"
    if wanted == "bubblewrap":
        raise RuntimeError(reason)
    python = interpreter("")[0]
    if python != interpreter("bwrap")[0]:
        lacks += (f"programs run on {python} with its own packages, because this environment's Python is closed to other users",)
    version, root = _landlock(), os.geteuid() == 0
    if not version and root:
        lacks += ("files that everybody may read can be read (no Landlock in this kernel)",)
    if not version and not root:
        lacks += ("your own files and processes are within reach: this kernel has no Landlock and we are not root",)
    if not root:
        lacks += ("runs at the same time share the process limit, so a fork bomb in one can make a fork in another fail",)
    if not filter_bytes and version < 4:
        lacks += ("the network is open",)
    if 0 < version < 6 and not root:
        lacks += ("the program can signal your other processes (Landlock before version 6)",)
    return Level(
        "process", "", True, version, filter_bytes, (*lacks, f"no namespaces: {reason if wanted != 'process' else 'not asked for'}")
    )
