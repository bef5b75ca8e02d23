"""Sums vLLM's request events into queueing time and number of preemptions per request. One instance per engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

FIELD = "heddle"
"""Key of verl's `TokenOutput.extra_fields` that carries the sums from the server to the client."""

QUEUED, SCHEDULED, PREEMPTED = 1, 2, 3
"""`vllm.v1.engine.EngineCoreEventType`, by value; the contract test compares."""

MAX_LIVES = 100_000
"""Requests whose server call never returned (a killed caller) must not pile up."""


@dataclass(slots=True)
class RequestLife:
    """`queue_s` seconds waiting for a slot, preempted time included; `preemptions` how often it lost its slot."""

    queue_s: float = 0.0
    preemptions: int = 0
    _waiting_since: float | None = None

    def event(self, kind: int, timestamp: float) -> None:
        """Take one engine event; timestamps are the engine's monotonic seconds."""
        if kind == SCHEDULED:
            if self._waiting_since is not None:
                self.queue_s += timestamp - self._waiting_since
                self._waiting_since = None
            return
        if kind == PREEMPTED:
            self.preemptions += 1
        self._waiting_since = timestamp


class RequestLives:
    """Lives of the requests in flight, by the id the caller gave."""

    def __init__(self) -> None:
        self._lives: dict[str, RequestLife] = {}

    def listen(self, output_processor: Any) -> None:
        """Read the events of every batch of outputs before vLLM's `OutputProcessor` consumes it."""
        process = output_processor.process_outputs

        def process_outputs(engine_core_outputs: Any, *args: Any, **kwargs: Any) -> Any:
            for output in engine_core_outputs:
                for event in output.events or ():
                    self.life(output.request_id.rsplit("-", 1)[0]).event(event.type, event.timestamp)
            return process(engine_core_outputs, *args, **kwargs)

        output_processor.process_outputs = process_outputs

    def life(self, request_id: str) -> RequestLife:
        """The life of a request, begun if new."""
        if request_id not in self._lives and len(self._lives) >= MAX_LIVES:
            self._lives.pop(next(iter(self._lives)))
        return self._lives.setdefault(request_id, RequestLife())

    def pop(self, request_id: str) -> RequestLife | None:
        """The finished life, forgotten here; None if the engine told nothing."""
        return self._lives.pop(request_id, None)
