"""The two waiting queues of a vLLM engine. Requests that left by abort are skipped when they come up.

Source: vLLM `v1/core/sched/request_queue.py`. Cost: O(1) and O(log n).
"""

from __future__ import annotations

from collections import deque
from heapq import heappop, heappush

from verl_heddle.simulate.workload import Request


class Fcfs:
    """First come, first served; a request that lost its slot returns to the front."""

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
    """Lowest (aged priority, arrival) first; a request that lost its slot keeps its arrival time."""

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
        """A waiting request gets another priority."""
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
