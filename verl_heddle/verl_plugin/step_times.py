"""Learns step times from the run: fits them in a thread of the trainer's process after each step, and sends them to the router."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

from verl_heddle.latency.calibrate import step_times
from verl_heddle.latency.model import LatencyModel
from verl_heddle.trajectory import Trajectory
from verl_heddle.verl_plugin.log import log_once


class StepTimes:
    """Runs one fit at a time; a step that ends during a fit is skipped."""

    def __init__(self) -> None:
        self._known: LatencyModel | None = None
        self._thread: threading.Thread | None = None

    def learn(self, records: list[Trajectory], degrees: Mapping[str, int], send: Callable[[LatencyModel], Any]) -> None:
        """Start a fit; `send` gets the model if the fit succeeds. `degrees`: by replica; times of other degrees are kept."""
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._run, args=(records, degrees, send), name="heddle-step-times", daemon=True)
            self._thread.start()

    def _run(self, records: list[Trajectory], degrees: Mapping[str, int], send: Callable[[LatencyModel], Any]) -> None:
        try:
            self._known = step_times(records, degrees, self._known)
            send(self._known)
        except Exception as error:
            log_once(f"placement uses verl's rule until the engines' step times are known: {error}")
