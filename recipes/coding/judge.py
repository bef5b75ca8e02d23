"""Does a program pass its tests? One run of the sandbox tries them all; expected outputs never enter it.

A harness inside the sandbox forks once per test, so that each starts from a fresh interpreter's state at the cost of a fork, with its own
input, output and time. What it reports back is compared here. A program that forges the report would still have to know the right outputs.
"""

import asyncio
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass

from recipes.coding.tasks import Test
from recipes.sandbox.limits import Limits, Result, Status
from recipes.sandbox.local import Sandbox
from recipes.sandbox.remote import RemoteSandbox, connect

SANDBOX_VARIABLE = "HEDDLE_SANDBOX"
"""Environment: `auto`, `bubblewrap`, `process`, or the URL of a SandboxFusion server."""
TEST_S = 4.0
"""Seconds for one test: contest problems allow 1 to 5."""
OUTPUT_CHARS = 1 << 16
"""Of one test; nobody reads more, and no data set here expects more."""
TESTS = 20
"""At most so many tests of a task are run; contest problems have up to hundreds, of which the first tell nearly all."""
MAX_PROGRAM = 50_000
"""Characters. A longer one is a policy that repeats itself."""
LIMITS = Limits(wall_s=30, cpu_s=30, output_kb=4096)
"""Of a whole run; each test has `TEST_S`."""

COMMAND = ("python", "-S", "main.py")
"""Without `site`, which takes longer to import than everything else: the harness gives programs the `exit` they expect."""

HARNESS = r"""
import _signal as signal, _sitebuiltins, builtins, os, sys, time
from _json import encode_basestring_ascii as quoted
builtins.exit = builtins.quit = _sitebuiltins.Quitter("exit", "Ctrl-D")
job = eval(sys.stdin.read())
try:
    code = compile(job["code"], "program.py", "exec")
except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
    report = '{"error": %s}' % quoted(f"{type(error).__name__}: {error}")
    print(f'[{", ".join([report] * len(job["inputs"]))}]')
    sys.exit()
reports = []
for text in job["inputs"]:
    for name, written in (("in", text), ("out", ""), ("err", "")):  # all three, for a program that is too late before it begins
        with open(name, "w") as file:
            file.write(written)
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        for fd, name, flags in ((0, "in", os.O_RDONLY), (1, "out", 577), (2, "err", 577)):
            opened = os.open(name, flags, 0o600)
            os.dup2(opened, fd)
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")
        end = 0
        try:
            exec(code, {"__name__": "__main__", "__builtins__": __builtins__})
        except SystemExit as leave:
            end = leave.code if isinstance(leave.code, int) else 0 if leave.code is None else 1
        except BaseException as error:
            trace, line = error.__traceback__, ""
            while trace:
                if trace.tb_frame.f_code.co_filename == "program.py":
                    line = f" (line {trace.tb_lineno})"
                trace = trace.tb_next
            print(f"{type(error).__name__}: {error}{line}", file=sys.stderr)
            end = 1
        try:
            sys.stdout.flush(), sys.stderr.flush()
        finally:
            os._exit(end & 255)
    until, late = time.monotonic() + job["test_s"], False
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            break
        if time.monotonic() > until:
            late = True
            os.kill(child, signal.SIGKILL)
        time.sleep(0.001)
    try:
        os.killpg(child, signal.SIGKILL)
    except OSError:
        pass
    error = ""
    if late:
        error = "time limit exceeded"
    elif status:
        said = open("err", errors="replace").read(job["chars"]).strip().splitlines()
        error = said[-1][:300] if said else f"ended by signal {status & 127}" if status & 127 else f"exit code {status >> 8}"
    reports.append('{"out": %s, "error": %s}' % (quoted(open("out", errors="replace").read(job["chars"])), quoted(error)))
print(f'[{", ".join(reports)}]')
"""
"""Reads a Python literal and writes JSON by hand: importing json and signal would take a quarter of all the time of a short program."""


@dataclass(frozen=True)
class Verdict:
    """`passed` of `total` tests; `why` says how the first failing one failed, empty if none did. `judged`: the sandbox did its work."""

    passed: int
    total: int
    why: str
    judged: bool = True


def _verdict(result: Result, tests: Sequence[Test]) -> Verdict:
    if not result.ok:
        return Verdict(0, len(tests), result.explain(), result.status is not Status.UNAVAILABLE)
    try:
        reports = json.loads(result.stdout)
        right = [not report["error"] and same(report["out"], test["output"]) for report, test in zip(reports, tests, strict=True)]
    except (ValueError, KeyError, TypeError):  # the program wrote over the harness's report
        return Verdict(0, len(tests), "the program interfered with its tests")
    if all(right):
        return Verdict(len(tests), len(tests), "")
    first = right.index(False)
    test, report = tests[first], reports[first]
    got = report["error"] or f"got {shorten(report['out'])}"
    why = f"Input {shorten(test['input'])}: expected {shorten(test['output'])}, {got}."
    return Verdict(sum(right), len(tests), test.get("note") or why)


def same(output: str, expected: str) -> bool:
    """Whether two outputs are the same text; spaces at the ends of lines and blank lines at the end do not count."""
    return [line.rstrip() for line in output.rstrip().splitlines()] == [line.rstrip() for line in expected.rstrip().splitlines()]


def shorten(text: str, most: int = 200) -> str:
    """At most `most` characters of a text, for a message; line ends are kept, blanks around it are not."""
    text = text.strip()
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}"


class Judge:
    """Judges programs in one sandbox, which is made on first use: `where` as for `recipes.sandbox.remote.connect`.

    Raises (on first use):
        ValueError, RuntimeError: there is no such sandbox here.
    """

    def __init__(self, where: str | None = None, parallel: int = 0) -> None:
        self._where, self._parallel = where or os.environ.get(SANDBOX_VARIABLE) or "auto", parallel
        self._sandbox: Sandbox | RemoteSandbox | None = None

    @property
    def sandbox(self) -> Sandbox | RemoteSandbox:
        if self._sandbox is None:
            self._sandbox = connect(self._where, LIMITS, self._parallel)
        return self._sandbox

    def judge(self, code: str, tests: Sequence[Test]) -> Verdict:
        """Run `code` on the first `TESTS` tests. Never raises for what a program does."""
        tests = tests[:TESTS]
        if len(code) > MAX_PROGRAM:
            return Verdict(0, len(tests), f"the program is longer than {MAX_PROGRAM} characters")
        return _verdict(self.sandbox.run({"main.py": HARNESS}, COMMAND, stdin=self._job(code, tests)), tests)

    async def ajudge(self, code: str, tests: Sequence[Test]) -> Verdict:
        """As `judge`, beside the event loop; cancelling it ends the run."""
        tests = tests[:TESTS]
        if len(code) > MAX_PROGRAM:
            return Verdict(0, len(tests), f"the program is longer than {MAX_PROGRAM} characters")
        sandbox = self.sandbox if self._sandbox else await asyncio.to_thread(lambda: self.sandbox)  # trying levels takes a moment
        return _verdict(await sandbox.arun({"main.py": HARNESS}, COMMAND, stdin=self._job(code, tests)), tests)

    @staticmethod
    def _job(code: str, tests: Sequence[Test]) -> str:
        """A Python literal of ASCII alone, so that any text of a model arrives, unpaired surrogates included."""
        return ascii({"code": code, "inputs": [test["input"] for test in tests], "test_s": TEST_S, "chars": OUTPUT_CHARS})
