"""The resident set as a policy of its own, for the simulator's tables."""
from __future__ import annotations
from collections.abc import Iterable
from verl_heddle.fleet import Replica
from verl_heddle.schedule.residents import Order, Residents, least_served
from verl_heddle.simulate.policy import Latency
from verl_heddle.trajectory import Decision, Reason, TrajectoryEnd, TurnEnd, TurnStart

class Resident:
    def __init__(self, latency: Latency, order: Order = least_served, hold: float = 1.0, evict_first=True, predictor=None, late=True):
        self.residents = Residents(order)
        self._latency, self._hold = latency, hold
        self.predictor = predictor
        self.first = 0
        self.num = {}
        if not evict_first:
            self.released = None
    def replicas_added(self, replicas: Iterable[Replica]) -> None:
        for r in replicas:
            n = 8192
            rate = n / self._latency.prefill_s(r.tp, n, 0)
            hold = (r.kv_tokens or 0) / rate * self._hold if r.kv_tokens else float('inf')
            self.residents.add(r, hold)
    def replicas_removed(self, names):
        for n in names: self.residents.remove(n)
    def turn_started(self, turn: TurnStart, now: float) -> Decision:
        if self.predictor is not None: self.predictor.turn_started(turn)
        where = self.residents.turn_started(turn, now)
        pr = self.residents._live[turn.trajectory.key].number
        if where is None:
            return Decision("", pr, Reason.LEAST_INFLIGHT, held=True)
        return Decision(where, pr, Reason.STICKY)
    def turn_finished(self, turn: TurnEnd, now: float):
        if self.predictor is not None: self.predictor.turn_finished(turn)
        self.residents.turn_finished(turn, now)
    def trajectory_ended(self, end: TrajectoryEnd, now: float):
        self.residents.trajectory_ended(end, now)
        if self.predictor is not None: self.predictor.trajectory_ended(end)
    def admitted(self, now): return self.residents.admitted()
    def released(self, now): return self.residents.released()
    def tick(self, now): self.residents.tick(now)
    def due_s(self, now): return self.residents.due_s()
