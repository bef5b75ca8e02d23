"""A policy's timer: it runs out once, when it was due last said to, however often it was put forward."""

from __future__ import annotations

from math import inf

from verl_heddle.latency.model import LatencyModel
from verl_heddle.simulate import EngineOptions, make_fleet, simulate
from verl_heddle.simulate.baselines.stock import Stock
from verl_heddle.trajectory import Trajectory, Turn

LATENCY = LatencyModel.affine(0.01, 0.0, prefill_per_token_s=0.0)


class Timed(Stock):
    """Wants to be woken, earlier with every event, and after that not again."""

    def __init__(self) -> None:
        super().__init__(0)
        self.due, self.woken = 50.0, []

    def turn_finished(self, turn, now):
        self.due -= 1.0 if self.due < inf else 0.0
        return super().turn_finished(turn, now)

    def due_s(self, now):
        return self.due

    def tick(self, now):
        self.woken.append((now, self.due))
        self.due = inf if now >= self.due else self.due


def test_a_timer_that_was_put_forward_runs_out_once():
    turns = tuple(Turn(0, 100, "t", 1.0) for _ in range(40))
    work = [Trajectory("test", "w", "p0", 0, 10, turns)]
    policy = Timed()
    result = simulate(work, make_fleet(1, 1, LATENCY, 4), LATENCY, policy, engine=EngineOptions())
    assert result.makespan_s > 60.0, "the timers that were superseded lie within the run"
    [(now, due)] = policy.woken
    assert now == due < 50.0
