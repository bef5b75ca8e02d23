"""What the router tells a worker of its own accord: held turns that may go, and trajectories whose next turn is to be asked for again.

Law: each worker has one call to the router open (`Mailboxes.wait`), answered as soon as there is news for it, with all there is, at the
latest after `ANSWER_S`. News are numbered over the life of the router's process and kept until the worker's next call says that it has
heard them: the answer that is lost is given again. One call per worker, not one per held turn; what comes while it is on its way goes
together.
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
"""A worker that has not called for so long is dead, and its news are dropped."""


class LetIn(NamedTuple):
    """A held turn goes to this replica; None: nowhere, it is over or no replica is left."""

    request: str
    replica: str | None
    paused_s: float = 0.0
    """Seconds that it was held while every engine was paused."""
    stays: bool = False
    """As `Decision.stays`."""


class PutOut(NamedTuple):
    """The next turn of this trajectory has to be asked for; None: of every trajectory of the worker's."""

    trajectory: str | None


class News(NamedTuple):
    """What a worker has not heard yet, numbered; numbers of another `router` process have no meaning."""

    router: str
    items: list[tuple[int, LetIn | PutOut]]


@dataclass(slots=True)
class _Box:
    items: deque[tuple[int, LetIn | PutOut]] = field(default_factory=deque)
    call: asyncio.Future[None] | None = None
    """The worker's, while it is open."""
    called_s: float = 0.0


class Mailboxes:
    """The router's end, by worker."""

    def __init__(self) -> None:
        self.router = uuid4().hex
        self.number = 0
        """Of the last news."""
        self._boxes: dict[str, _Box] = {}

    def put(self, worker: str, item: LetIn | PutOut) -> None:
        """For this worker."""
        self.number += 1
        box = self._box(worker)
        box.items.append((self.number, item))
        self._answer(box)

    async def wait(self, worker: str, router: str, heard: int) -> News:
        """News for a worker that has heard those up to number `heard` of the process `router`; at once if that was another."""
        box = self._box(worker)
        box.called_s = time.monotonic()
        while router == self.router and box.items and box.items[0][0] <= heard:
            box.items.popleft()
        self._answer(box)  # a call that the worker has given up
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
        """Drop the news of workers that are dead."""
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
    """A turn that is held back."""

    worker: str
    turn: TurnStart
    paused_s: float
    """For how long every engine had been paused when it came."""


class Promised:
    """What workers count on, and hear of if it changes: that held turns go sometime, and that trajectories stay."""

    def __init__(self) -> None:
        self.mail = Mailboxes()
        self.held: dict[str, Held] = {}
        """By request."""
        self.stays: dict[str, tuple[str, int]] = {}
        """Worker and training step, by trajectory."""

    def hold(self, worker: str, turn: TurnStart, paused_s: float) -> None:
        """The turn is held; see `Held`."""
        self.held[turn.request] = Held(worker, turn, paused_s)

    def let_in(self, request: str, replica: str | None, paused_s: float, stays: bool) -> None:
        """The turn goes there, if it is held, after `paused_s` in which every engine has been paused; None: it goes nowhere."""
        held = self.held.pop(request, None)
        if held is None:
            return
        if stays:
            self.stay(held.worker, held.turn)
        self.mail.put(held.worker, LetIn(request, replica, paused_s - held.paused_s, stays))

    def stay(self, worker: str, turn: TurnStart) -> None:
        """The trajectory stays where the turn goes."""
        self.stays[turn.trajectory.key] = worker, turn.trajectory.step

    def put_out(self, key: str) -> None:
        """The trajectory does not stay any more, if it did."""
        worker, _ = self.stays.pop(key, (None, 0))
        if worker is not None:
            self.mail.put(worker, PutOut(key))

    def put_out_before(self, step: int) -> None:
        """Nor do those of earlier training steps."""
        for key in [key for key, (_, began) in self.stays.items() if began < step]:
            self.put_out(key)

    def put_all_out(self) -> None:
        """Nor does anybody."""
        workers = {worker for worker, _ in self.stays.values()}
        self.stays.clear()
        for worker in workers:
            self.mail.put(worker, PutOut(None))
