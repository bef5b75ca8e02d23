"""One replica with continuous batching, advanced from event to event instead of token by token.

Law. The engine works in steps. A step gives every decoding request one token and computes up to `batch_tokens` tokens in total:
decodes first, then prefill chunks in order of admission. A step lasts

    decode_s(tp, b, mean context) + sum over the step's prefill chunks of their share of [prefill_s(tp, n, c) - prefill_s(tp, 1, c)]

with b the requests that get a token, and n the new tokens of a request after c cached ones: prefill serialises with decoding (vLLM's
chunked prefill), and both share one pass over the weights. A request whose prefill completes in a step gets its first token in that step.
A step without any decode has prefill_s(tp, 1) as its base. Requests take and leave slots at step boundaries only.

Between events, all contexts grow by one token per step and nothing else changes. So n steps cost `n * first + slope * n (n - 1) / 2`, which
is exact if decode_s is linear in the context over those steps (`LEAP` limits n). Cost: O(log n) per event.
Invariants: running <= slots; tokens whose KV is stored <= kv_tokens; every request submitted leaves exactly once.
"""

from __future__ import annotations

from heapq import heappush
from math import inf, sqrt

from verl_heddle.fleet import Replica
from verl_heddle.simulate.options import EngineOptions
from verl_heddle.simulate.policy import Latency
from verl_heddle.simulate.slots import Fcfs, Slots
from verl_heddle.simulate.workload import Request

LEAP, LEAP_SHARE = 64, 8
"""A leap is at most 64 steps plus an eighth of the mean context. Latency tables are nonlinear in the context, most of all at short
contexts: over such a leap the chord is within 0.8 % of the step-by-step sum in the worst case of all shipped tables (1024 steps: 3.2 %)."""


class Engine(Slots):
    """The cluster calls `finish`, then `begin`, at time `next_s`, and the other methods at any time up to it."""

    def __init__(self, replica: Replica, latency: Latency, options: EngineOptions, index: int) -> None:
        if options.batch_tokens is not None and options.batch_tokens < replica.slots:
            raise ValueError(
                f"replica {replica.name}: batch_tokens {options.batch_tokens} is below its {replica.slots} slots, which vLLM rejects"
            )
        super().__init__(replica, latency, options)
        self.index = index
        self.closed = False
        self.paused = False
        self.awake = False
        """True between `finish` and `begin`."""
        self.next_s = inf
        """Time of the next step boundary to process; inf if the engine is idle."""
        self.ahead = 0
        """Steps from `at_s` to `next_s`."""
        self.busy: list[tuple[float, float]] = []
        """Intervals with work, seconds."""
        self._busy_since: float | None = None
        self._aborting: list[Request] = []
        self._drop_cache = False
        self._decode_s = latency.decode_s
        self._budget = inf if options.batch_tokens is None else options.batch_tokens
        self._first_s = self._slope_s = self._extra_s = 0.0

    def submit(self, request: Request, now: float) -> None:
        """Queue a request; if it can start at once, the current leap ends at the next step boundary."""
        request.queued_s = now
        self.queue.push(request)
        if self.awake or self.paused:
            return
        if self.next_s == inf:
            self.next_s, self.ahead = now, 0
        elif self.ahead > 1:
            # If a slot is free but a different request is at the head, the queue waits for KV, and this request waits behind the head.
            starts = len(self.running) < self.replica.slots and self.queue.peek() is request
            if starts or self.may_exchange(request):
                self._stop_at(now)

    def reprioritise(self, request: Request, priority: int, now: float) -> None:
        """Change the priority of a waiting or running request; no effect unless the order is `priority`."""
        if isinstance(self.queue, Fcfs):
            return
        if request.waiting:
            self.queue.change(request, priority)
        else:
            request.rank += priority - request.priority
            request.priority = priority
            if request.ticket >= 0 and self.options.preempt is not None:
                heappush(self._worst, (-request.rank, -request.arrival_s, request.ticket, request))
        if self.queue.count and self.ahead > 1 and self.may_exchange(self.queue.peek()):
            self._stop_at(now)

    def abort(self, request: Request, now: float) -> bool:
        """Abort a request. True: it is gone. False: it is in the middle of a step, and `finish` returns it at the end of that step."""
        if request.waiting:
            self.queue.discard(request)
            request.queue_s += now - request.queued_s
            return True
        if request.ticket < 0:  # the current `finish` has already returned it
            return False
        if self.awake or self.next_s == inf:
            self.at_s = now
            self.leave(request)
            return True
        self._aborting.append(request)
        self._stop_at(now)
        return False

    def limit(self, request: Request, floor: int, now: float) -> bool:
        """Stop the request once only `floor` tokens are left. True: it has already passed that point, and the caller aborts it."""
        if floor <= request.floor:
            return False
        request.floor = floor
        if request.ticket < 0 or request.owed:
            return request.left <= floor
        if request.ends - floor <= self.step:
            return True
        heappush(self._ends, (request.ends - floor, request.ticket, request))
        if not self.awake and self.next_s != inf:
            self._stop_at(now)
        return False

    def pause(self, now: float, keep_cache: bool) -> None:
        """Stop computing at the next step boundary; without `keep_cache`, also drop the cache and preempt every running request there."""
        self.paused = True
        self._drop_cache = not keep_cache
        if self.next_s == inf:
            self.next_s, self.ahead = now, 0
        else:
            self._stop_at(now)

    def resume(self, now: float) -> None:
        """Start computing again."""
        self.paused = False
        if self.next_s == inf:
            self.next_s, self.ahead = now, 0

    def drain(self, now: float) -> list[Request]:
        """Close the engine for good. Returns the waiting requests; `finish` returns the running ones at the end of their step."""
        self.closed = True
        left = [self.queue.pop() for _ in range(self.queue.count)]
        for request in left:
            request.queue_s += now - request.queued_s
        self._aborting.extend(self.running)
        if self.next_s == inf:
            self.next_s, self.ahead = now, 0
        else:
            self._stop_at(now)
        return left

    def finish(self) -> list[Request]:
        """Advance to `next_s`; returns the requests that leave there, finished (`left` is 0) or aborted."""
        self.at_s, self.next_s = self.next_s, inf
        if self.ahead:
            self.advance(self.ahead)
            self.ahead = 0
        self.awake = True
        leaving = self.done()
        for request in self._aborting:
            if request.ticket >= 0:
                self.leave(request)
                leaving.append(request)
        self._aborting.clear()
        return leaving

    def begin(self) -> None:
        """Fill the slots and start the next steps; sets `next_s`."""
        self.awake = False
        if self.paused:
            self._freeze()
            return
        cache, queue, running = self.cache, self.queue, self.running
        capacity = cache.capacity
        squeezed = capacity is not None and cache.in_use > capacity
        if squeezed:
            self.squeeze()
        if capacity is not None and cache.in_use + cache.held > capacity:
            cache.evict()
        victims, again = self.exchange() if queue.count and not squeezed else ([], inf)
        budget = self._budget - self.decoding
        self._extra_s = 0.0
        for request in self.backlog:
            if budget <= 0:
                break
            budget -= self._prefill_chunk(request, budget)
        starved = False
        if queue.count and not squeezed:  # vLLM admits no request in a step that preempted one for lack of KV
            while queue.count and len(running) < self.replica.slots:
                if budget <= 0:
                    starved = True
                    break
                request = queue.peek()
                if capacity is not None and cache.in_use + cache.need(request) > capacity:
                    break
                self.admit(queue.pop())
                budget -= self._prefill_chunk(request, budget)
        for victim in victims:  # as in the plugin's scheduler: a request cannot be readmitted in the step that preempted it
            queue.put_back(victim)
        backlog = self.backlog
        while backlog and not backlog[0].owed:
            self.join(backlog.popleft(), self._extra_s)
        if running:
            self._plan(1 if backlog or squeezed or starved or victims else again)
            if self._busy_since is None:
                self._busy_since = self.at_s
        else:
            self._go_idle()

    def _plan(self, most: float) -> None:
        """Choose how many steps to take at once, at most `most`, and compute their cost."""
        batch, tp = self.decoding, self.replica.tp
        self._slope_s = 0.0
        steps = 1
        if not batch:
            self._first_s = self._prefill_s(tp, 1)
        else:
            mean = self.context_sum / batch
            self._first_s = self._decode_s(tp, batch, mean)
            if most > 1:
                steps = int(min(most, self.first_end() - self.step, LEAP + int(mean) // LEAP_SHARE))
                capacity = self.cache.capacity
                if capacity is not None:
                    steps = min(steps, (capacity - self.cache.in_use) // batch + 1)
                if steps > 1:
                    self._slope_s = (self._decode_s(tp, batch, mean + (steps - 1)) - self._first_s) / (steps - 1)
        self.ahead = steps
        self.next_s = self._boundary(steps)

    def _boundary(self, steps: int) -> float:
        """Time after `steps` more steps."""
        return self.at_s + (self._extra_s + steps * self._first_s + self._slope_s * (0.5 * steps * (steps - 1)))

    def _stop_at(self, now: float) -> None:
        """Shorten the current leap to the first step boundary at or after `now`."""
        if self.ahead <= 1:
            return
        goal = now - self.at_s - self._extra_s
        steps = 1
        if goal > self._first_s > 0:  # solve the quadratic, then search for the exact integer
            half = self._first_s - 0.5 * self._slope_s
            root = half + sqrt(max(0.0, half * half + 2.0 * self._slope_s * goal))
            steps = max(1, min(self.ahead, int(2.0 * goal / root))) if root > 0 else 1
        while steps < self.ahead and self._boundary(steps) < now:
            steps += 1
        if steps < self.ahead:
            self.ahead = steps
            self.next_s = self._boundary(steps)

    def _prefill_chunk(self, request: Request, budget: float) -> int:
        """Prefill as many tokens of the request as the step's budget allows; returns their number."""
        take = request.owed if request.owed <= budget else int(budget)
        request.owed -= take
        self._extra_s += take * request.rate
        return take

    def _freeze(self) -> None:
        """Enter a pause; if the cache is to be dropped, preempt all running requests."""
        if self._drop_cache:
            for request in reversed(list(self.running)):  # reversed: each returns to the queue's front
                self.lose_slot(request)
            self.cache.clear()
        self._go_idle()

    def _go_idle(self) -> None:
        if self._busy_since is not None:
            self.busy.append((self._busy_since, self.at_s))
            self._busy_since = None
