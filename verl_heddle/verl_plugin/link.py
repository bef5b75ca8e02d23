"""A worker's link to the router: requests and events out, messages in, resident trajectories cached, verl's rule as fallback.

Law
- A trajectory that `stays` (`Decision.stays`) runs its next turns on its replica without a request; the router only gets an event. The
  worker requests a decision for a first turn, after an eviction (`PutOut`), and for every restart: after a weight update or a lost replica.
- Events are sent with the next request, or within `outbox.LATEST_S`, once each and in order.
- One call to the router is always open and returns its messages (`news`). They admit held turns, and a failed call reveals that the router
  died.
- A router that misses its deadline is lost. From then on verl's rule places this worker's turns, until the manager has reached the router
  again. The router's earlier answers are discarded; events are kept.

A turn begun while the message that evicts its trajectory is in transit is reported with its replica, and the router counts it there.
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
class _Undecided:
    """A trajectory with turns that have no final decision yet."""

    requests: set[str] = field(default_factory=set)
    evicted: int = 0
    """Number of the last message that evicted it meanwhile."""


class Link:
    """The link; one per worker, on its event loop.

    Args:
        router: the `HeddleRouter` actor.
        servers: server id -> actor handle, as of start-up; fetched again when an unknown id appears.
        router_s: deadline of the router's answers, in seconds.
        counts: errors and fallbacks by name, incremented here.
    """

    def __init__(self, router: Any, servers: dict[str, Any], router_s: float, counts: Counter[str]) -> None:
        self.name = uuid4().hex[:8]
        """Unique name of this worker."""
        self.servers = dict(servers)
        self.local: GlobalRequestLoadBalancer | None = None
        """verl's own rule while the router is lost, else None."""
        self._router, self._router_s, self._counts = router, router_s, counts
        self._outbox, self._questions = Outbox(self._send), Questions(self._send_requests)
        self._kept: deque[Event] = deque(maxlen=KEPT)
        """Events for the router once it is back."""
        self._stays: dict[str, _Stay] = {}
        """Replica and priority by resident trajectory."""
        self._asking: dict[str, _Undecided] = {}
        """Undecided turns by trajectory."""
        self._all_evicted = 0
        """Number of the last message that evicted every trajectory."""
        self._let_in = Promises()
        """Admissions of held turns, by request."""
        self._process, self._received = "", 0
        """The router process, and the number of its last message."""
        self._listening: asyncio.Task[None] | None = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Give the copy unpickled in a worker a unique name."""
        self.__dict__.update(state)
        self.name = uuid4().hex[:8]

    # --- a turn -----------------------------------------------------------------------------------------------------------

    def begin(self, turn: TurnStart) -> Decision | None:
        """The decision for a resident trajectory's turn, reported to the router as an event; None: call `ask`."""
        stay = self._stays.get(turn.trajectory.key)
        if stay is None or turn.leg or self.local is not None or stay.replica not in self.servers:
            return None
        self.post("turn_begun", (turn, stay.replica))
        return Decision(stay.replica, stay.priority, Reason.STICKY, stays=True)

    async def ask(self, turn: TurnStart) -> Decision:
        """Request a decision: where the turn runs, or that it is held until `wait` returns.

        Raises:
            RuntimeError: no replica is left (verl's own text).
        """
        self._asking.setdefault(turn.trajectory.key, _Undecided()).requests.add(turn.request)
        try:
            decision = await self._decide(turn)
        except BaseException:
            self._settled(turn)
            raise
        if not decision.held:
            self._settled(turn)
        return decision

    async def wait(self, turn: TurnStart, decision: Decision) -> tuple[Decision, float]:
        """Wait until the router admits a held turn. Returns the decision, and the seconds of the hold during which every engine was
        paused. On an error the turn runs on the replica already decided, or where verl's rule puts it."""
        try:
            number, news = await self._await_admission(turn.request) or (0, None)
            if news is None or news.replica is None:
                raise LookupError(f"turn {turn.request} was not admitted: it is over, no replica is left, or the router was lost")
            await self._ensure_handle(news.replica)
            decision = replace(decision, replica=news.replica, stays=news.stays)
            self._remember(turn, decision, number)
            return decision, news.paused_s
        except Exception as error:
            self._counts["hold_lost"] += 1
            log_once(f"a held turn was never admitted ({type(error).__name__}: {error}); it runs without waiting")
            if decision.replica in self.servers:
                return decision, 0.0
            self._fall_back(error, turn)
            return self._decide_locally(turn), 0.0
        finally:
            self._settled(turn)

    async def _await_admission(self, request: str) -> tuple[int, LetIn] | None:
        """The message that admits the turn, and its number; None: it was dropped. Waits for as long as the news call is open."""
        while True:
            try:
                found: tuple[int, LetIn] | None = await self._let_in.wait(request, ANSWER_S)
                return found
            except TimeoutError:
                if self._listening is None or self._listening.done():
                    raise

    def _settled(self, turn: TurnStart) -> None:
        """The turn has its final decision, or was given up; ignore later messages about it."""
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
                raise  # "No available servers": verl's own error, which its clients expect
            except Exception as error:
                self._fall_back(error, turn)
        return self._decide_locally(turn)

    def _decide_locally(self, turn: TurnStart) -> Decision:
        self._counts["fallback_router"] += 1
        assert self.local is not None
        replica, _ = self.local.acquire_server(turn.conversation)
        return Decision(replica, 0, Reason.FALLBACK_ROUTER)

    async def _ask(self, turn: TurnStart) -> Decision:
        if self._listening is None or self._listening.done():
            self._listening = asyncio.create_task(self._listen())
        decision, number = await self._questions.ask(turn)
        if decision.replica or not decision.held:
            await self._ensure_handle(decision.replica)
        self._remember(turn, decision, number)
        return decision

    async def _send_requests(self, turns: list[TurnStart]) -> list[tuple[Decision, int]]:
        reply: Any = self._router.turns_started.remote(turns, self._outbox.take(), self.name)
        decisions, number = await answer(reply, self._router_s)
        return [(decision, number) for decision in decisions]

    async def _ensure_handle(self, replica: str) -> None:
        """Make sure that the handle of a replica chosen by the router is known."""
        if replica not in self.servers:
            self.servers = await answer(self._router.handles.remote(), self._router_s)
        if replica not in self.servers:
            raise LookupError(f"the router chose replica {replica}, which is not in its list")

    # --- resident trajectories and messages -------------------------------------------------------------------------------

    def _remember(self, turn: TurnStart, decision: Decision, number: int) -> None:
        """Record that the trajectory stays, unless a message after `number`, the last one when the router decided, has evicted it."""
        key = turn.trajectory.key
        if decision.stays and self.local is None and number >= max(self._all_evicted, self._asking[key].evicted):
            self._stays[key] = _Stay(decision.replica, decision.priority)

    def ask_again(self, key: str) -> None:
        """Request the next turn: a weight update interrupted the trajectory, its cached context is gone, and it may have been evicted."""
        self._stays.pop(key, None)

    def ended(self, key: str) -> None:
        """Forget a trajectory that is over."""
        self._stays.pop(key, None)

    async def _listen(self) -> None:
        """Receive the router's messages for as long as it answers."""
        try:
            while True:
                news = self._router.news.remote(self.name, self._process, self._received)
                self._handle_news(await answer(news, ANSWER_S + self._router_s))
        except Exception as error:
            self._fall_back(error)
            self._let_in.drop_all()

    def _handle_news(self, news: News) -> None:
        if news.router != self._process:
            if self._process:  # a restarted router has none of the old one's state
                self._stays.clear()
                self._let_in.drop_all()
            self._process, self._received, self._all_evicted = news.router, 0, 0
            for asking in self._asking.values():
                asking.evicted = 0
        for number, item in news.items:
            if number <= self._received:
                continue
            self._received = number
            if isinstance(item, LetIn):
                undecided = self._asking.get(item.request.rpartition(":")[0])
                if undecided is not None and item.request in undecided.requests:
                    self._let_in.give(item.request, (number, item))
            elif item.trajectory is None:
                self._stays.clear()
                self._all_evicted = number
            else:
                self._stays.pop(item.trajectory, None)
                if item.trajectory in self._asking:
                    self._asking[item.trajectory].evicted = number

    # --- events -----------------------------------------------------------------------------------------------------------

    def post(self, event: str, payload: Any) -> None:
        """Queue an event: sent soon, or once the router is back. The open news call detects a dead router."""
        if self.local is None:
            self._outbox.put(event, payload)
        else:
            self._kept.append((event, payload))

    def flush(self) -> None:
        """Send the pending events now."""
        self._outbox.send()

    def ordered(self, event: str, payload: Any) -> Any:
        """Send an event now and return a reference to the router's answer; None: the router is lost, and the event is kept."""
        if self.local is None:
            self._outbox.send()
            try:
                return getattr(self._router, event).remote(payload)
            except Exception as error:
                self._fall_back(error)
        self.post(event, payload)
        return None

    def _send(self, events: list[Event]) -> None:
        if self.local is not None:
            self._kept.extend(events)
            return
        try:
            self._router.handle_events.remote(events)
        except Exception as error:
            self._fall_back(error)
            self._kept.extend(events)

    # --- losses -----------------------------------------------------------------------------------------------------------

    def _fall_back(self, error: Exception, turn: TurnStart | None = None) -> None:
        """Place this worker's turns by verl's rule from now on. `turn`: a turn that the router may have placed, to be withdrawn."""
        if self.local is None:
            log_once(f"router lost ({type(error).__name__}: {error}); this worker falls back to verl's own rule")
            self.local = GlobalRequestLoadBalancer(self.servers)
            self._stays.clear()
        if turn is not None:
            self.post("turn_withdrawn", turn)

    def router_is_back(self) -> None:
        """Use the router again and send it the kept events; called by the manager once the router has answered."""
        self.local = None
        events = list(self._kept)
        self._kept.clear()
        if events:
            self._send(events)

    def servers_are(self, servers: dict[str, Any]) -> None:
        """Replace the list of servers; called by the manager."""
        self.servers = servers
        if self.local is not None:
            self.local = GlobalRequestLoadBalancer(servers)

    async def replica_lost(self, name: str) -> None:
        """Stop using this replica, and report the loss to the router."""
        self._stays = {key: stay for key, stay in self._stays.items() if stay.replica != name}
        if self.local is not None:
            self.local.remove_servers([name])
            return
        self._outbox.send()
        try:
            await answer(self._router.replica_lost.remote(name), self._router_s)
        except Exception as error:
            self._fall_back(error)
