"""Continuum (CacheTTL): a program's KV is pinned through its tool call for a time to live; program-level first come, first served.

Law, per replica: turns wait for KV; those whose program is pinned before others, each by arrival of the program. A turn is admitted if what
runs, what is pinned and its context fit. Whoever is not pinned is evicted before anybody who is.
- When a turn ends, its context is pinned for the tau that maximises P(tool <= tau) * (T * eta + reload) - tau; 0 is not pinned. P: over the
  seconds this tool took, over those of all tools if it is known from 100 calls or fewer, exponential with mean 1 s and eta = 1 if all are.
  T: mean wait of those who were evicted. eta: the negated correlation of turns taken and turns left over ended programs. reload: seconds to
  read the whole context again.
- A pin that runs out is kept while its program's turn waits.
- Where nothing runs and the first in the queue does not fit, pins are given up, latest program first; likewise where contexts have grown
  over the KV. In the engine the latest program is thrown out first.

Source: arXiv 2511.02230 (v6, sections 4.1 to 4.3, Algorithm 1), read through two independent public reconstructions
(michiLXY03/vllm-continuum-plugin, burninglhw/vllm-continuum), not the paper's text: the authors' fork lacks the estimate and pins for 2 s
unless the tool takes longer in the mean. The formula, 100 and 1 s are the paper's by both.
Assumed, where the paper is silent: the last 256 waits, calls and programs count; a program of n turns gives the pairs (k, n - k) for k < n;
eta is 0 where it is undefined; programs are placed by verl's rule (fewest turns, running or waiting) and stay; parallel tools count as the
last named. `latency_known` gives the reload cost, which the paper measures beforehand. Needs `EngineOptions(order="priority")`.
Cost: O(waiting on the replica + 256) per turn.
"""

from __future__ import annotations

from bisect import insort
from collections import defaultdict, deque
from collections.abc import Iterable
from heapq import heappop, heappush
from math import inf, log
from typing import cast

import numpy as np

from verl_heddle.fleet import Replica
from verl_heddle.simulate.baselines.programs import Home, Program, Programs
from verl_heddle.simulate.policy import Latency
from verl_heddle.trajectory import Decision, ToolStart, TurnStart

CALLS = 100
"""From so many calls or fewer the next wider distribution is taken."""

PRIOR_S = 1.0
"""Mean of the distribution before anything is known."""

WINDOW = 256
"""Waits, calls and programs that count (assumed)."""


def time_to_live(seconds: list[float], gain_s: float) -> float:
    """The time to live that pays most, given sorted seconds of calls, the shortest of several; with `CALLS` or fewer by the prior."""
    if len(seconds) <= CALLS:
        return PRIOR_S * log(gain_s / PRIOR_S) if gain_s > PRIOR_S else 0.0
    values = np.arange(1, len(seconds) + 1) * (gain_s / len(seconds)) - seconds
    best = int(values.argmax())
    return seconds[best] if values[best] > 0 else 0.0


def memory(turns: Iterable[int]) -> float:
    """eta: the negated correlation of k and n - k for k < n, over ended programs of n turns; 0 where it is undefined."""
    count = total = squares = products = 0
    for number in turns:
        count += number - 1
        total += number * (number - 1) // 2
        squares += number * (number - 1) * (2 * number - 1) // 6
        products += number * number * (number - 1) // 2 - number * (number - 1) * (2 * number - 1) // 6
    spread = count * squares - total * total
    return (total * total - count * products) / spread if spread else 0.0


def _window() -> deque[float]:
    return deque(maxlen=WINDOW)


class Continuum(Programs):
    """See the module. A program has a home while it runs or is pinned; `pins` says until when."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.pins: dict[str, float] = {}
        self._expiries: list[tuple[float, str]] = []
        self._queues: dict[str, list[Program]] = {}
        """Waiting programs by replica, by arrival."""
        self._replica: dict[str, str] = {}
        """Where each program's turns go."""
        self._latency: Latency | None = None
        self._calls: defaultdict[str, deque[float]] = defaultdict(_window)
        """Seconds of calls by tool; under "" those of all."""
        self._tool: dict[str, str] = {}
        self._evicted: set[str] = set()
        self._waits = _window()
        self._turns: deque[int] = deque(maxlen=WINDOW)
        self._eta = 0.0

    def latency_known(self, latency: Latency) -> None:
        """What reading takes."""
        self._latency = latency

    def priority(self, program: Program) -> int:
        """By arrival of the program."""
        return program.number

    # --- what is learned --------------------------------------------------------------------------------------------------

    def turn_started(self, turn: TurnStart, now: float) -> Decision:
        """Its tool is back."""
        tool = self._tool.pop(turn.trajectory.key, "")
        if turn.tool_s is not None:
            for name in {"", tool}:
                self._calls[name].append(turn.tool_s)
        return super().turn_started(turn, now)

    def tool_started(self, start: ToolStart, now: float) -> None:
        """The tool has a name: pin by what it took so far."""
        program = self.live.get(start.trajectory.key)
        if program is not None and program.home is not None and program.request is None:
            self._tool[program.key] = start.tool
            self._pin(program, now)

    def _pin(self, program: Program, now: float) -> None:
        replica = self.homes[cast(str, program.home)].replica
        reload_s = 0.0 if self._latency is None else float(self._latency.prefill_s(replica.tp, program.context, 0))
        wait_s = sum(self._waits) / len(self._waits) if self._waits else 0.0
        everything, calls = self._calls[""], self._calls[self._tool.get(program.key, "")]
        eta = self._eta if len(everything) > CALLS else 1.0
        until_s = now + time_to_live(sorted(calls if len(calls) > CALLS else everything), wait_s * eta + reload_s)
        self.pins[program.key] = until_s
        heappush(self._expiries, (until_s, program.key))

    # --- the law ----------------------------------------------------------------------------------------------------------

    def asked(self, program: Program, now: float) -> None:
        """Every turn waits in its replica's queue."""
        self._queue(program)
        self.admit(now)

    def returned(self, program: Program, now: float) -> None:
        """Pin it, and give up the latest where contexts have grown too far."""
        self._withdraw(program)
        if program.home is not None:
            self._pin(program, now)
            self._relieve(self.homes[program.home], 0, None)
        self.admit(now)

    def over(self, program: Program, now: float) -> None:
        """Its turns tell of eta; its context goes first."""
        self._turns.append(program.turns)
        self._eta = memory(self._turns)
        self._withdraw(program)
        self._dropped.append((program.key, self._replica.pop(program.key)))
        self.pins.pop(program.key, None)
        self._tool.pop(program.key, None)
        self._evicted.discard(program.key)
        self.admit(now)

    def admit(self, now: float) -> None:
        """On each replica the first in the queue, while it fits."""
        for name, queue in self._queues.items():
            home = self.homes[name]
            while queue and home.busy < home.replica.slots:
                program = next((one for one in queue if one.home is not None), queue[0])
                need = 0 if program.home is not None else program.context
                if not home.busy:
                    self._relieve(home, need, program)
                elif home.used + need > home.capacity:
                    break
                if program.key in self._evicted:
                    self._evicted.discard(program.key)
                    self._waits.append(now - program.since_s)
                self.pins.pop(program.key, None)
                queue.remove(program)
                self.place(program, name, now)

    def tick(self, now: float) -> None:
        """Pins run out."""
        while self._expiries and self._expiries[0][0] <= now:
            until_s, key = heappop(self._expiries)
            if self.pins.get(key) == until_s and key not in self.waiting:
                self._unpin(self.live[key])
        self.admit(now)

    def due_s(self, now: float) -> float:
        """When the next pin runs out."""
        while self._expiries and self.pins.get(self._expiries[0][1]) != self._expiries[0][0]:
            heappop(self._expiries)
        return self._expiries[0][0] if self._expiries else inf

    def replicas_added(self, replicas: Iterable[Replica]) -> None:
        """Replicas joined, empty."""
        super().replicas_added(replicas)
        for name in self.homes:
            self._queues.setdefault(name, [])

    def replicas_removed(self, names: Iterable[str]) -> None:
        """Replicas left: who waited there waits elsewhere."""
        names = list(names)
        super().replicas_removed(names)
        for name in names:
            for program in self._queues.pop(name):
                self._queue(program)

    def _queue(self, program: Program) -> None:
        name = self._replica.get(program.key, "")
        if name not in self.homes:
            name = self.fewest(lambda home: home.busy + len(self._queues[home.name])).name
            self._replica[program.key] = name
        insort(self._queues[name], program, key=lambda one: one.number)

    def _withdraw(self, program: Program) -> None:
        queue = self._queues.get(self._replica[program.key], [])
        if program in queue:
            queue.remove(program)

    def _relieve(self, home: Home, need: int, keep: Program | None) -> None:
        """Give up pins, latest program first, until so much more fits."""
        while home.used + need > home.capacity:
            pinned = [one for one in home.programs.values() if not one.running and one is not keep]
            if not pinned:
                return
            self.counts["relieved"] += 1
            self._unpin(max(pinned, key=lambda one: one.number))

    def _unpin(self, program: Program) -> None:
        self.pins.pop(program.key, None)
        self._evicted.add(program.key)
        self.leave(program, drop=True)
