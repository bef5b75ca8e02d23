"""Python programs that skip their imports: each run is a fork of a process that has imported what is slow to import.

A run has the arguments, environment, folder, `sys.path`, output and exit code of `python <words>`. It cannot have options of the
interpreter (`-X`, `sys.orig_argv`), and a variable that is read during those imports comes too late. Runs follow each other.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn


class Preloaded:
    """A Python (ours, if no other is given) that has imported `modules`; the imports happen at the first run, in `environment`."""

    def __init__(self, *modules: str, python: str | Path = sys.executable, environment: Mapping[str, str] | None = None) -> None:
        self._modules, self._python, self._environment = modules, str(python), environment
        self._server: subprocess.Popen[str] | None = None

    def run(
        self, words: Sequence[str], folder: Path, environment: Mapping[str, str], timeout_s: float = 300
    ) -> subprocess.CompletedProcess[str]:
        """What `python <words>` leaves: `words` are `-m MODULE ...`, `-c CODE ...` or `SCRIPT ...`.

        Raises:
            subprocess.TimeoutExpired: the program (or the imports) took longer than `timeout_s`; it is killed.
        """
        if self._server is None:
            command = [self._python, "-W", "ignore", __file__, *self._modules]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            self._server = subprocess.Popen(command, **pipes, cwd="/", env=self._environment, start_new_session=True)
        with tempfile.TemporaryDirectory() as kept:
            out, err = Path(kept, "out"), Path(kept, "err")
            request = {"words": list(words), "folder": str(folder), "environment": dict(environment), "out": str(out), "err": str(err)}
            print(json.dumps(request), file=self._server.stdin, flush=True)
            if not select.select([self._server.stdout], [], [], timeout_s)[0]:
                self.close()
                raise subprocess.TimeoutExpired(list(words), timeout_s)
            answer = self._server.stdout.readline()
            assert answer, f"the process that had imported {self._modules} is gone"
            return subprocess.CompletedProcess(list(words), int(answer), out.read_text(), err.read_text())

    def close(self) -> None:
        """End the process and what it has started."""
        if self._server is not None:
            os.killpg(self._server.pid, signal.SIGKILL)
            self._server.communicate()
            self._server = None


def serve(modules: Sequence[str]) -> list[str]:
    """Fork for each line on stdin and answer with its exit code. Returns in a fork alone: the words that it is to run."""
    answers = os.fdopen(os.dup(1), "w")  # what the modules say must not be taken for answers
    os.dup2(2, 1)
    sys.path.remove(str(Path(__file__).parent))  # the folder of this script, not of those that it runs
    for name in modules:
        importlib.import_module(name)
    gc.freeze()  # else a fork copies every object as soon as it collects garbage
    for line in sys.stdin:
        request = json.loads(line)
        sys.stdout.flush()
        sys.stderr.flush()
        if (pid := os.fork()) == 0:
            answers.close()
            return become(request)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), file=answers, flush=True)
    sys.exit()


def become(request: dict) -> list[str]:
    """Take on the arguments, environment, folder and output of a request."""
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    for number, name in ((0, os.devnull), (1, request["out"]), (2, request["err"])):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_APPEND), number)
    found = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = [*found, *(path for path in sys.path if path not in found)]
    return request["words"]


def execute(words: Sequence[str]) -> NoReturn:
    """Run a program as `__main__`; leave with its exit code, at once: to take apart all that is imported takes a second."""
    code: object = 0
    try:
        if words[0] == "-m":
            sys.argv = list(words[1:])
            sys.path.insert(0, os.getcwd())
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        elif words[0] == "-c":
            sys.argv = ["-c", *words[2:]]
            sys.path.insert(0, "")
            exec(compile(words[1], "<string>", "exec"), vars(sys.modules["__main__"]))
        else:
            sys.argv = list(words)
            sys.path.insert(0, str(Path(words[0]).resolve().parent))
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as left:
        code = left.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if isinstance(code, str):
        print(code, file=sys.stderr)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


if __name__ == "__main__":
    execute(serve(sys.argv[1:]))
