"""The last process before an untrusted program: takes its rights away, then becomes it. Run by path, standard library only.

Standard input carries the job, then the program's own input: one line with a number of bytes, that many of a marshalled dict, the rest.

    {"argv": [...], "env": {...}, "cwd": "/work", "files": {"name.py": "text"}, "uid": 61184 or null,
     "rlimits": {"RLIMIT_CPU": [10, 11]}, "seccomp": "hex of a BPF program or empty", "landlock": null or {"read": [...], "write": [...]},
     "supervise": false}

With `supervise` (no PID namespace around us) a parent stays behind. It adopts orphans (subreaper), and when the program ends, or when this
process is told to end or loses its own parent, it kills every process that descends from it, however detached, and leaves.

Exit codes: the program's own; 128 + n for signal n; 125 with a line on standard error when the launch itself failed.
"""

# Every run pays for these imports: json and signal alone would double the time to start.
import _signal as signal
import ctypes
import marshal
import os
import resource
import struct
import sys
import time

LAUNCH_FAILED = 125
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 22, 36, 38
LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446
FS_BITS = {1: 0x1FFF, 2: 0x3FFF, 3: 0x7FFF, 4: 0x7FFF, 5: 0xFFFF}
"""Landlock version -> every file-system right it knows; later versions know those of 5."""
FS_READ, FS_FILE = 0x1 | 0x4 | 0x8, 0x1 | 0x2 | 0x4 | 0x4000 | 0x8000
"""Execute, read a file, read a folder; the rights that a rule on a plain file may hold."""
KILL_ATTEMPTS = 200
"""Rounds of 5 ms: a process in the kernel takes a moment to die."""

libc = ctypes.CDLL(None, use_errno=True)


def checked(result, what):
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")
    return result


def read_job():
    """Read the job from file descriptor 0 and leave the offset at the first byte of the program's input."""
    digits = b""
    while not digits.endswith(b"\n"):
        digits += os.read(0, 1)
    data, size = b"", int(digits)
    while len(data) < size:
        data += os.read(0, size - len(data))
    return marshal.loads(data)


def landlock(rules):
    """Deny every file outside `rules` (write implies read), TCP, abstract sockets and signals to the outside, as far as the kernel can."""
    version = checked(libc.syscall(LANDLOCK_CREATE_RULESET, None, 0, 1), "landlock")
    known = FS_BITS[min(version, 5)]
    attributes = struct.pack("QQQ", known, 3, 3)[: 24 if version >= 6 else 16 if version >= 4 else 8]
    ruleset = checked(libc.syscall(LANDLOCK_CREATE_RULESET, attributes, len(attributes), 0), "landlock")
    for rights, paths in ((FS_READ, rules["read"]), (known, rules["write"])):
        for path in paths:
            try:
                fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            allowed = rights & known & (~0 if os.path.isdir(path) else FS_FILE)
            checked(libc.syscall(LANDLOCK_ADD_RULE, ruleset, 1, struct.pack("=Qi", allowed, fd), 0), f"landlock {path}")
            os.close(fd)
    checked(libc.syscall(LANDLOCK_RESTRICT_SELF, ruleset, 0), "landlock")
    os.close(ruleset)


def seccomp(program):
    """Install a BPF program (bytes of 8-byte instructions)."""
    buffer = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(buffer))
    checked(libc.prctl(PR_SET_SECCOMP, 2, header, 0, 0), "seccomp")


def become(job):
    """Drop everything and exec; returns only by raising."""
    os.umask(0o077)
    if job["uid"] is not None:
        os.setgroups([])
        os.setresgid(job["uid"], job["uid"], job["uid"])
        os.setresuid(job["uid"], job["uid"], job["uid"])
    os.chdir(job["cwd"])
    for name, text in job["files"].items():
        if os.path.dirname(name):
            os.makedirs(os.path.dirname(name), exist_ok=True)
        with open(name, "w", encoding="utf-8", errors="surrogateescape") as file:
            file.write(text)
    for name, wanted in job["rlimits"].items():
        most = resource.getrlimit(getattr(resource, name))[1]
        soft, hard = (value if most == resource.RLIM_INFINITY else min(value, most) for value in wanted)
        resource.setrlimit(getattr(resource, name), (soft, hard))
    checked(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    if job["landlock"]:
        landlock(job["landlock"])
    if job["seccomp"]:
        seccomp(bytes.fromhex(job["seccomp"]))
    os.execve(job["argv"][0], job["argv"], job["env"])


def processes():
    """(pid, parent pid, user id, threads) of every process there is."""
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat", "rb") as file:
                    fields = file.read().rpartition(b")")[2].split()
                yield int(entry), int(fields[1]), os.stat(f"/proc/{entry}").st_uid, int(fields[17])
            except (OSError, IndexError):
                continue  # gone meanwhile


def descendants(root, table):
    """Every process below `root` in a table of `processes`."""
    children = {}
    for pid, parent, _, _ in table:
        children.setdefault(parent, []).append(pid)
    found, queue = [], [root]
    while queue:
        below = children.get(queue.pop(), [])
        found += below
        queue += below
    return found


def kill_all(uid):
    """Kill everything below this process; with a user id of its own, everything of that user. False if something survives."""
    for _ in range(KILL_ATTEMPTS):
        if uid is not None:  # one call reaches all at once: nothing can fork away from it
            pid = os.fork()
            if pid == 0:
                os.setresuid(uid, uid, uid)
                try:
                    os.kill(-1, signal.SIGKILL)
                finally:
                    os._exit(0)
            os.waitpid(pid, 0)
        below = descendants(os.getpid(), processes())
        for stop in (signal.SIGSTOP, signal.SIGKILL):  # first none can fork, then none is left
            for pid in below:
                try:  # noqa: SIM105  contextlib, too, takes its time to import
                    os.kill(pid, stop)
                except OSError:
                    pass
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return True
        time.sleep(0.005)
    return False


def supervise(job):
    """Start the program in a child and outlive all it starts; returns its exit code."""
    checked(libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "subreaper")

    def stop(*_):
        kill_all(job["uid"])
        os._exit(128 + signal.SIGKILL)

    parent = os.getppid()
    signal.signal(signal.SIGTERM, stop)
    checked(libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0), "pdeathsig")
    if os.getppid() != parent:
        return LAUNCH_FAILED
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.setsid()
        launch(job)
    os.close(1)  # the program's alone: its end must be seen
    while True:
        pid, status = os.wait()
        if pid == child:
            break
    alive = not kill_all(job["uid"])
    if alive:
        os.write(2, b"sandbox: a process could not be killed\n")
    return os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)


def launch(job):
    try:
        become(job)
    except BaseException as error:
        os.write(2, f"sandbox: launch failed: {type(error).__name__}: {error}\n".encode(errors="replace"))
        os._exit(LAUNCH_FAILED)


if __name__ == "__main__":
    task = read_job()
    if task["supervise"]:
        sys.exit(supervise(task))
    launch(task)
