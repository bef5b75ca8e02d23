"""One replica: continuous batching, advanced from event to event instead of token by token.

Law. Work goes in steps. In a step every decoding request gets one token, and up to `batch_tokens` tokens in all are computed:
decodes first, then prefill chunks in order of admission. A step lasts

    decode_s(tp, b, mean context) + sum over the step's prefill chunks of their share of [prefill_s(tp, n, c) - prefill_s(tp, 1, c)]

with b the requests that get a token, n the new tokens of a request after c cached ones: prefill serialises with decoding (vLLM's chunked
prefill), and the one pass over the weights is shared. The request whose prefill is complete gets its first token in that same step. A step
without any decode has prefill_s(tp, 1) as its base. Slots are taken and left at step boundaries; a step that has begun takes no newcomer.

Between events nothing changes but that all contexts grow by one token a step, so n steps cost `n * a + slope * n (n - 1) / 2`, exact where
decode_s is linear in the context over those steps (`LEAP` bounds them). Cost: O(log n) per event.
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
"""At most 64 steps plus an eighth of the mean context at once, because latency tables bend along the context, most at its short end:
over such a leap the chord is within 0.8 % of the step by step sum at its worst in all shipped tables (1024 steps: 3.2 %)."""


class Engine(Slots):
    """The cluster calls `finish`, then `begin`, at time `next_s`; `submit`, `abort`, `pause`, `resume`, `drain` at any time up to it."""

    def __init__(self, replica: Replica, latency: Latency, options: EngineOptions, index: int) -> None:
        if options.batch_tokens is not None and options.batch_tokens < replica.slots:
            raise ValueError(
                f"replica {replica.name}: batch_tokens {options.batch_tokens} is below its {replica.slots} slots; vLLM refuses that"
            )
        super().__init__(replica, latency, options)
        self.index = index
        self.closed = False
        self.paused = False
        self.awake = False
        """Between `finish` and `begin`."""
        self.next_s = inf
        """Time of the next step boundary to deal with; inf: nothing to do."""
        self.ahead = 0
        """Steps from `at_s` to `next_s`."""
        self.busy: list[tuple[float, float]] = []
        """Intervals with work, seconds."""
        self._busy_since: float | None = None
        self._doomed: list[Request] = []
        self._forgets = False
        self._decode_s = latency.decode_s
        self._budget = inf if options.batch_tokens is None else options.batch_tokens
        self._a = self._slope = self._extra = 0.0

    def submit(self, request: Request, now: float) -> None:
        """A request arrives."""
        request.queued_s = now
        self.queue.push(request)
        if self.awake or self.paused:
            return
        if self.next_s == inf:
            self.next_s, self.ahead = now, 0
        elif self.ahead > 1:
            # With a slot free and another at its head, the queue waits for KV, and all behind the head wait for it.
            starts = len(self.running) < self.replica.slots and self.queue.peek() is request
            if starts or self.may_exchange(request):
                self._stop_at(now)

    def reprioritise(self, request: Request, priority: int, now: float) -> None:
        """A waiting or running request gets another priority; without priority order that changes nothing."""
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
        """Throw a request out. True: it is gone; False: it is in the middle of a step and comes out of `finish` at the end of it."""
        if request.waiting:
            self.queue.discard(request)
            request.queue_s += now - request.queued_s
            return True
        if request.ticket < 0:  # it comes out of this very `finish`
            return False
        if self.awake or self.next_s == inf:
            self.at_s = now
            self.leave(request)
            return True
        self._doomed.append(request)
        self._stop_at(now)
        return False

    def limit(self, request: Request, floor: int, now: float) -> bool:
        """Let the request go when only `floor` tokens are left. True: it is past that, throw it out."""
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
        """Compute nothing from the next step boundary on."""
        self.paused = True
        self._forgets = not keep_cache
        if self.next_s == inf:
            self.next_s, self.ahead = now, 0
        else:
            self._stop_at(now)

    def resume(self, now: float) -> None:
        """Compute again."""
        self.paused = False
        if self.next_s == inf:
            self.next_s, self.ahead = now, 0

    def drain(self, now: float) -> list[Request]:
        """Close for good; returns the waiting requests, the running ones come out of `finish` at the end of their step."""
        self.closed = True
        left = [self.queue.pop() for _ in range(self.queue.count)]
        for request in left:
            request.queue_s += now - request.queued_s
        self._doomed.extend(self.running)
        if self.next_s == inf:
            self.next_s, self.ahead = now, 0
        else:
            self._stop_at(now)
        return left

    def finish(self) -> list[Request]:
        """Arrive at `next_s`; returns the requests that leave there: with their last token (`left` is 0), or thrown out."""
        self.at_s, self.next_s = self.next_s, inf
        if self.ahead:
            self.advance(self.ahead)
            self.ahead = 0
        self.awake = True
        leaving = self.done()
        for request in self._doomed:
            if request.ticket >= 0:
                self.leave(request)
                leaving.append(request)
        self._doomed.clear()
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
        self._extra = 0.0
        for request in self.backlog:
            if budget <= 0:
                break
            budget -= self._chunk(request, budget)
        starved = False
        if queue.count and not squeezed:  # vLLM admits nobody in a step that threw somebody out for want of KV
            while queue.count and len(running) < self.replica.slots:
                if budget <= 0:
                    starved = True
                    break
                request = queue.peek()
                if capacity is not None and cache.in_use + cache.need(request) > capacity:
                    break
                self.admit(queue.pop())
                budget -= self._chunk(request, budget)
        for victim in victims:  # as in the plugin's scheduler: nobody comes back in the step that threw him out
            queue.put_back(victim)
        backlog = self.backlog
        while backlog and not backlog[0].owed:
            self.join(backlog.popleft(), self._extra)
        if running:
            self._plan(1 if backlog or squeezed or starved or victims else again)
            if self._busy_since is None:
                self._busy_since = self.at_s
        else:
            self._rest()

    def _plan(self, most: float) -> None:
        """Choose how many steps to take at once, `most` at most, and what they cost."""
        batch, tp = self.decoding, self.replica.tp
        self._slope = 0.0
        steps = 1
        if not batch:
            self._a = self._prefill_s(tp, 1)
        else:
            mean = self.context_sum / batch
            self._a = self._decode_s(tp, batch, mean)
            if most > 1:
                steps = int(min(most, self.first_end() - self.step, LEAP + int(mean) // LEAP_SHARE))
                capacity = self.cache.capacity
                if capacity is not None:
                    steps = min(steps, (capacity - self.cache.in_use) // batch + 1)
                if steps > 1:
                    self._slope = (self._decode_s(tp, batch, mean + (steps - 1)) - self._a) / (steps - 1)
        self.ahead = steps
        self.next_s = self._boundary(steps)

    def _boundary(self, steps: int) -> float:
        """Time after `steps` more steps."""
        return self.at_s + (self._extra + steps * self._a + self._slope * (0.5 * steps * (steps - 1)))

    def _stop_at(self, now: float) -> None:
        """Make the first step boundary at or after `now` the next one to deal with."""
        if self.ahead <= 1:
            return
        goal = now - self.at_s - self._extra
        steps = 1
        if goal > self._a > 0:  # the root of the quadratic, then the exact integer by trying
            half = self._a - 0.5 * self._slope
            root = half + sqrt(max(0.0, half * half + 2.0 * self._slope * goal))
            steps = max(1, min(self.ahead, int(2.0 * goal / root))) if root > 0 else 1
        while steps < self.ahead and self._boundary(steps) < now:
            steps += 1
        if steps < self.ahead:
            self.ahead = steps
            self.next_s = self._boundary(steps)

    def _chunk(self, request: Request, budget: float) -> int:
        """Prefill what the step's budget allows; returns the tokens it took."""
        take = request.owed if request.owed <= budget else int(budget)
        request.owed -= take
        self._extra += take * request.rate
        return take

    def _freeze(self) -> None:
        """Stop computing; without the cache, running requests start over later."""
        if self._forgets:
            for request in reversed(list(self.running)):  # so that the queue's front keeps their order
                self.lose_slot(request)
            self.cache.clear()
        self._rest()

    def _rest(self) -> None:
        if self._busy_since is not None:
            self.busy.append((self._busy_since, self.at_s))
            self._busy_since = None
