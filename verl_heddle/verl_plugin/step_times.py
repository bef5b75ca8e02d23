"""Step times from the run itself: fitted in a thread of the trainer's process after each step, sent to the router when ready."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

from verl_heddle.latency.calibrate import step_times
from verl_heddle.latency.model import LatencyModel
from verl_heddle.trajectory import Trajectory
from verl_heddle.verl_plugin.log import log_once


class StepTimes:
    """One thread at a time; a step that ends while it works is left out."""

    def __init__(self) -> None:
        self._known: LatencyModel | None = None
        self._thread: threading.Thread | None = None

    def learn(self, records: list[Trajectory], degrees: Mapping[str, int], tell: Callable[[LatencyModel], Any]) -> None:
        """Begin to fit; `tell` gets the model, if there is one. `degrees`: by replica; what was learnt of others stays."""
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._run, args=(records, degrees, tell), name="heddle-step-times", daemon=True)
            self._thread.start()

    def _run(self, records: list[Trajectory], degrees: Mapping[str, int], tell: Callable[[LatencyModel], Any]) -> None:
        try:
            self._known = step_times(records, degrees, self._known)
            tell(self._known)
        except Exception as error:
            log_once(f"placement goes by verl's rule until the engines' step times are known: {error}")
