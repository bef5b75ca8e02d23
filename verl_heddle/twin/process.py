"""Runs the twin's process without waiting for it: the answer comes with a later step's metrics, or never."""

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
"""Seconds after the budget at which the process ends itself, in case this one is dead and cannot stop it."""

CPU_SHARE = 0.01
"""Share of the host's CPU time since the first step, over all cores: on a host whose every core is busy, a step takes longer by what the
twin takes (bench/auto/cost.py). A GPU host has enough cores to judge every step."""

FREE_CPU_S = 60.0
"""CPU seconds granted beyond that share, once per run, so that a short run on a small machine is judged at every step."""


class Twin:
    """Judges one step at a time; a step that ends meanwhile, or when the host's share of CPU time is used up, is skipped. Nothing here
    raises.

    Args:
        budget_s: seconds after which the process is stopped.
        log: takes a line that says why a step is not judged.
    """

    def __init__(self, budget_s: float, log: Callable[[str], None]) -> None:
        self._budget_s, self._log = budget_s, log
        self._thread: threading.Thread | None = None
        self._answer: dict[str, float] = {}
        self._since_s: float | None = None
        """When the first step ended, on the monotonic clock."""
        self.cpu_s = 0.0
        """CPU seconds spent on judging so far."""
        self.failures = 0
        """Steps that could not be judged."""

    def ask(self, number: int, step: Columns, meta: Mapping[str, Any]) -> None:
        """Start to judge step `number`; `meta`: the engines, as in the trace."""
        now = time.monotonic()
        self._since_s = now if self._since_s is None else self._since_s
        allowed_s = FREE_CPU_S + CPU_SHARE * (os.cpu_count() or 1) * (now - self._since_s)
        if self.cpu_s > allowed_s or (self._thread is not None and self._thread.is_alive()):
            return
        self._thread = threading.Thread(target=self._run, args=(number, step, dict(meta)), name="heddle-twin", daemon=True)
        self._thread.start()

    def told(self) -> dict[str, float]:
        """The answer since the last call, with its `step`; empty if there is none."""
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
                self._log(f"the twin cannot judge this run: its makespans are off by more than {MOST_ERROR:.0%} (heddle/twin/error)")
        except subprocess.TimeoutExpired:
            self.cpu_s += self._budget_s
            self._failed(f"its simulation takes more than {self._budget_s:g} s (heddle.twin.budget_s)")
        except Exception as error:
            self._failed(f"{type(error).__name__}: {error}")

    def _failed(self, why: str) -> None:
        self.failures += 1
        self._log(f"the twin could not judge a step: {why}")
