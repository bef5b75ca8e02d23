"""Asks the judging process, and never waits for it: an answer comes with a later step's metrics, or not at all."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from verl_heddle.traces.columns import Columns
from verl_heddle.twin import MOST_ERROR

GRACE_S = 10.0
"""After the budget: a process that is not stopped from here, because this one is dead, ends by itself."""

CPU_SHARE = 0.01
"""Of the host's CPU time since the first step, all its cores together: where the update needs every core, a step is longer by what the twin
takes (bench/auto/cost.py). A host of GPUs has so many cores that every step is judged."""

FREE_CPU_S = 60.0
"""CPU seconds beyond that share, once in a run: a short run on a small machine is judged at every step."""


class Twin:
    """One step at a time; one that ends while another is judged, or when the host's share of CPU time is used up, is left out. Nothing
    here raises.

    Args:
        budget_s: seconds after which a process is stopped.
        say: told in a line, once for each reason, why a step is not judged.
    """

    def __init__(self, budget_s: float, say: Callable[[str], None]) -> None:
        self._budget_s, self._say = budget_s, say
        self._thread: threading.Thread | None = None
        self._answer: dict[str, float] = {}
        self._since_s: float | None = None
        """When the first step ended, on the monotonic clock."""
        self.cpu_s = 0.0
        """CPU time that judging has taken."""
        self.failures = 0
        """Steps that could not be judged."""

    def ask(self, number: int, step: Columns, meta: Mapping[str, Any]) -> None:
        """Begin to judge step `number`; `meta`: what the trace says of the engines."""
        now = time.monotonic()
        self._since_s = now if self._since_s is None else self._since_s
        allowed_s = FREE_CPU_S + CPU_SHARE * (os.cpu_count() or 1) * (now - self._since_s)
        if self.cpu_s > allowed_s or (self._thread is not None and self._thread.is_alive()):
            return
        self._thread = threading.Thread(target=self._run, args=(number, step, dict(meta)), name="heddle-twin", daemon=True)
        self._thread.start()

    def told(self) -> dict[str, float]:
        """The answer that came since the last call, its `step` with it; empty if none did."""
        answer, self._answer = self._answer, {}
        return answer

    def _run(self, number: int, step: Columns, meta: dict[str, Any]) -> None:
        try:
            done = subprocess.run(
                [sys.executable, "-m", "verl_heddle.twin", str(self._budget_s + GRACE_S)],
                input=pickle.dumps((step, meta), protocol=pickle.HIGHEST_PROTOCOL),
                capture_output=True,
                timeout=self._budget_s,
            )
            if done.returncode:
                raise RuntimeError(f"exit code {done.returncode}: {done.stderr.decode(errors='replace').strip()[-200:]}")
            answer = json.loads(done.stdout)
            self.cpu_s += answer.pop("cpu_s", 0.0)
            if "why" in answer:
                raise ValueError(answer["why"])
            self._answer = {"step": float(number), **answer}
            if "speedup" not in answer:
                self._say(f"the twin cannot judge this run: its makespans are off by more than {MOST_ERROR:.0%} (heddle/twin/error)")
        except subprocess.TimeoutExpired:
            self.cpu_s += self._budget_s
            self._failed(f"it takes more than {self._budget_s:g} s (heddle.twin.budget_s)")
        except Exception as error:
            self._failed(f"{type(error).__name__}: {error}")

    def _failed(self, why: str) -> None:
        self.failures += 1
        self._say(f"the twin does not judge a step: {why}")
