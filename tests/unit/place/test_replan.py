"""The planner over event sequences: books that balance, stock where it must be stock, moves that are rare and reasoned."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_heddle.fleet import Replica
from verl_heddle.latency import LatencyModel
from verl_heddle.place.audit import FEWEST, REST, Audit, Trust, Verdict
from verl_heddle.place.books import Books
from verl_heddle.place.decisions import Expected
from verl_heddle.place.first import Batch, place_batch
from verl_heddle.place.outlook import GRID, curves
from verl_heddle.place.pace import Habit
from verl_heddle.place.replan import MOST_MOVES, Replanner
from verl_heddle.place.sticky import StickyLeastInflight
from verl_heddle.predict.quantities import Estimate
from verl_heddle.simulate import EngineOptions, make_fleet, simulate
from verl_heddle.simulate.baselines import Stock
from verl_heddle.simulate.foresight import Foresight
from verl_heddle.simulate.planned import Planned
from verl_heddle.traces import generate
from verl_heddle.trajectory import Outcome, Reason, TrajectoryEnd, TrajectoryId, TurnEnd, TurnStart

LATENCY = LatencyModel.affine(0.01, 0.001, prefill_per_token_s=1e-5, tps=(1, 2), speedup={2: 1.6})


def identity(number: int, prompt: str | None = None) -> TrajectoryId:
    return TrajectoryId(prompt or f"p{number}", prompt or f"u{number}", number, 0)


def left(tokens: float, factor: float = 1.1) -> Estimate:
    return Estimate(tokens, tokens * factor, 3.0, 0.0)


class Play:
    """A planner and its turns, one line an event."""

    def __init__(self, replicas: int = 3, **more) -> None:
        self.planner = Replanner(more.pop("latency", LATENCY), Random(0), **more)
        for number in range(replicas):
            self.planner.add(Replica(f"r{number}"))
        self.where: dict[int, str] = {}
        self.turns: dict[int, int] = {}
        self.done: dict[int, int] = {}

    def start(self, number: int, tokens: float | None = 1000, prompt: str | None = None, context: int = 100):
        name, turn = identity(number, prompt), self.turns.setdefault(number, 0)
        start = TurnStart(name, name.key, turn, context + self.done.setdefault(number, 0), self.done[number])
        self.where[number], reason = self.planner.acquire(start, None if tokens is None else left(tokens))
        return self.where[number], reason

    def finish(self, number: int, output: int = 100, tokens: float | None = 1000, completed: bool = True, prompt: str | None = None):
        name = identity(number, prompt)
        self.done[number] += output
        end = TurnEnd(name, name.key, self.where[number], self.turns[number], output, completed)
        self.turns[number] += 1
        return self.planner.release(end, None if tokens is None else left(tokens))

    def end(self, number: int, prompt: str | None = None, outcome: Outcome = Outcome.FINISHED) -> None:
        self.planner.ended(TrajectoryEnd(identity(number, prompt), outcome, self.done.get(number, 0), self.turns.get(number, 0)))


EVENTS = st.lists(
    st.tuples(st.sampled_from(["turn", "turn", "turn", "end", "add", "remove", "forget", "fail"]), st.integers(0, 9)), max_size=70
)


@given(EVENTS, st.lists(st.one_of(st.none(), st.floats(0.1, 1e6)), min_size=1, max_size=9))
@settings(max_examples=100, deadline=None)
def test_any_sequence_leaves_balanced_books(events, tokens):
    play, fleet, inside = Play(2), {"r0", "r1"}, set()
    books = play.planner._books
    for index, (kind, number) in enumerate(events):
        said = tokens[index % len(tokens)]
        name = f"r{number % 4}"
        if kind in ("turn", "fail") and fleet:
            if number not in inside:
                where, reason = play.start(number, said)
                inside.add(number)
                assert where in fleet and reason not in (Reason.HASHED, Reason.FALLBACK_POLICY)
            else:
                move = play.finish(number, tokens=said, completed=kind == "turn")
                inside.discard(number)
                assert move is None or (move.replica in fleet and move.gain_s >= 0.5 * move.cost_s >= 0)
        elif kind == "end" and number not in inside:
            play.end(number)
        elif kind == "add" and name not in fleet:
            play.planner.add(Replica(name))
            fleet.add(name)
        elif kind == "remove" and len(fleet) > 1 and name in fleet:
            play.planner.remove(name)
            fleet.discard(name)
        elif kind == "forget":
            play.planner.forget()
        sums = np.zeros((len(books.names), 2, len(GRID)))
        for one in books.residents.values():
            sums[books.index(one.replica)] += one.rows
        assert np.allclose(sums, books._sums, atol=1e-6)
        assert set(play.planner.inflight) == fleet and min(play.planner.inflight.values()) >= 0
    for number in sorted(inside):
        play.finish(number)
    for number in list(play.done):
        play.end(number)
    assert set(play.planner.inflight.values()) == {0}
    assert not books.residents and not books._sums.any() and not play.planner._live


@pytest.mark.parametrize("more", [{"latency": None}, {"deterministic": True}])
def test_without_times_or_with_determinism_the_choices_are_verls(more):
    play = Play(3, **more)
    stock = StickyLeastInflight(Random(0), more.get("deterministic", False))
    for number in range(3):
        stock.add(f"r{number}")
    rng, inside = Random(5), set()
    for _ in range(200):
        number = rng.randrange(12)
        if number in inside:
            stock.release(play.where[number])
            assert play.finish(number) is None
            inside.discard(number)
        else:
            assert play.start(number, 10.0 ** rng.randrange(5)) == stock.acquire(identity(number).key)
            inside.add(number)
        assert play.planner.inflight == stock.inflight


def test_when_times_are_not_known_any_more_verls_rule_decides_at_once_and_until_they_are():
    play = Play(2)
    play.start(0)
    play.planner.learn(None)
    assert not play.planner.plans and play.start(1)[1] is Reason.LEAST_INFLIGHT
    for number in (0, 1):
        play.finish(number)
    play.planner.learn(LATENCY)
    assert play.planner.plans and play.start(2)[1] is Reason.PLANNED


def test_an_empty_fleet_speaks_verls_words():
    with pytest.raises(RuntimeError, match="No available servers in load balancer"):
        Play(0).start(0)


def test_unknown_lengths_are_spread_evenly():
    play = Play(4)
    homes = [play.start(number, None)[0] for number in range(40)]
    assert all(homes.count(f"r{number}") == 10 for number in range(4))


def test_a_long_one_is_kept_away_from_the_crowd():
    play = Play(2)
    play.start(0, 30_000)
    crowd = [play.start(number, 1_000)[0] for number in range(1, 12)]
    assert crowd.count(play.where[0]) <= 1


def test_siblings_share_a_long_prompt_and_not_a_short_one():
    together, apart = Play(4), Play(4)
    assert len({together.start(number, 200, prompt="long", context=100_000)[0] for number in range(3)}) == 1
    assert len({apart.start(number, 2_000, prompt="short", context=100)[0] for number in range(3)}) == 3


def test_a_trajectory_leaves_the_crowd_that_the_step_waits_for_and_says_why():
    play = Play(2)
    play.planner.remove("r1")
    for number in range(8):
        play.start(number, 5_000)
    play.planner.add(Replica("r1"))
    move = play.finish(0, tokens=5_000)
    assert move is not None and move.replica == "r1" and move.gain_s > 0.5 * move.cost_s > 0
    assert play.start(0) == ("r1", Reason.MOVED)
    play.finish(0, tokens=5_000)
    assert play.start(0) == ("r1", Reason.STICKY)


def test_moves_stay_where_the_context_costs_more_than_it_gains_and_where_they_are_forbidden():
    for play, context in ((Play(2), 3_000_000), (Play(2, moves=False), 100)):
        play.planner.remove("r1")
        for number in range(8):
            play.start(number, 5_000, context=context)
        play.planner.add(Replica("r1"))
        assert all(play.finish(number, tokens=5_000) is None for number in range(8))


def test_moves_are_bounded():
    play = Play(2)
    rng = Random(3)
    for number in range(6):
        play.start(number, 1000)
    moved = dict.fromkeys(range(6), 0)
    for _ in range(40):
        for number in range(6):
            moved[number] += play.finish(number, 1, tokens=10 ** rng.uniform(1, 5)) is not None
            play.start(number)
    assert 0 < max(moved.values()) <= MOST_MOVES


def test_an_announced_batch_is_placed_longest_first():
    play = Play(2)
    tokens = {0: 1_000.0, 1: 1_000.0, 2: 9_000.0, 3: 9_000.0}
    play.planner.expect([Expected(identity(number), 100, left(one)) for number, one in tokens.items()])
    homes = {number: play.start(number, one)[0] for number, one in tokens.items()}
    assert homes[2] != homes[3] and homes[0] != homes[1]


@pytest.mark.parametrize("by_sample", [False, True])
def test_the_order_of_a_batch_does_not_make_stock_look_bad(by_sample):
    """Two prompts, long and short, on two replicas: dealt by turns, sample by sample, each replica would get one prompt whole."""
    numbers = np.arange(80)
    prompts = numbers % 2 if by_sample else numbers // 40
    books = Books(LATENCY)
    for name in ("a", "b"):
        books.add(Replica(name))
    books.tune(80, Habit())
    medians = np.where(prompts == 0, 20_000.0, 2_000.0)
    batch = Batch(medians, curves(medians, 0.5, 40_960), np.zeros((80, 2)), [str(one) for one in prompts])
    assert place_batch(books, batch) is None


def test_what_was_forgotten_is_placed_anew():
    play = Play(2)
    play.start(0)
    play.finish(0)
    assert play.planner.forget() == 1
    assert play.start(0)[1] is Reason.PLANNED


# --- self-checks ------------------------------------------------------------------------------------------------------------


def trusted(truth_of, claimed: float) -> Trust:
    trust, rng = Trust(), np.random.default_rng(0)
    for number in range(4 * FEWEST):
        said = float(np.exp(rng.normal(8, 1)))
        trust.told(str(number), Estimate(said, said * 9**claimed, 1.0, 0.0))
        trust.ended(str(number), int(truth_of(said, rng)))
    assert trust.slope == 1.0 and trust.quality is None  # nothing counts before everybody has ended
    trust.close()
    return trust


def test_honest_predictions_are_taken_at_their_word():
    trust = trusted(lambda said, rng: said * np.exp(rng.normal(0, 0.3)) + 1, 0.3 * 3**0.5 / np.pi)
    assert trust.slope > 0.95 and trust.widen < 1.1 and trust.quality > 0.9


def test_noise_makes_everybody_alike():
    trust = trusted(lambda said, rng: np.exp(rng.normal(8, 1)) + 1, 0.05)
    assert trust.slope < 0.15 and trust.widen == 4.0 and abs(trust.quality) < 0.15
    short, long = (trust.believed(left(tokens), np.log(3000)) for tokens in (100, 90_000))
    assert long.median_tokens / short.median_tokens < 3 and short.scale > 3 * left(100).scale


def test_a_verdict_needs_several_steps_rests_and_tries_again():
    verdict = Verdict()
    for ratio in (0.9, 1.05, None):
        verdict.judge(ratio)
    assert verdict.pays
    verdict.judge(0.98)
    assert not verdict.pays
    for _ in range(REST):
        assert not verdict.pays
        verdict.judge(0.5)
    assert verdict.pays


def audited(homes: list[str]) -> Audit:
    """Two long ones and two short ones, placed like this; stock's shadow puts one long one on each replica or both on one."""
    audit = Audit(Random(0))
    books = Books(LATENCY)
    for name in ("a", "b"):
        audit.add(name)
        books.add(Replica(name))
    tokens = [20_000, 20_000, 100, 100]
    turns = [TurnStart(TrajectoryId("p", f"u{number}", 0, 1), f"c{number}", 0, 10, 0) for number in range(4)]
    for number, home in enumerate(homes):
        audit.started(turns[number], home)
    for number, one in enumerate(tokens):
        audit.finished(turns[number].request)
        audit.ended(turns[number].trajectory.key, one)
    audit.close(books.names, books.drains_of)
    return audit


def test_the_audit_tells_a_good_placement_from_a_bad_one():
    assert audited(["a", "b", "a", "b"]).placing.last >= 0.99
    assert audited(["a", "a", "b", "b"]).placing.last < 0.99


def test_where_planning_has_not_paid_stocks_rule_returns_and_says_so():
    play = Play(3)
    for _ in range(3):
        play.planner._audit.placing.judge(0.9)
    said = [play.start(number, 10.0 ** (number % 5)) for number in range(30)]
    assert {reason for _, reason in said} == {Reason.NOT_PAYING}
    assert all([where for where, _ in said].count(f"r{number}") == 10 for number in range(3))  # fewest in flight, whatever is predicted
    assert play.planner.metrics()["pays"] == 0.0


def test_promises_that_are_upside_down_are_not_believed_for_long():
    play = Play(2)
    for step in range(4):
        batch = range(20 * step, 20 * step + 20)
        truth = {one: 20_000 if one % 4 == 0 else 100 for one in batch}
        for one in batch:
            play.start(one, 100 if truth[one] > 100 else 20_000)
        for one in batch:
            play.finish(one, truth[one], tokens=None)
        for one in batch:
            play.end(one)
    told = play.planner.metrics()
    assert told["slope"] == 0.0 and told["quality"] < -0.9


# --- in the simulated cluster -------------------------------------------------------------------------------------------------


def test_simulated_step_is_deterministic_faster_with_an_oracle_and_moves_little():
    work = generate("coding", 16, 8, seed=3, tool_mean_s=0.2)
    fleet = make_fleet(4, 1, LATENCY)

    def run(quality: float):
        policy = Planned(Replanner(LATENCY, Random(0), cap_tokens=40_960), Foresight(work, quality, 1))
        return simulate(work, fleet, LATENCY, policy, engine=EngineOptions()), policy

    (one, policy), (two, _) = run(1.0), run(1.0)
    assert one.makespan_s == two.makespan_s and one.migrations == two.migrations
    assert one.makespan_s < simulate(work, fleet, LATENCY, Stock(0)).makespan_s
    assert one.migrations < len(work)
    assert one.migrations == policy.counts[Reason.MOVED]
    assert not policy.planner._live and set(policy.planner.inflight.values()) == {0}


@pytest.mark.parametrize("ahead", [True, False])
def test_who_knows_nothing_does_what_stock_does_choice_for_choice(ahead):
    """First turns at least: the same replicas, drawn with the same random numbers."""
    play, stock = Play(4), StickyLeastInflight(Random(0))
    for number in range(4):
        stock.add(f"r{number}")
    same = left(2_000, 9.0)
    if ahead:
        play.planner.expect([Expected(identity(number), 100, same) for number in range(40)])
    for number in range(40):
        name = identity(number)
        assert play.planner.acquire(TurnStart(name, name.key, 0, 100, 0), same)[0] == stock.acquire(name.key)[0]
