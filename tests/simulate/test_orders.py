"""What a policy can order, and what happens to a fleet: early stop, pre-warm, preemption on arrival, outage, reshard."""

import pytest
from simulate_cases import lengths, trajectory

from verl_heddle.fleet import Replica
from verl_heddle.latency.model import LatencyModel
from verl_heddle.schedule.preempt import Rule
from verl_heddle.simulate import Cancel, EngineOptions, FleetChange, Outage, Prewarm, simulate
from verl_heddle.simulate.baselines import RoundRobin, Stock
from verl_heddle.trajectory import Decision, Reason

STEP = LatencyModel.affine(1.0)
PREFILL = LatencyModel.affine(1.0, prefill_per_token_s=0.1)
OPEN = EngineOptions(block_tokens=1, share_prompts=False)


class StopRest(Stock):
    """As soon as one trajectory has ended, cancel the others."""

    def __init__(self, keys):
        super().__init__()
        self.keys = keys

    def trajectory_ended(self, end, now):
        return [Cancel(key) for key in self.keys]


def test_early_stop_running_waiting_and_in_a_tool():
    work = [*lengths(3, 10, 10), trajectory("p3", 0, [(0, 2, 100.0), (0, 1, 0.0)], 1)]
    policy = StopRest(["0:p0_0", "0:p1_0", "0:p2_0", "0:p3_0", "unknown"])
    options = EngineOptions(share_prompts=False)
    result = simulate(work, [Replica("r", slots=3)], STEP, policy, engine=options, arrivals_s=[0.0, 0.0, 1.5, 0.0])
    assert result.outcomes == ("finished", "cancelled", "cancelled", "cancelled")
    # p3 decodes until 2 and is then in its tool; p2 runs from 2 on; at 3 the first ends and all stop there
    assert result.finish_s.tolist() == [3.0, 3.0, 3.0, 3.0]
    assert result.output_tokens.tolist() == [3, 3, 1, 2]
    assert result.tool_s[3] == 1.0
    assert policy.inflight == {"r": 0}


class MoveAfter(RoundRobin):
    """Round-robin that warms the next replica up during the tool."""

    def turn_finished(self, turn, now):
        super().turn_finished(turn, now)
        return [Prewarm(turn.trajectory.key, self._names[self._next % len(self._names)])]


def test_prewarm_hides_the_prefill_of_a_move():
    work = [trajectory("p", 0, [(0, 100, 60.0), (7, 5, 0.0)], 50)]
    fleet = [Replica("a"), Replica("b")]
    cold = simulate(work, fleet, PREFILL, RoundRobin(), engine=OPEN)
    warm = simulate(work, fleet, PREFILL, MoveAfter(), engine=OPEN)
    assert warm.turns.column("cached_tokens").tolist() == [0, 150]
    assert cold.makespan_s - warm.makespan_s == pytest.approx(150 * 0.1)
    assert warm.replicas[1].prefilled_tokens == 150 + 7


def test_prewarm_that_comes_too_late_is_dropped():
    work = [trajectory("p", 0, [(0, 100, 0.5), (7, 5, 0.0)], 50)]
    result = simulate(work, [Replica("a"), Replica("b")], PREFILL, MoveAfter(), engine=EngineOptions(block_tokens=1, batch_tokens=256))
    # the pre-warm takes one step of 0.1 * 149 + 1 s; the turn comes in the middle and starts after it
    assert result.turns.column("cached_tokens").tolist() == [0, 150]
    assert result.queue_s[0] == pytest.approx(14.9 + 1 - 0.5)


class Ranks(Stock):
    def turn_started(self, turn, now):
        return Decision(super().turn_started(turn, now).replica, -turn.trajectory.sample, Reason.STICKY)


def eager(margin: int, most: int = 3) -> Rule:
    """The law without ageing and without a run to pay back first."""
    return Rule(margin=margin, max_preemptions=most, min_steps=0, ageing_per_s=0.0)


def test_preempt_on_arrival():
    work = [trajectory("p", rank, [(0, 20, 0.0)], 1) for rank in (0, 5)]
    fleet, arrivals = [Replica("r", slots=1)], [0.0, 4.5]
    stock = simulate(work, fleet, STEP, Ranks(), engine=EngineOptions("priority"), arrivals_s=arrivals)
    assert stock.finish_s.tolist() == [20.0, 40.0] and stock.preemptions == 0
    margin = simulate(work, fleet, STEP, Ranks(), engine=EngineOptions("priority", preempt=eager(5)), arrivals_s=arrivals)
    assert margin.finish_s.tolist() == [40.0, 25.0] and margin.preemptions == 1
    wide = simulate(work, fleet, STEP, Ranks(), engine=EngineOptions("priority", preempt=eager(6)), arrivals_s=arrivals)
    assert wide.finish_s.tolist() == [20.0, 40.0]


def test_preemptions_on_arrival_are_bounded():
    work = [trajectory("p", rank, [(0, 20, 0.0)], 1) for rank in range(6)]
    options = EngineOptions("priority", preempt=eager(1, 2))
    result = simulate(work, [Replica("r", slots=1)], STEP, Ranks(), engine=options, arrivals_s=[0.0, 1.0, 2.0, 3.0, 4.0, 5.0])
    assert result.turns.column("preemptions").max() <= 2
    assert result.makespan_s == 120.0


@pytest.mark.parametrize(("keep", "computed"), [(True, 50), (False, 50 + 50 + 3)])
def test_outage(keep, computed):
    work = lengths(10, prompt_tokens=50)
    result = simulate(work, [Replica("r")], STEP, Stock(), engine=OPEN, changes=[Outage("r", 2.5, 7.0, keep_cache=keep)])
    assert result.makespan_s == 14.0  # three tokens by 3, then seven from 7 on
    assert result.replicas[0].busy == ((0.0, 3.0), (7.0, 14.0))
    assert result.replicas[0].prefilled_tokens == computed


def test_an_outage_that_never_touches_a_step_costs_nothing():
    result = simulate(lengths(10), [Replica("r")], STEP, Stock(), changes=[Outage("r", 10.5, 20.0), Outage("r", 2.1, 2.2)])
    assert result.makespan_s == 10.0


def test_bad_changes():
    work, fleet = lengths(10), [Replica("r")]
    for changes in (
        [Outage("r", 1.0, 3.0), Outage("r", 2.0, 4.0)],
        [Outage("r", 3.0, 1.0)],
        [FleetChange(-1.0)],
        [FleetChange(1.0, remove=("x",))],
        [FleetChange(1.0, add=(Replica("r"),))],
    ):
        with pytest.raises(ValueError):
            simulate(work, fleet, STEP, Stock(), changes=changes)
    gone = [FleetChange(1.0, remove=("r",), add=(Replica("s"),)), Outage("r", 2.0, 3.0)]
    assert simulate(work, fleet, STEP, Stock(), changes=gone).makespan_s == 10.0


def test_reshard_moves_what_is_left():
    """At 5.5 the tp 1 replica leaves and a tp 4 one, four times as fast, is ready at 8."""
    latency = LatencyModel.affine(1.0, tps=(1, 4), speedup={4: 4.0})
    work = [trajectory("p", 0, [(0, 10, 0.0), (0, 8, 0.0)], 1)]
    change = FleetChange(5.5, remove=("a",), add=(Replica("b", tp=4),), ready_s=8.0)
    policy = Stock()
    result = simulate(work, [Replica("a")], latency, policy, changes=[change])
    assert result.makespan_s == 8.0 + 4 / 4 + 8 / 4  # six tokens by 6
    assert result.output_tokens[0] == 18 and result.migrations == 1
    assert policy.inflight == {"b": 0}


def test_a_policy_is_asked_for_its_held_turns_after_a_trajectory_ends():
    """It lets the second trajectory in only once the first has ended, which no later turn tells."""

    class OneAtATime(Stock):
        def __init__(self):
            super().__init__()
            self.first, self.held, self.free = None, [], False

        def turn_started(self, turn, now):
            self.first = self.first or turn.trajectory.key
            held = turn.trajectory.key != self.first
            self.held += [turn.request] * held
            return Decision(super().turn_started(turn, now).replica, 0, Reason.STICKY, held=held)

        def trajectory_ended(self, end, now):
            self.free = True

        def admitted(self, now):
            let, self.held = (self.held, []) if self.free else ([], self.held)
            return let

    work = [trajectory("p", 0, [(0, 5, 3.0)], 1), trajectory("q", 0, [(0, 5, 0.0)], 1)]
    result = simulate(work, [Replica("r")], STEP, OneAtATime())
    assert result.finish_s.tolist() == [8.0, 13.0] and result.queue_s[1] == 8.0
