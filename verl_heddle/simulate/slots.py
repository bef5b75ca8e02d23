"""The requests of one replica: its waiting queue, its slots, their prefill and decoding, and preemption.

Accounting only; `engine.py` decides when steps happen and what they cost. Steps are numbered per replica: a request that decodes from step
s on with L tokens left ends with step s + L, whatever the steps cost. This makes an event O(log n).
Queues: `Fcfs` and `ByPriority` are vLLM's two. An aborted request stays in its queue and is skipped when it reaches the front.
Preemption on arrival is the plugin's own law, `schedule.preempt`, called with the state of this engine just as the plugin's scheduler calls
it with vLLM's.
Invariants: running <= slots; `decoding` and `context_sum` cover exactly the running requests whose prefill is complete.
Cost: O(1) per `Fcfs` operation, O(log n) per `ByPriority` operation.
Source: vLLM `v1/core/sched/scheduler.py` (0.24, 0.27: admission, chunked prefill, preemption with recomputation) and
`v1/core/sched/request_queue.py`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from heapq import heappop, heappush
from math import inf

from verl_heddle.fleet import Replica
from verl_heddle.schedule.preempt import Room, Running, Waiting, preemptions, worst_first
from verl_heddle.simulate.cache import PrefixCache
from verl_heddle.simulate.options import EngineOptions, HostTier
from verl_heddle.simulate.policy import Latency
from verl_heddle.simulate.workload import Request


class Fcfs:
    """First come, first served; a preempted request returns to the front."""

    __slots__ = ("_queue", "count")

    def __init__(self) -> None:
        self._queue: deque[Request] = deque()
        self.count = 0
        """Requests waiting."""

    def push(self, request: Request) -> None:
        """A new request."""
        request.waiting = True
        self.count += 1
        self._queue.append(request)

    def put_back(self, request: Request) -> None:
        """A request that lost its slot."""
        request.waiting = True
        self.count += 1
        self._queue.appendleft(request)

    def peek(self) -> Request:
        """The next one to run. Call only with `count` > 0."""
        while not self._queue[0].waiting:
            self._queue.popleft()
        return self._queue[0]

    def pop(self) -> Request:
        """Take `peek()` out."""
        request = self.peek()
        self._queue.popleft()
        request.waiting = False
        self.count -= 1
        return request

    def discard(self, request: Request) -> None:
        """Take out one that is waiting somewhere in the queue."""
        request.waiting = False
        self.count -= 1


class ByPriority:
    """Lowest (aged priority, arrival) first; a preempted request keeps its arrival time."""

    __slots__ = ("_heap", "count")

    def __init__(self) -> None:
        self._heap: list[tuple[float, float, int, Request]] = []
        self.count = 0
        """Requests waiting."""

    def push(self, request: Request) -> None:
        """A new request."""
        request.waiting = True
        self.count += 1
        heappush(self._heap, (request.rank, request.arrival_s, request.order, request))

    put_back = push

    def change(self, request: Request, priority: int) -> None:
        """Change the priority of a waiting request."""
        request.rank += priority - request.priority
        request.priority = priority
        heappush(self._heap, (request.rank, request.arrival_s, request.order, request))

    def peek(self) -> Request:
        """The next one to run. Call only with `count` > 0."""
        while not (first := self._heap[0])[3].waiting or first[0] != first[3].rank:
            heappop(self._heap)
        return self._heap[0][3]

    def pop(self) -> Request:
        """Take `peek()` out."""
        request = self.peek()
        heappop(self._heap)
        request.waiting = False
        self.count -= 1
        return request

    def discard(self, request: Request) -> None:
        """Take out one that is waiting somewhere in the queue."""
        request.waiting = False
        self.count -= 1


Queue = Fcfs | ByPriority


UNLIMITED = 2**60
"""Free blocks if the KV cache has no limit."""


class Slots:
    """The requests of one replica. `at_s` is the time of the step boundary that the state refers to."""

    def __init__(self, replica: Replica, latency: Latency, options: EngineOptions) -> None:
        self.replica = replica
        self.options = options
        room, self._read_s = _tier(options.tier, replica, latency)
        self.cache = PrefixCache(replica.kv_tokens, options.block_tokens, options.prefix_cache, room)
        self.queue: Queue = Fcfs() if options.order == "fcfs" else ByPriority()
        self.running: dict[Request, None] = {}
        """In order of admission."""
        self.backlog: deque[Request] = deque()
        """Running requests whose prefill is not complete, in order of admission."""
        self.step = 0
        self.decoding = 0
        """Requests that get a token in each step."""
        self.context_sum = 0
        """Sum of their context lengths, in tokens."""
        self.at_s = 0.0
        self.preemptions = self.prefilled = self.recomputed = self.restored = 0
        self._prefill_s = latency.prefill_s
        self._tickets = 0
        self._ends: list[tuple[int, int, Request]] = []
        """Heap of (last step, ticket, request); an entry is stale if the ticket is not the request's."""
        self._worst: list[tuple[float, float, int, Request]] = []
        """Heap of (-aged priority, -arrival, ticket, request); filled only with preemption on arrival."""

    def first_end(self) -> int:
        """The step with which the next request ends. Call only with `decoding` > 0."""
        ends = self._ends
        while ends[0][2].ticket != ends[0][1]:
            heappop(ends)
        return ends[0][0]

    def advance(self, steps: int) -> None:
        """Generate `steps` tokens for every decoding request."""
        grown = steps * self.decoding
        self.step += steps
        self.context_sum += grown
        self.cache.in_use += grown

    def done(self) -> list[Request]:
        """Remove and return the requests that have their last token."""
        leaving: list[Request] = []
        ends, step = self._ends, self.step
        while ends and ends[0][0] <= step:
            _, ticket, request = heappop(ends)
            if request.ticket == ticket:
                self.leave(request)
                leaving.append(request)
        return leaving

    def admit(self, request: Request) -> None:
        """Give a request a slot, and set `owed` to the tokens it has to prefill."""
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
        request.since = self.step
        if self.options.preempt is not None:
            heappush(self._worst, (-request.rank, -request.arrival_s, request.ticket, request))

    def join(self, request: Request, waited_s: float) -> None:
        """The request's prefill is complete: it decodes from the next step on, which spends `waited_s` on prefill first."""
        self.decoding += 1
        self.context_sum += request.context
        request.ends = self.step + request.left
        request.prefill_s += self.at_s - request.admitted_s + waited_s
        heappush(self._ends, (request.ends - request.floor, request.ticket, request))

    def leave(self, request: Request) -> None:
        """Take the request out of its slot: update its `context` and `left`, and keep its computed prefix cached."""
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

    def lose_slot(self, request: Request, back: bool = True) -> None:
        """Preempt a running request. With `back` it returns to the queue; otherwise the caller puts it back later."""
        self.leave(request)
        request.preemptions += 1
        self.preemptions += 1
        request.queued_s = self.at_s
        if back:
            self.queue.put_back(request)

    def squeeze(self) -> None:
        """Preempt requests in vLLM's order until the KV cache has room for the next step. A single request always fits (checked on
        arrival)."""
        cache, running = self.cache, self.running
        assert cache.capacity is not None
        while cache.in_use > cache.capacity:
            if self.options.order == "fcfs":
                self.lose_slot(next(reversed(running)))
            else:
                self.lose_slot(max(running, key=lambda r: (r.rank, r.arrival_s, r.order)))

    def may_exchange(self, better: Request) -> bool:
        """Whether some running request is at least the rule's margin worse than `better`, so that `exchange` may find a victim."""
        rule, worst = self.options.preempt, self._worst
        if rule is None:
            return False
        while worst and not (worst[0][3].ticket == worst[0][2] and worst[0][3].rank == -worst[0][0]):
            heappop(worst)
        return bool(worst) and -worst[0][0] - better.rank >= rule.margin

    def exchange(self) -> tuple[list[Request], float]:
        """Preempt running requests for better waiting ones, as `schedule.preempt` decides.

        Returns:
            The victims, which are in no queue: the caller puts them back once the step has begun. Also the number of steps after which to
            call again even without an event: by then, a running request that is still too young to be preempted has run long enough.
        """
        rule, best = self.options.preempt, self.queue.peek()
        if rule is None or not self.may_exchange(best):
            return [], inf
        block, cache, young = self.cache.block, self.cache, inf
        asked: dict[str, Request] = {}
        for request in self.running:
            if request.rank - best.rank < rule.margin or request.yielded >= rule.max_preemptions:
                continue  # not preemptible for the best waiting request, hence for no other
            if (ran := self.step - request.since) < rule.min_steps:
                young = min(young, rule.min_steps - ran)
            else:
                asked[str(request.ticket)] = request
        if not asked:
            return [], young
        free = UNLIMITED if cache.capacity is None else (cache.capacity - cache.in_use - self.decoding) // block
        room = Room(self.replica.slots - len(self.running), free, block, self.options.prefix_cache)
        waiting: list[Request] = []
        plan = preemptions(worst_first(map(self._as_running, asked.values()), rule), self._pop_waiting(waiting), room, rule)
        for request in waiting:
            self.queue.push(request)
        victims = [asked[pair[0].key] for pair in plan.pairs]
        for victim in victims:
            victim.yielded += 1
            self.lose_slot(victim, back=False)
        return victims, young

    def _pop_waiting(self, taken: list[Request]) -> Iterator[Waiting]:
        """Yield the waiting requests in queue order, removing each from the queue and adding it to `taken`."""
        while self.queue.count:
            request = self.queue.pop()
            taken.append(request)
            yield Waiting(str(request.order), request.priority, request.arrival_s, -(-self.cache.need(request) // self.cache.block))

    def _as_running(self, request: Request) -> Running:
        """A running request in the form that `schedule.preempt` takes."""
        context = request.context if request.owed else request.context + request.left - (request.ends - self.step)
        tokens = context - (request.owed or 1)
        ran = self.step - request.since

        def freed() -> int:
            return self.cache.alone(request, context) // self.cache.block

        return Running(str(request.ticket), request.priority, request.arrival_s, ran, request.yielded, tokens, freed)


def _tier(tier: HostTier | None, replica: Replica, latency: Latency) -> tuple[float, float]:
    """Tokens of this replica that the tier holds, and the seconds that reading one back adds to a step; zeros if KV is unlimited.

    Raises:
        ValueError: the latency model does not know the KV bytes of a token.
    """
    if tier is None or replica.kv_tokens is None:
        return 0, 0.0
    kv_bytes = latency.kv_bytes(replica.tp)
    if kv_bytes is None:
        raise ValueError(f"a host tier needs the KV bytes of a token, which the latency model does not know for tp={replica.tp}")
    return tier.tokens(kv_bytes), tier.read_s(kv_bytes)
