"""Who runs on a replica: its slots, their prefill, their decoding, and who loses a slot.

Accounting only; when steps happen and what they cost is `engine.py`. Step numbers count the replica's steps, so the request that
decodes from step s on with L tokens to go ends with step s + L whatever the steps cost: that is what makes an event O(log n).
Source: vLLM `v1/core/sched/scheduler.py` (0.24, 0.27): admission, chunked prefill, preemption with recomputation. Invariants:
running <= slots; `decoding` and `context_sum` describe exactly the running requests whose prefill is complete.
"""

from __future__ import annotations

from collections import deque
from heapq import heappop, heappush

from verl_heddle.fleet import Replica
from verl_heddle.simulate.cache import PrefixCache
from verl_heddle.simulate.options import EngineOptions, HostTier
from verl_heddle.simulate.policy import Latency
from verl_heddle.simulate.waiting import ByPriority, Fcfs, Waiting
from verl_heddle.simulate.workload import Request


class Slots:
    """The requests of one replica. `at_s` is the time of the step boundary they are described at."""

    def __init__(self, replica: Replica, latency: Latency, options: EngineOptions) -> None:
        self.replica = replica
        self.options = options
        room, self._read_s = _tier(options.tier, replica, latency)
        self.cache = PrefixCache(replica.kv_tokens, options.block_tokens, options.prefix_cache, room)
        self.queue: Waiting = Fcfs() if options.order == "fcfs" else ByPriority()
        self.running: dict[Request, None] = {}
        """In order of admission."""
        self.backlog: deque[Request] = deque()
        """Running requests whose prefill is not complete, in order of admission."""
        self.step = 0
        self.decoding = 0
        """Requests that get a token in each step."""
        self.context_sum = 0
        """Tokens they attend to, all together."""
        self.at_s = 0.0
        self.preemptions = self.prefilled = self.recomputed = self.restored = 0
        self._prefill_s = latency.prefill_s
        self._tickets = 0
        self._ends: list[tuple[int, int, Request]] = []
        """Heap of (last step, ticket, request); stale where the ticket is not the request's."""
        self._worst: list[tuple[float, float, int, Request]] = []
        """Heap of (-aged priority, -arrival, ticket, request), kept only for preemption on arrival."""

    def first_end(self) -> int:
        """The step with which the next request ends. Call only with `decoding` > 0."""
        ends = self._ends
        while ends[0][2].ticket != ends[0][1]:
            heappop(ends)
        return ends[0][0]

    def advance(self, steps: int) -> None:
        """Every decoding request gets `steps` tokens."""
        grown = steps * self.decoding
        self.step += steps
        self.context_sum += grown
        self.cache.in_use += grown

    def done(self) -> list[Request]:
        """Take out the requests that have their last token."""
        leaving: list[Request] = []
        ends, step = self._ends, self.step
        while ends and ends[0][0] <= step:
            _, ticket, request = heappop(ends)
            if request.ticket == ticket:
                self.leave(request)
                leaving.append(request)
        return leaving

    def admit(self, request: Request) -> None:
        """Give a request a slot; what it has to prefill is `owed`."""
        cached, restored = self.cache.hit(request)
        self.restored += restored
        self.cache.acquire(request)
        owed = request.context - cached
        if request.cached < 0:
            request.cached = cached
        again = max(0, min(request.known, request.context) - cached)
        request.recomputed += again
        self.recomputed += again
        self.prefilled += owed
        tp = self.replica.tp
        request.rate = (self._prefill_s(tp, owed, cached) - self._prefill_s(tp, 1, cached)) / owed if owed > 1 else 0.0
        if restored:
            request.rate += restored * self._read_s / owed
        request.owed = owed
        request.queue_s += self.at_s - request.queued_s
        request.admitted_s = self.at_s
        self._tickets += 1
        request.ticket = self._tickets
        self.running[request] = None
        self.backlog.append(request)
        if self.options.preempt_margin is not None:
            heappush(self._worst, (-request.rank, -request.arrival_s, request.ticket, request))

    def join(self, request: Request, waited_s: float) -> None:
        """The request's prefill is complete: it decodes from the coming step on, which does `waited_s` of prefill first."""
        self.decoding += 1
        self.context_sum += request.context
        request.ends = self.step + request.left
        request.prefill_s += self.at_s - request.admitted_s + waited_s
        heappush(self._ends, (request.ends - request.floor, request.ticket, request))

    def leave(self, request: Request) -> None:
        """Take the request out of its slot; its `context` and `left` become those of now, its computed prefix stays cached."""
        if request.owed:
            computed = request.context - request.owed
            request.prefill_s += self.at_s - request.admitted_s
            request.owed = 0
            self.backlog.remove(request)
        else:
            left = request.ends - self.step
            request.context += request.left - left
            request.left = left
            self.decoding -= 1
            self.context_sum -= request.context
            computed = request.context - 1  # the last token's KV is stored by the step that reads it
        self.cache.release(request, computed)
        request.known = max(request.known, computed)
        del self.running[request]
        request.ticket = -1

    def lose_slot(self, request: Request) -> None:
        """A running request goes back to the queue."""
        self.leave(request)
        request.preemptions += 1
        self.preemptions += 1
        request.queued_s = self.at_s
        self.queue.put_back(request)

    def squeeze(self) -> None:
        """The next step has no room for its tokens: vLLM's victims leave until it has. One request alone fits (checked on arrival)."""
        cache, running = self.cache, self.running
        assert cache.capacity is not None
        while cache.in_use > cache.capacity:
            if self.options.order == "fcfs":
                self.lose_slot(next(reversed(running)))
            else:
                self.lose_slot(max(running, key=lambda r: (r.rank, r.arrival_s, r.order)))

    def yielding(self, better: Request) -> Request | None:
        """The running request that has to make way for `better`, if there is one."""
        worst, margin = self._worst, self.options.preempt_margin
        while worst:
            minus, _, ticket, request = worst[0]
            if request.ticket == ticket and request.rank == -minus and request.yielded < self.options.preempt_limit:
                break
            heappop(worst)
        if not worst or margin is None:
            return None
        victim = worst[0][3]
        return None if min(victim.priority - better.priority, victim.rank - better.rank) < margin else victim

    def preempt_for_better(self) -> None:
        """Clear a slot for each waiting request that beats a running one by the margin: the best of the waiting against the worst
        of the running.

        Only with every slot taken, and only while there is KV for the better one. A victim cannot come back in the same step: its
        priority is worse than that of whoever it made way for.
        """
        cache, limit = self.cache, self.cache.capacity
        better: list[Request] = []
        promised = 0
        while self.queue.count and len(self.running) + len(better) >= self.replica.slots:
            request = self.queue.peek()
            victim = self.yielding(request)
            if victim is None:
                break
            freed = victim.context - victim.owed if victim.owed else victim.context + victim.left - (victim.ends - self.step)
            promised += cache.need(request)
            if limit is not None and cache.in_use - freed + promised > limit:
                break
            better.append(self.queue.pop())
            victim.yielded += 1
            self.lose_slot(victim)
        for request in better:
            self.queue.push(request)


def _tier(tier: HostTier | None, replica: Replica, latency: Latency) -> tuple[float, float]:
    """Tokens of the replica that the tier holds, and the seconds that one read back adds to a step. Unlimited KV evicts nothing.

    Raises:
        ValueError: the latency model does not tell the bytes of a token.
    """
    if tier is None or replica.kv_tokens is None:
        return 0, 0.0
    kv_bytes = latency.kv_bytes(replica.tp)
    if kv_bytes is None:
        raise ValueError(f"a host tier needs the bytes of a token's KV cache, which the latency model of tp={replica.tp} does not tell")
    return tier.tokens(kv_bytes), tier.read_s(kv_bytes)
