"""A worker's link to the router: what it knows without asking, what it asks, what it tells, and how it goes on without.

Law
- A trajectory that `stays` (`Decision.stays`) runs its next turns where it is, and the router is told: nothing to ask, nothing to wait for.
  Its worker asks for its first turn, once the router has said that it was put out (`PutOut`), and for everything that begins again: after a
  weight update, after its replica was lost.
- What is told goes with the next question, or at the latest after `outbox.LATEST_S`, each event once and in order.
- One call to the router is always open and brings its news (`news`): it is how held turns hear that they may go, and how a worker
  finds out that the router died.
- A router that does not answer in time is lost: from then on verl's rule places what this worker sends, until the manager has heard from
  the router again. Nothing that the router said before is believed then; what is to be told is kept.

A turn that was begun while the news that put its trajectory out were on their way is told with its replica, and counted where it is.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple
from uuid import uuid4

from verl.workers.rollout.router import GlobalRequestLoadBalancer

from verl_heddle.trajectory import Decision, Reason, TurnStart
from verl_heddle.verl_plugin.calls import ANSWER_S, Promises, answer
from verl_heddle.verl_plugin.log import log_once
from verl_heddle.verl_plugin.news import LetIn, News
from verl_heddle.verl_plugin.outbox import KEPT, Event, Outbox, Questions


class _Stay(NamedTuple):
    replica: str
    priority: int


@dataclass(slots=True)
class _Asking:
    """A trajectory with turns whose question has not been answered for good."""

    requests: set[str] = field(default_factory=set)
    out: int = 0
    """Number of the news that put it out last, meanwhile."""


class Link:
    """One per worker, on its event loop.

    Args:
        router: the `HeddleRouter` actor.
        servers: server id -> actor handle, as of start-up; asked again when an unknown id comes.
        router_s: seconds that the router has for an answer.
        counts: what went wrong and was got around, by name; counted here.
    """

    def __init__(self, router: Any, servers: dict[str, Any], router_s: float, counts: Counter[str]) -> None:
        self.name = uuid4().hex[:8]
        """Of this worker, which no other has."""
        self.servers = dict(servers)
        self.local: GlobalRequestLoadBalancer | None = None
        """verl's rule, while the router is lost."""
        self._router, self._router_s, self._counts = router, router_s, counts
        self._outbox, self._questions = Outbox(self._send), Questions(self._put)
        self._kept: deque[Event] = deque(maxlen=KEPT)
        """For the router when it is back."""
        self._stays: dict[str, _Stay] = {}
        """By trajectory."""
        self._asking: dict[str, _Asking] = {}
        """By trajectory."""
        self._all_out = 0
        """Number of the news that put every trajectory out last."""
        self._let_in = Promises()
        """How held turns go, by request."""
        self._process, self._heard = "", 0
        """The router's process, and the number of its last news."""
        self._listening: asyncio.Task[None] | None = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        """One that a worker is sent is that worker's: it has a name of its own."""
        self.__dict__.update(state)
        self.name = uuid4().hex[:8]

    # --- a turn -----------------------------------------------------------------------------------------------------------

    def begin(self, turn: TurnStart) -> Decision | None:
        """Where the turn runs, which the router is told; None: it has to be asked."""
        stay = self._stays.get(turn.trajectory.key)
        if stay is None or turn.leg or self.local is not None or stay.replica not in self.servers:
            return None
        self.post("turn_begun", (turn, stay.replica))
        return Decision(stay.replica, stay.priority, Reason.STICKY, stays=True)

    async def ask(self, turn: TurnStart) -> Decision:
        """Where the turn runs, or that it is held and `wait` says where.

        Raises:
            RuntimeError: no replica is left (verl's own words).
        """
        self._asking.setdefault(turn.trajectory.key, _Asking()).requests.add(turn.request)
        try:
            decision = await self._decide(turn)
        except BaseException:
            self._settled(turn)
            raise
        if not decision.held:
            self._settled(turn)
        return decision

    async def wait(self, turn: TurnStart, decision: Decision) -> tuple[Decision, float]:
        """Until the router lets a held turn in: where it goes, and for how many seconds every engine was paused meanwhile. Without an
        answer it goes where is known, or by verl's rule."""
        try:
            number, news = await self._until_let_in(turn.request) or (0, None)
            if news is None or news.replica is None:
                raise LookupError(f"turn {turn.request} goes nowhere: it is over, or no replica is left, or the router was lost")
            await self._know(news.replica)
            decision = replace(decision, replica=news.replica, stays=news.stays)
            self._remember(turn, decision, number)
            return decision, news.paused_s
        except Exception as error:
            self._counts["hold_lost"] += 1
            log_once(f"a turn that was held back was never let in ({type(error).__name__}: {error}); it goes without")
            if decision.replica in self.servers:
                return decision, 0.0
            self._go_local(error, turn)
            return self._decide_alone(turn), 0.0
        finally:
            self._settled(turn)

    async def _until_let_in(self, request: str) -> tuple[int, LetIn] | None:
        """The news of it and their number; None: there will be none."""
        while True:
            try:
                found: tuple[int, LetIn] | None = await self._let_in.wait(request, ANSWER_S)
                return found
            except TimeoutError:
                if self._listening is None or self._listening.done():
                    raise

    def _settled(self, turn: TurnStart) -> None:
        """Nothing that the router says of it is wanted any more."""
        self._let_in.drop(turn.request)
        asking = self._asking.get(turn.trajectory.key)
        if asking is not None:
            asking.requests.discard(turn.request)
            if not asking.requests:
                del self._asking[turn.trajectory.key]

    async def _decide(self, turn: TurnStart) -> Decision:
        if self.local is None:
            try:
                return await self._ask(turn)
            except RuntimeError:
                raise  # "No available servers": verl's own error, and verl's own clients know it
            except Exception as error:
                self._go_local(error, turn)
        return self._decide_alone(turn)

    def _decide_alone(self, turn: TurnStart) -> Decision:
        self._counts["fallback_router"] += 1
        assert self.local is not None
        replica, _ = self.local.acquire_server(turn.conversation)
        return Decision(replica, 0, Reason.FALLBACK_ROUTER)

    async def _ask(self, turn: TurnStart) -> Decision:
        if self._listening is None or self._listening.done():
            self._listening = asyncio.create_task(self._listen())
        decision, number = await self._questions.ask(turn)
        if decision.replica or not decision.held:
            await self._know(decision.replica)
        self._remember(turn, decision, number)
        return decision

    async def _put(self, turns: list[TurnStart]) -> list[tuple[Decision, int]]:
        asked: Any = self._router.turns_started.remote(turns, self._outbox.take(), self.name)
        decisions, number = await answer(asked, self._router_s)
        return [(decision, number) for decision in decisions]

    async def _know(self, replica: str) -> None:
        """Have the handle of a replica that the router chose."""
        if replica not in self.servers:
            self.servers = await answer(self._router.handles.remote(), self._router_s)
        if replica not in self.servers:
            raise LookupError(f"the router chose {replica}, which it does not list")

    # --- what is known without asking -------------------------------------------------------------------------------------

    def _remember(self, turn: TurnStart, decision: Decision, number: int) -> None:
        """The trajectory stays, said the router when the number of its last news was this, unless later news say otherwise."""
        key = turn.trajectory.key
        if decision.stays and self.local is None and number >= max(self._all_out, self._asking[key].out):
            self._stays[key] = _Stay(decision.replica, decision.priority)

    def ask_again(self, key: str) -> None:
        """A weight update has interrupted the trajectory: its context is gone, and perhaps its place."""
        self._stays.pop(key, None)

    def ended(self, key: str) -> None:
        """The trajectory is over."""
        self._stays.pop(key, None)

    async def _listen(self) -> None:
        """Hear the router's news for as long as it answers."""
        try:
            while True:
                news = self._router.news.remote(self.name, self._process, self._heard)
                self._take(await answer(news, ANSWER_S + self._router_s))
        except Exception as error:
            self._go_local(error)
            self._let_in.drop_all()

    def _take(self, news: News) -> None:
        if news.router != self._process:
            if self._process:  # another process, which knows nothing of what the one before it said
                self._stays.clear()
                self._let_in.drop_all()
            self._process, self._heard, self._all_out = news.router, 0, 0
            for open_one in self._asking.values():
                open_one.out = 0
        for number, item in news.items:
            if number <= self._heard:
                continue
            self._heard = number
            if isinstance(item, LetIn):
                asking = self._asking.get(item.request.rpartition(":")[0])
                if asking is not None and item.request in asking.requests:
                    self._let_in.give(item.request, (number, item))
            elif item.trajectory is None:
                self._stays.clear()
                self._all_out = number
            else:
                self._stays.pop(item.trajectory, None)
                if item.trajectory in self._asking:
                    self._asking[item.trajectory].out = number

    # --- what is told -----------------------------------------------------------------------------------------------------

    def post(self, event: str, what: Any) -> None:
        """Tell the router something: soon, or when it is back. A dead router is found out by the open call."""
        if self.local is None:
            self._outbox.put(event, what)
        else:
            self._kept.append((event, what))

    def flush(self) -> None:
        """Send pending events now."""
        self._outbox.send()

    def ordered(self, event: str, what: Any) -> Any:
        """Tell it now, and have a reference to what the router answers; None: it is lost, or has been just now, and will be told."""
        if self.local is None:
            self._outbox.send()
            try:
                return getattr(self._router, event).remote(what)
            except Exception as error:
                self._go_local(error)
        self.post(event, what)
        return None

    def _send(self, events: list[Event]) -> None:
        if self.local is not None:
            self._kept.extend(events)
            return
        try:
            self._router.handle_events.remote(events)
        except Exception as error:
            self._go_local(error)
            self._kept.extend(events)

    # --- losses -----------------------------------------------------------------------------------------------------------

    def _go_local(self, error: Exception, turn: TurnStart | None = None) -> None:
        """From now on this worker applies verl's rule by itself, to what it sends itself. `turn`: one that the router may have placed."""
        if self.local is None:
            log_once(f"router lost ({type(error).__name__}: {error}); this worker goes on under verl's own rule")
            self.local = GlobalRequestLoadBalancer(self.servers)
            self._stays.clear()
        if turn is not None:
            self.post("turn_withdrawn", turn)

    def router_is_back(self) -> None:
        """Trust the router again (told by the manager once it has answered)."""
        self.local = None
        events = list(self._kept)
        self._kept.clear()
        if events:
            self._send(events)

    def servers_are(self, servers: dict[str, Any]) -> None:
        """These and no others (told by the manager)."""
        self.servers = servers
        if self.local is not None:
            self.local = GlobalRequestLoadBalancer(servers)

    async def replica_lost(self, name: str) -> None:
        """Go on without this replica, and tell the router to."""
        self._stays = {key: stay for key, stay in self._stays.items() if stay.replica != name}
        if self.local is not None:
            self.local.remove_servers([name])
            return
        self._outbox.send()
        try:
            await answer(self._router.replica_lost.remote(name), self._router_s)
        except Exception as error:
            self._go_local(error)
