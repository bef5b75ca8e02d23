"""Asks the judging process, and never waits for it: an answer comes with a later step's metrics, or not at all."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any

from verl_heddle.traces.columns import Columns
from verl_heddle.twin import MOST_ERROR

GRACE_S = 10.0
"""After the budget: a process that is not stopped from here, because this one is dead, ends by itself."""


class Twin:
    """One step at a time; one that ends while another is judged is left out. Nothing here raises.

    Args:
        budget_s: seconds after which a process is stopped.
        say: told in a line, once for each reason, why a step is not judged.
    """

    def __init__(self, budget_s: float, say: Callable[[str], None]) -> None:
        self._budget_s, self._say = budget_s, say
        self._thread: threading.Thread | None = None
        self._answer: dict[str, float] = {}
        self.failures = 0
        """Steps that could not be judged."""

    def ask(self, number: int, step: Columns, meta: Mapping[str, Any]) -> None:
        """Begin to judge step `number`; `meta`: what the trace says of the engines."""
        if self._thread is not None and self._thread.is_alive():
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
            if "why" in answer:
                raise ValueError(answer["why"])
            self._answer = {"step": float(number), **answer}
            if "speedup" not in answer:
                self._say(f"the twin cannot judge this run: its makespans are off by more than {MOST_ERROR:.0%} (heddle/twin/error)")
        except subprocess.TimeoutExpired:
            self._failed(f"it takes more than {self._budget_s:g} s (heddle.twin.budget_s)")
        except Exception as error:
            self._failed(f"{type(error).__name__}: {error}")

    def _failed(self, why: str) -> None:
        self.failures += 1
        self._say(f"the twin does not judge a step: {why}")
