"""Run programs on a SandboxFusion server (bytedance/SandboxFusion, the remote sandbox that verl's reward functions use) instead of here.

`connect("http://host:8080/run_code")` gives a `RemoteSandbox`, `connect("auto")` a local `Sandbox`; both have `run` and `arun`.
The server enforces the limits: `wall_s` and `address_mb` are sent, the others are its own.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import threading
import time
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from recipes.sandbox.limits import Limits, Result, Status
from recipes.sandbox.local import Sandbox

GRACE_S = 30.0
"""Beyond a run's own limit: a busy server queues."""


def connect(where: str = "auto", limits: Limits | None = None, parallel: int = 0, packages: bool = False) -> Sandbox | RemoteSandbox:
    """The sandbox that a setting names: an http(s) URL, or a level of the local one.

    Raises:
        ValueError, RuntimeError: see `levels.find`.
    """
    if where.startswith(("http://", "https://")):
        return RemoteSandbox(where, limits, parallel)
    return Sandbox(limits, where, parallel, packages)


class RemoteSandbox:
    """As `Sandbox`, elsewhere. `parallel`: requests at a time; 0: four per CPU of this machine, which only waits."""

    def __init__(self, url: str, limits: Limits | None = None, parallel: int = 0) -> None:
        self.url, self.limits = url, limits or Limits()
        self.parallel = parallel or 4 * (os.cpu_count() or 1)
        self._room = threading.BoundedSemaphore(self.parallel)
        self._executor = ThreadPoolExecutor(self.parallel, thread_name_prefix="sandbox")

    def run(
        self,
        files: Mapping[str, str],
        argv: Sequence[str] = ("python", "main.py"),
        stdin: str = "",
        cancel: threading.Event | None = None,
    ) -> Result:
        """Run the Python program that `argv` names, its options left to the server.

        A failing server is a result (`UNAVAILABLE`), not an exception.

        Raises:
            ValueError: `argv` is not `python FILE`, which is all a server takes.
        """
        program = argv[-1]
        if argv[0] != "python" or program not in files or not all(word.startswith("-") for word in argv[1:-1]):
            raise ValueError(f"a remote sandbox runs 'python FILE', FILE among the files, not {list(argv)}")
        others = {name: _base64(text) for name, text in files.items() if name != program}
        job = {"code": files[program], "language": "python", "stdin": stdin, "files": others}
        job |= {"run_timeout": self.limits.wall_s, "memory_limit_MB": self.limits.address_mb}
        request = urllib.request.Request(self.url, json.dumps(job).encode(), {"Content-Type": "application/json"})
        with self._room:
            start = time.monotonic()
            try:
                with urllib.request.urlopen(request, timeout=self.limits.wall_s + GRACE_S) as answer:
                    return self._result(json.loads(answer.read()), time.monotonic() - start)
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                return Result(Status.UNAVAILABLE, None, "", f"{self.url}: {type(error).__name__}: {error}", time.monotonic() - start)

    async def arun(self, files: Mapping[str, str], argv: Sequence[str] = ("python", "main.py"), stdin: str = "") -> Result:
        """As `run`, beside the event loop. A cancelled request is not waited for; the server ends it by its own limit."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, self.run, files, argv, stdin)

    def close(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)

    def __enter__(self) -> RemoteSandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _result(self, answer: dict[str, Any], wall_s: float) -> Result:
        """The server's answer in our words. Raises KeyError, TypeError or AttributeError when it is none."""
        ran = answer.get("run_result") or {}
        most = self.limits.output_kb << 10
        out, err = (ran.get("stdout") or "")[:most], (ran.get("stderr") or "")[:most]
        if ran.get("status") == "TimeLimitExceeded":
            return Result(Status.TIMEOUT, None, out, err, wall_s)
        code = ran.get("return_code")
        if answer["status"] == "SandboxError" or code is None:
            return Result(Status.UNAVAILABLE, None, out, f"{self.url}: {answer.get('message') or answer['status']}", wall_s)
        if code < 0 or 128 < code < 193:
            return Result(Status.SIGNAL, 128 - code if code < 0 else code, out, err, wall_s)
        return Result(Status.OK if code == 0 else Status.FAILED, code, out, err, wall_s)


def _base64(text: str) -> str:
    return base64.b64encode(text.encode(errors="surrogateescape")).decode()
