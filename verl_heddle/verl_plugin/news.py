"""Messages that the router pushes to workers: admitted turns, and evicted trajectories, whose next turn needs a new request.

Law: each worker keeps one call to the router open (`Mailboxes.wait`). It returns all pending messages as soon as there is one, or nothing
after `ANSWER_S`. Messages are numbered over the life of the router process and kept until the worker's next call acknowledges them, so a
lost answer is sent again. There is one call per worker, not per held turn; messages that arrive while it is in transit are batched.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple
from uuid import uuid4

from verl_heddle.trajectory import TurnStart
from verl_heddle.verl_plugin.calls import ANSWER_S

SILENT_S = 10 * ANSWER_S
"""Seconds without a call after which a worker counts as dead and its messages are dropped."""


class LetIn(NamedTuple):
    """A held turn is admitted to `replica`; None: it is not sent, because it is over or no replica is left."""

    request: str
    replica: str | None
    paused_s: float = 0.0
    """Seconds of the hold during which every engine was paused."""
    stays: bool = False
    """Same meaning as `Decision.stays`."""


class PutOut(NamedTuple):
    """The trajectory is evicted: its next turn must be requested. None: all trajectories of the worker are."""

    trajectory: str | None


class News(NamedTuple):
    """Unacknowledged messages with their numbers, which are valid only for this `router` process."""

    router: str
    items: list[tuple[int, LetIn | PutOut]]


@dataclass(slots=True)
class _Box:
    items: deque[tuple[int, LetIn | PutOut]] = field(default_factory=deque)
    call: asyncio.Future[None] | None = None
    """The worker's open call, if any."""
    called_s: float = 0.0


class Mailboxes:
    """Pending messages by worker, on the router's side."""

    def __init__(self) -> None:
        self.router = uuid4().hex
        self.number = 0
        """Number of the last message."""
        self._boxes: dict[str, _Box] = {}

    def put(self, worker: str, item: LetIn | PutOut) -> None:
        """Queue a message for the worker and answer its open call."""
        self.number += 1
        box = self._box(worker)
        box.items.append((self.number, item))
        self._answer(box)

    async def wait(self, worker: str, router: str, heard: int) -> News:
        """Wait for messages after number `heard` of process `router`; returns at once if that is not this process."""
        box = self._box(worker)
        box.called_s = time.monotonic()
        while router == self.router and box.items and box.items[0][0] <= heard:
            box.items.popleft()
        self._answer(box)  # an older call, which the worker has given up
        if not box.items and router == self.router:
            loop = asyncio.get_running_loop()
            call = box.call = loop.create_future()
            timer = loop.call_later(ANSWER_S, self._answer, box)
            try:
                await call
            finally:
                timer.cancel()
        return News(self.router, list(box.items))

    def forget_silent(self) -> None:
        """Drop the messages of dead workers."""
        before = time.monotonic() - SILENT_S
        for worker in [name for name, box in self._boxes.items() if box.call is None and box.called_s < before]:
            del self._boxes[worker]

    def _box(self, worker: str) -> _Box:
        if worker not in self._boxes:
            self._boxes[worker] = _Box(called_s=time.monotonic())
        return self._boxes[worker]

    @staticmethod
    def _answer(box: _Box) -> None:
        call, box.call = box.call, None
        if call is not None and not call.done():
            call.set_result(None)


class Held(NamedTuple):
    """A held turn."""

    worker: str
    turn: TurnStart
    paused_s: float
    """Total seconds that every engine had been paused when the turn arrived."""


class Promised:
    """The router's commitments to workers, with a message on each change: held turns will be admitted, and trajectories stay resident."""

    def __init__(self) -> None:
        self.mail = Mailboxes()
        self.held: dict[str, Held] = {}
        """Held turns by request."""
        self.stays: dict[str, tuple[str, int]] = {}
        """Worker and training step of each trajectory that stays."""

    def hold(self, worker: str, turn: TurnStart, paused_s: float) -> None:
        """Record a held turn; arguments as in `Held`."""
        self.held[turn.request] = Held(worker, turn, paused_s)

    def let_in(self, request: str, replica: str | None, paused_s: float, stays: bool) -> None:
        """Admit the turn to `replica` if it is held; None: it is not sent. `paused_s`: total seconds so far of all engines paused."""
        held = self.held.pop(request, None)
        if held is None:
            return
        if stays:
            self.stay(held.worker, held.turn)
        self.mail.put(held.worker, LetIn(request, replica, paused_s - held.paused_s, stays))

    def stay(self, worker: str, turn: TurnStart) -> None:
        """Record that the trajectory stays on the replica of this turn."""
        self.stays[turn.trajectory.key] = worker, turn.trajectory.step

    def put_out(self, key: str) -> None:
        """Evict the trajectory, if it stays, and notify its worker."""
        worker, _ = self.stays.pop(key, (None, 0))
        if worker is not None:
            self.mail.put(worker, PutOut(key))

    def put_out_before(self, step: int) -> None:
        """Evict the trajectories of earlier training steps."""
        for key in [key for key, (_, began) in self.stays.items() if began < step]:
            self.put_out(key)

    def put_all_out(self) -> None:
        """Evict every trajectory, with one message per worker."""
        workers = {worker for worker, _ in self.stays.values()}
        self.stays.clear()
        for worker in workers:
            self.mail.put(worker, PutOut(None))
