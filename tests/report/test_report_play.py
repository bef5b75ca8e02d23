"""One arm on one draw: what heddle has seen, and the numbers."""

from dataclasses import replace

import pytest
from report_cases import lived, trace

from verl_heddle.options import Admission, Options, Priority
from verl_heddle.orchestrator import Orchestrator
from verl_heddle.report.draws import Draw, generated, recorded
from verl_heddle.report.play import CrossFitted, bound, measured, play, teach
from verl_heddle.report.rules import RULES
from verl_heddle.report.setting import setting
from verl_heddle.simulate import PRIORITY, simulate
from verl_heddle.traces import SEARCH
from verl_heddle.trajectory import TrajectoryId, TurnStart

WHERE = setting("qwen3-8b", "h200", 4, slots=8)


class Listener:
    """Records what a policy is asked and told."""

    def __init__(self, inner):
        self.inner, self.asked = inner, []

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def turn_started(self, turn, now):
        decision = self.inner.turn_started(turn, now)
        self.asked.append((turn, decision.predicted_remaining))
        return decision


def test_teaching_equals_an_epoch_simulated():
    """If this fails, the orchestrator has begun to learn from what `teach` does not tell."""
    (draw,) = generated("coding", 4, 4, [0]).draws
    told, lived_through = Orchestrator(Options.longest()), Orchestrator(Options.longest())
    teach(told, draw)
    simulate(draw.before[0], WHERE.fleet(1), WHERE.latency, lived_through, engine=PRIORITY)
    for policy in (told, lived_through):
        policy.predictor.model = None
        policy.replicas_added(WHERE.fleet(1))
    for item in draw.steps[0]:
        turn = TurnStart(TrajectoryId(item.prompt_id, "x", item.trial, 9), f"{item.prompt_id}{item.trial}", 0, 10, 0)
        one, other = (policy.turn_started(turn, 0.0).predicted_remaining for policy in (told, lived_through))
        assert one == pytest.approx(other, rel=0.02)


@pytest.mark.parametrize("name", ["heddle", "heddle_place"])
def test_heddle_knows_the_cap_as_in_the_cluster(name, monkeypatch):
    caps = []

    class Told(Orchestrator):
        def __init__(self, options, cap_tokens=None):
            caps.append(cap_tokens)
            super().__init__(options, cap_tokens=cap_tokens)

    monkeypatch.setattr("verl_heddle.report.play.Orchestrator", Told)
    for parameters in ({}, {"cap_tokens": 3000}):
        play(name, 1, WHERE, generated("search", 2, 2, [0], **parameters).draws[0])
    assert caps == [SEARCH.cap_tokens, 3000]


def test_turns_held_and_reordered_bear_their_true_names_behind_the_halves(tmp_path):
    """The simulator knows a held turn by the name it gave."""
    items = [lived(f"q{i}", s, (50 * (i + 1),) * 3) for i in range(8) for s in range(4)]
    (draw,) = recorded(trace(tmp_path, items), [0]).draws
    halves = {(item.prompt_id, item.trial): item.trial % 2 for item in draw.steps[0]}
    options = Options.longest(admission=Admission(per_slot=1.0), priority=Priority(order="longest", refresh_s=0.001, quantum_tokens=1))
    policy = CrossFitted(Orchestrator(options), halves)
    result = simulate(draw.steps[0], WHERE.fleet(4), WHERE.latency, policy, engine=PRIORITY)
    assert (result.finish_s > 0).all() and len(policy._inner.admission) == 0


def test_a_trace_never_predicts_a_trajectory_from_itself(tmp_path):
    """Even trials are told by odd ones and the other way round: a trial's own length moves the prediction of the other half only."""

    def heard(length: int) -> dict:
        others = [lived(f"q{i}", s, (int(20 * 1.3**i),)) for i in range(30) for s in range(4)]
        (draw,) = recorded(trace(tmp_path, [lived("p", s, (length if s == 0 else 100,)) for s in range(4)] + others), [0]).draws
        listener = Listener(Orchestrator(Options.longest()))
        teach(listener.inner, draw)
        halves = {(item.prompt_id, item.trial): item.trial % 2 for item in draw.steps[0]}
        simulate(draw.steps[0], WHERE.fleet(1), WHERE.latency, CrossFitted(listener, halves), engine=PRIORITY)
        return {turn.trajectory.sample: predicted for turn, predicted in listener.asked if turn.trajectory.prompt.startswith("p|")}

    short, long = heard(100), heard(100_000)
    assert long[0] < 1.2 * short[0] and long[2] < 1.2 * short[2]
    assert long[1] > 2 * short[1] and long[3] > 2 * short[3]


def test_heddle_is_stock_where_nobody_waits():
    """The same tie-breaks, so that a difference between the two is never luck."""
    (draw,) = generated("coding", 4, 4, [3]).draws
    where = replace(WHERE, slots=64)
    (stock,), (heddle,) = play("stock", 1, where, draw), play("heddle", 1, where, draw)
    assert heddle.makespan_s == pytest.approx(stock.makespan_s, rel=1e-3)
    assert [turn for turn in heddle.turns.column("replica")].count(0) == [turn for turn in stock.turns.column("replica")].count(0)


@pytest.mark.parametrize("name", RULES)
def test_numbers_of_every_rule(name):
    (draw,) = generated("search", 4, 4, [0]).draws
    results = play(name, 2, WHERE, draw)
    run = measured(2, WHERE, draw, results)
    assert run == measured(2, WHERE, draw, play(name, 2, WHERE, draw))
    assert sum(run.tail.values()) == pytest.approx(run.makespan_s)
    assert run.makespan_s >= bound(WHERE, draw)[0].makespan_s
    assert run.throughput_tok_s == pytest.approx(sum(item.output_tokens for item in draw.steps[0]) / run.makespan_s)
    assert 0 <= run.idle_share <= 1 and 0 <= run.queue_share <= 1 and run.last.alone_s > 0


def test_several_steps_are_means_and_history_goes_on():
    one, two = (generated("math", 3, 2, [seed]).draws[0].steps[0] for seed in (0, 1))
    results = play("heddle_longest", 1, WHERE, Draw(0, (one, two)))
    run = measured(1, WHERE, Draw(0, (one, two)), results)
    assert run.makespan_s == pytest.approx(sum(result.makespan_s for result in results) / 2)
    assert sum(run.tail.values()) == pytest.approx(run.makespan_s)
    told = results[1].turns.column("predicted_remaining")
    assert (told == told).all()  # the first step has taught it; nan would be no prediction
