"""Continuum (CacheTTL): pin a program's KV during its tool call for a time to live, and schedule programs first come, first served.

Law, per replica: turns wait for KV. Turns of pinned programs come first; within each class, programs are ordered by arrival. A turn is
admitted if the running contexts, the pinned contexts and its own context fit. Unpinned contexts are evicted before pinned ones.
- When a turn ends, its context is pinned for the tau that maximises P(tool <= tau) * (T * eta + reload) - tau; tau = 0 means no pin.
  P: distribution of this tool's seconds; with 100 calls or fewer, of all tools' seconds; with 100 calls or fewer in total, exponential with
  mean 1 s, and eta = 1. T: mean wait of evicted programs. eta: negated correlation of turns taken and turns left over ended programs.
  reload: seconds to recompute the whole context.
- An expired pin is kept while its program's turn waits.
- If nothing runs and the first turn in the queue does not fit, or if contexts have grown beyond the KV, pins are dropped, latest program
  first. The engine preempts the latest program first.

Source: arXiv 2511.02230 (v6, sections 4.1 to 4.3, Algorithm 1), known here from two independent public reconstructions
(michiLXY03/vllm-continuum-plugin, burninglhw/vllm-continuum), not from the paper's text. The authors' fork lacks the estimate and pins for
2 s unless the tool's mean is longer. Both reconstructions attribute the formula, 100 and 1 s to the paper.
Assumed, because the paper does not specify it: the last 256 waits, calls and programs count; a program of n turns gives the pairs
(k, n - k) for k < n; eta is 0 if undefined; programs are placed by verl's rule (fewest turns, running or waiting) and stay; parallel tools
count as the one named last. `latency_known` gives the reload cost, which the paper profiles in advance. Needs
`EngineOptions(order="priority")`.
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
"""With this many calls or fewer, the next wider distribution is used."""

PRIOR_S = 1.0
"""Mean of the prior distribution, seconds."""

WINDOW = 256
"""Number of most recent waits, calls and programs that count (assumed)."""


def time_to_live(seconds: list[float], gain_s: float) -> float:
    """The optimal time to live, given the sorted seconds of calls; the shortest of ties. With `CALLS` or fewer calls, by the prior."""
    if len(seconds) <= CALLS:
        return PRIOR_S * log(gain_s / PRIOR_S) if gain_s > PRIOR_S else 0.0
    values = np.arange(1, len(seconds) + 1) * (gain_s / len(seconds)) - seconds
    best = int(values.argmax())
    return seconds[best] if values[best] > 0 else 0.0


def memory(turns: Iterable[int]) -> float:
    """eta: the negated correlation of k and n - k for k < n, over ended programs of n turns; 0 if undefined."""
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
    """Continuum. A program has a home while it runs or is pinned; `pins` has the expiry times, seconds."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.pins: dict[str, float] = {}
        self._expiries: list[tuple[float, str]] = []
        self._queues: dict[str, list[Program]] = {}
        """Waiting programs by replica, in order of arrival."""
        self._replica: dict[str, str] = {}
        """The replica of each program's turns."""
        self._latency: Latency | None = None
        self._calls: defaultdict[str, deque[float]] = defaultdict(_window)
        """Seconds of calls by tool; "" has the calls of all tools."""
        self._tool: dict[str, str] = {}
        self._evicted: set[str] = set()
        self._waits = _window()
        self._turns: deque[int] = deque(maxlen=WINDOW)
        self._eta = 0.0

    def latency_known(self, latency: Latency) -> None:
        """Keep the latency model for the reload cost."""
        self._latency = latency

    def priority(self, program: Program) -> int:
        """Arrival order of the program."""
        return program.number

    # --- estimates --------------------------------------------------------------------------------------------------------

    def turn_started(self, turn: TurnStart, now: float) -> Decision:
        """Record the seconds of the tool that has ended."""
        tool = self._tool.pop(turn.trajectory.key, "")
        if turn.tool_s is not None:
            for name in {"", tool}:
                self._calls[name].append(turn.tool_s)
        return super().turn_started(turn, now)

    def tool_started(self, start: ToolStart, now: float) -> None:
        """The tool's name is known: pin by the distribution of that tool."""
        program = self.live.get(start.trajectory.key)
        if program is not None and program.home is not None and program.request is None:
            self._tool[program.key] = start.tool
            self._pin(program, now)

    def _pin(self, program: Program, now: float) -> None:
        replica = self.homes[cast(str, program.home)].replica
        reload_s = 0.0 if self._latency is None else float(self._latency.prefill_s(replica.tp, program.context, 0))
        wait_s = sum(self._waits) / len(self._waits) if self._waits else 0.0
        all_calls, calls = self._calls[""], self._calls[self._tool.get(program.key, "")]
        eta = self._eta if len(all_calls) > CALLS else 1.0
        until_s = now + time_to_live(sorted(calls if len(calls) > CALLS else all_calls), wait_s * eta + reload_s)
        self.pins[program.key] = until_s
        heappush(self._expiries, (until_s, program.key))

    # --- the law ----------------------------------------------------------------------------------------------------------

    def asked(self, program: Program, now: float) -> None:
        """Queue the turn on its replica, and admit what fits."""
        self._enqueue(program)
        self.admit(now)

    def returned(self, program: Program, now: float) -> None:
        """Pin the program, and drop the latest pins if contexts have outgrown the KV."""
        self._dequeue(program)
        if program.home is not None:
            self._pin(program, now)
            self._drop_pins(self.homes[program.home], 0, None)
        self.admit(now)

    def over(self, program: Program, now: float) -> None:
        """Update eta with the program's turns, and have its context evicted first."""
        self._turns.append(program.turns)
        self._eta = memory(self._turns)
        self._dequeue(program)
        self._dropped.append((program.key, self._replica.pop(program.key)))
        self.pins.pop(program.key, None)
        self._tool.pop(program.key, None)
        self._evicted.discard(program.key)
        self.admit(now)

    def admit(self, now: float) -> None:
        """On each replica, admit from the front of the queue while the first turn fits."""
        for name, queue in self._queues.items():
            home = self.homes[name]
            while queue and home.busy < home.replica.slots:
                program = next((waiting for waiting in queue if waiting.home is not None), queue[0])
                need = 0 if program.home is not None else program.context
                if not home.busy:
                    self._drop_pins(home, need, program)
                elif home.used + need > home.capacity:
                    break
                if program.key in self._evicted:
                    self._evicted.discard(program.key)
                    self._waits.append(now - program.since_s)
                self.pins.pop(program.key, None)
                queue.remove(program)
                self.place(program, name, now)

    def tick(self, now: float) -> None:
        """Drop expired pins."""
        while self._expiries and self._expiries[0][0] <= now:
            until_s, key = heappop(self._expiries)
            if self.pins.get(key) == until_s and key not in self.waiting:
                self._unpin(self.live[key])
        self.admit(now)

    def due_s(self, now: float) -> float:
        """When the next pin expires, seconds; inf if there is none."""
        while self._expiries and self.pins.get(self._expiries[0][1]) != self._expiries[0][0]:
            heappop(self._expiries)
        return self._expiries[0][0] if self._expiries else inf

    def replicas_added(self, replicas: Iterable[Replica]) -> None:
        """Replicas joined, empty."""
        super().replicas_added(replicas)
        for name in self.homes:
            self._queues.setdefault(name, [])

    def replicas_removed(self, names: Iterable[str]) -> None:
        """Replicas left; programs that waited there queue on other replicas."""
        names = list(names)
        super().replicas_removed(names)
        for name in names:
            for program in self._queues.pop(name):
                self._enqueue(program)

    def _enqueue(self, program: Program) -> None:
        name = self._replica.get(program.key, "")
        if name not in self.homes:
            name = self.fewest(lambda home: home.busy + len(self._queues[home.name])).name
            self._replica[program.key] = name
        insort(self._queues[name], program, key=lambda queued: queued.number)

    def _dequeue(self, program: Program) -> None:
        queue = self._queues.get(self._replica[program.key], [])
        if program in queue:
            queue.remove(program)

    def _drop_pins(self, home: Home, need: int, keep: Program | None) -> None:
        """Drop pins, latest program first, until `need` more tokens fit. The pin of `keep` is not dropped."""
        while home.used + need > home.capacity:
            pinned = [program for program in home.programs.values() if not program.running and program is not keep]
            if not pinned:
                return
            self.counts["relieved"] += 1
            self._unpin(max(pinned, key=lambda program: program.number))

    def _unpin(self, program: Program) -> None:
        self.pins.pop(program.key, None)
        self._evicted.add(program.key)
        self.leave(program, drop=True)
