"""The base of the simulated cluster (`cluster.py`): its engines, its event calendar, outages and fleet changes.

Law: a discrete-event calendar. Its events are `TURN` (a trajectory requests its next turn, or ends), `WAKE` (a replica's next step
boundary) and `CHANGE` (a fleet change, the end of a tool if tools are limited, or a policy timer). Simultaneous events happen in the order
`CHANGE`, `TURN`, `WAKE`, and within a kind in the order they were scheduled. So a replica starts a step with every request of that instant
queued.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from heapq import heappush
from itertools import count, pairwise
from math import inf
from typing import Any

from verl_heddle.fleet import Replica
from verl_heddle.simulate.engine import Engine
from verl_heddle.simulate.options import EngineOptions, FleetChange, Outage
from verl_heddle.simulate.policy import Latency, Policy
from verl_heddle.simulate.result import TurnLog
from verl_heddle.simulate.workload import Request

CHANGE, TURN, WAKE = 0, 1, 2
"""Kinds of events; simultaneous events happen in this order."""


class Stage:
    """The engines and the calendar. A subclass implements `_left`, which handles a request that leaves its engine."""

    def __init__(self, fleet: Sequence[Replica], latency: Latency, policy: Policy, options: EngineOptions) -> None:
        self.engines: list[Engine] = []
        self.log = TurnLog()
        self._latency, self._policy, self._options = latency, policy, options
        self._by_name: dict[str, Engine] = {}
        self._events: list[tuple[float, int, int, Any]] = []
        self._number = count()
        if not fleet:
            raise ValueError("the fleet is empty")
        latency_known = getattr(policy, "latency_known", None)
        if latency_known is not None:
            latency_known(latency)
        self._add(fleet)

    def _left(self, request: Request, now: float) -> None:
        """Handle a request that left its engine: it finished, was cancelled, or its replica leaves the fleet."""
        raise NotImplementedError

    def _at(self, time: float, kind: int, what: Any) -> None:
        heappush(self._events, (time, kind, next(self._number), what))

    def _wake_later(self, engine: Engine) -> None:
        if engine.next_s != inf:
            heappush(self._events, (engine.next_s, WAKE, next(self._number), engine))

    def _add(self, fleet: Iterable[Replica], paused: bool = False) -> list[Engine]:
        fresh = []
        for replica in fleet:
            if replica.name in self.log.replicas:
                raise ValueError(f"two replicas are named {replica.name!r}")
            if self._options.tier is not None:
                replica = replace(replica, tier=True)  # as a real engine reports it
            engine = Engine(replica, self._latency, self._options, len(self.engines))
            engine.paused = paused
            self.engines.append(engine)
            self._by_name[replica.name] = engine
            self.log.replicas.append(replica.name)
            fresh.append(engine)
        self._policy.replicas_added([engine.replica for engine in fresh])
        return fresh

    def schedule(self, changes: Iterable[Outage | FleetChange]) -> None:
        """Add outages and fleet changes to the calendar.

        Raises:
            ValueError: an interval ends before it begins, starts before 0, or two intervals of a replica overlap.
        """
        changes = list(changes)
        outages = sorted((item for item in changes if isinstance(item, Outage)), key=lambda item: (item.replica, item.start_s))
        for first, second in pairwise(outages):
            if first.replica == second.replica and second.start_s < first.end_s:
                raise ValueError(f"outages of replica {first.replica!r} overlap: {first} and {second}")
        for change in changes:
            if isinstance(change, Outage):
                if not 0 <= change.start_s < change.end_s < inf:
                    raise ValueError(f"an outage needs 0 <= start_s < end_s, got {change}")
                self._at(change.start_s, CHANGE, partial(self._outage, change, True))
                self._at(change.end_s, CHANGE, partial(self._outage, change, False))
            else:
                if not (0 <= change.at_s < inf and change.ready_s < inf):
                    raise ValueError(f"a fleet change needs at_s >= 0 and finite times, got {change}")
                self._at(change.at_s, CHANGE, partial(self._change, change))

    def _outage(self, outage: Outage, begins: bool, now: float) -> None:
        engine = self._by_name.get(outage.replica)
        if engine is None:
            if outage.replica in self.log.replicas:  # the replica has left the fleet
                return
            raise ValueError(f"outage of replica {outage.replica!r}, which is not in the fleet")
        if begins:
            engine.pause(now, outage.keep_cache)
        else:
            engine.resume(now)
        self._wake_later(engine)

    def _change(self, change: FleetChange, now: float) -> None:
        late = change.ready_s > now
        for engine in self._add(change.add, paused=late):
            if late:
                self._at(change.ready_s, CHANGE, partial(self._ready, engine))
        leaving = []
        for name in change.remove:
            if name not in self._by_name:
                raise ValueError(f"cannot remove replica {name!r}: it is not in the fleet")
            leaving.append(self._by_name.pop(name))
        self._policy.replicas_removed(change.remove)
        for engine in leaving:
            for request in engine.drain(now):
                self._left(request, now)
            self._wake_later(engine)

    def _ready(self, engine: Engine, now: float) -> None:
        engine.resume(now)
        self._wake_later(engine)
