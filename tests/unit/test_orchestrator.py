"""The orchestrator as a state machine: random lives of random trajectories."""

from hypothesis import given, settings
from hypothesis import strategies as st

from verl_heddle.fleet import Replica
from verl_heddle.options import Admission, Options, Priority
from verl_heddle.orchestrator import Orchestrator
from verl_heddle.trajectory import Outcome, TrajectoryEnd, TrajectoryId, TurnEnd, TurnStart

LIVES = st.lists(st.lists(st.integers(1, 500), min_size=1, max_size=6), min_size=1, max_size=12)


def identity(sample: int, prompt: str = "p") -> TrajectoryId:
    return TrajectoryId(prompt, "u", sample, step=1)


def live(orchestrator: Orchestrator, lives: list[list[int]], order) -> list:
    """Interleave the turns of all lives in the order given; returns the decisions."""
    decisions, open_turns, todo = [], {}, {i: list(turns) for i, turns in enumerate(lives)}
    generated = dict.fromkeys(todo, 0)
    clock = 0.0
    while todo or open_turns:
        clock += 1
        who = sorted(set(todo) | set(open_turns))
        i = who[next(order) % len(who)]
        if i in open_turns:
            decision, turn, tokens = open_turns.pop(i)
            orchestrator.turn_finished(TurnEnd(identity(i), f"c{i}", decision.replica, turn, tokens), clock)
            generated[i] += tokens
            if not todo.get(i):
                todo.pop(i, None)
                orchestrator.trajectory_ended(TrajectoryEnd(identity(i), Outcome.FINISHED, generated[i], turn + 1), clock)
        else:
            tokens = todo[i].pop(0)
            turn = len(lives[i]) - len(todo[i]) - 1
            decision = orchestrator.turn_started(TurnStart(identity(i), f"c{i}", turn, 100, generated[i]), clock)
            decisions.append(decision)
            open_turns[i] = (decision, turn, tokens)
    return decisions


def build(options: Options) -> Orchestrator:
    orchestrator = Orchestrator(options)
    orchestrator.replicas_added(Replica(f"r{i}") for i in range(3))
    return orchestrator


@settings(max_examples=60)
@given(LIVES, st.integers(0, 10_000))
def test_inflight_returns_to_zero_and_same_events_give_same_decisions(lives, seed):
    from itertools import count

    def order():
        return (seed * 7919 + k * k for k in count())

    first, second = build(Options()), build(Options())
    assert live(first, lives, order()) == live(second, lives, order())
    assert set(first.inflight.values()) == {0}
    assert sum(first.counts.values()) == sum(len(turns) for turns in lives)


@given(LIVES)
def test_observing_or_without_priority_nothing_is_urgent(lives):
    from itertools import count

    for options in (Options(observe=True), Options(priority=Priority(enable=False))):
        assert {d.priority for d in live(build(options), lives, count())} == {0}


def test_longer_prompts_run_first_once_history_exists():
    orchestrator = build(Options())
    for prompt, tokens in (("short", 100), ("long", 5000)):
        who = TrajectoryId(prompt, "u", 0, 1)
        orchestrator.trajectory_ended(TrajectoryEnd(who, Outcome.FINISHED, tokens, 1), 0.0)

    def priority(prompt: str, generated: int) -> int:
        who = TrajectoryId(prompt, f"{prompt} {generated}", 0, 2)
        return orchestrator.turn_started(TurnStart(who, "c" + prompt, 1 if generated else 0, 10, generated), 1.0).priority

    assert priority("long", 0) < priority("short", 0) < 0
    assert priority("short", 9000) < priority("long", 0), "what a trajectory has shown counts"


def test_cancelled_failed_and_validation_lives_teach_nothing():
    orchestrator = build(Options())
    for outcome, validate in ((Outcome.CANCELLED, False), (Outcome.FAILED, False), (Outcome.FINISHED, True)):
        who = TrajectoryId("p", "u", 0, 1, validate)
        orchestrator.trajectory_ended(TrajectoryEnd(who, outcome, 900, 3), 0.0)
    decision = orchestrator.turn_started(TurnStart(identity(1), "c", 0, 10, 0), 1.0)
    fresh = build(Options()).turn_started(TurnStart(identity(1), "c", 0, 10, 0), 1.0)
    assert decision.predicted_remaining == fresh.predicted_remaining


def test_turns_beyond_the_bound_wait_and_the_most_urgent_goes_first():
    orchestrator = Orchestrator(Options(admission=Admission(per_slot=1.0, hold_s=100.0)))
    orchestrator.replicas_added([Replica("r", slots=2)])
    for prompt, tokens in (("short", 100), ("long", 5000)):
        orchestrator.trajectory_ended(TrajectoryEnd(TrajectoryId(prompt, "u", 0, 1), Outcome.FINISHED, tokens, 1), 0.0)

    def ask(name: str, prompt: str, now: float):
        return orchestrator.turn_started(TurnStart(TrajectoryId(prompt, "v" + prompt, name, 2), name, 0, 10, 0), now)

    def end(name: str, prompt: str, now: float, completed: bool = True):
        orchestrator.turn_finished(TurnEnd(TrajectoryId(prompt, "v" + prompt, name, 2), name, "r", 0, 10, completed), now)

    assert [ask(name, "short", 1.0).held for name in "abcd"] == [False, False, True, True]
    assert ask("e", "long", 2.0).held and orchestrator.admitted(2.0) == []
    end("a", "short", 3.0)
    assert orchestrator.admitted(3.0) == ["vlong_e:0"]
    end("c", "short", 4.0, completed=False)
    assert orchestrator.admitted(4.0) == [], "a held turn that gives up frees no place"
    assert orchestrator.admitted(102.9) == [], "a turn completed there 99.9 s ago"
    assert orchestrator.admitted(103.0) == ["vshort_d:0"], "its replica is silent"
    for name, prompt in (("b", "short"), ("d", "short"), ("e", "long")):
        end(name, prompt, 104.0)
    assert set(orchestrator.inflight.values()) == {0} and len(orchestrator.admission) == 0


def test_siblings_that_end_change_the_priority_of_turns_under_way():
    orchestrator = build(Options())
    first = orchestrator.turn_started(TurnStart(identity(0), "c0", 0, 10, 0), 0.0)
    assert orchestrator.reprioritised(0.0) == {} == orchestrator.reprioritised(0.5)
    for sample in range(1, 9):
        who = identity(sample)
        turn = orchestrator.turn_started(TurnStart(who, f"c{sample}", 0, 10, 0), 1.0)
        orchestrator.turn_finished(TurnEnd(who, f"c{sample}", turn.replica, 0, 20_000), 1.5)
        orchestrator.trajectory_ended(TrajectoryEnd(who, Outcome.FINISHED, 20_000, 1), 1.5)
    table = orchestrator.reprioritised(2.0)
    assert list(table) == [first.replica] and table[first.replica]["u_0:0"] < first.priority - 100
    assert orchestrator.reprioritised(4.0) == {}, "told once"


def test_by_first_turn_the_order_is_constant_and_nothing_is_predicted():
    orchestrator = build(Options(priority=Priority(order="first_turn")))
    assert orchestrator.predictor is None

    def ask(sample: int, number: int) -> int:
        turn = TurnStart(identity(sample), f"c{sample}", number, 10, number * 10, tool_s=1e6 * sample)
        decision = orchestrator.turn_started(turn, 0.0)
        orchestrator.turn_finished(TurnEnd(turn.trajectory, turn.conversation, decision.replica, number, 10), 1.0)
        return decision.priority

    assert [ask(sample, 0) for sample in (7, 3, 5)] == [0, 1, 2]
    assert [ask(sample, number) for number in (1, 2) for sample in (3, 5, 7)] == [1, 2, 0] * 2
    assert orchestrator.turn_started(TurnStart(TrajectoryId("", "other", 0, -1), "other", 0, 10, 0), 0.0).priority == 0
    for sample in (7, 3, 5):
        orchestrator.trajectory_ended(TrajectoryEnd(identity(sample), Outcome.FINISHED, 30, 3), 2.0)
    assert ask(3, 0) == 0, "numbered from 0 again"
