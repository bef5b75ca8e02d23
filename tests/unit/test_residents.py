"""The resident set against its own law, event by event, and whole steps of it in the simulator."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from math import inf
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_heddle.fleet import Replica
from verl_heddle.latency.model import LatencyModel
from verl_heddle.options import Options
from verl_heddle.orchestrator import FIRST_HOLD_S, Orchestrator
from verl_heddle.schedule.resident import FEW, LONGEST_PAUSE_S, ORDERS, SETTLE_S, futile
from verl_heddle.schedule.residents import Residents
from verl_heddle.simulate import make_fleet, simulate
from verl_heddle.simulate.baselines import Stock
from verl_heddle.simulate.workload import most_kv
from verl_heddle.traces import generate, replayable
from verl_heddle.trajectory import Outcome, TrajectoryEnd, TrajectoryId, TurnEnd, TurnStart

HOLD_S = 10.0
PROMPT = 50


def identity(number: int) -> TrajectoryId:
    return TrajectoryId(prompt=f"p{number // 3}", uid=f"u{number // 3}", sample=number % 3, step=0)


def started(number: int, turn: int, context: int, generated: int = 0, leg: int = 0) -> TurnStart:
    return TurnStart(identity(number), identity(number).key, turn, context, generated, leg=leg)


def finished(turn: TurnStart, replica: str, tokens: int) -> TurnEnd:
    return TurnEnd(turn.trajectory, turn.conversation, replica, turn.turn, tokens, leg=turn.leg)


def interrupted(turn: TurnStart, replica: str, tokens: int) -> TurnEnd:
    return replace(finished(turn, replica, tokens), completed=False, interrupted=True)


def resident_set(order: str = "least_served", kv: int | None = 1000, slots: int = 4, replicas: int = 1) -> Residents:
    residents = Residents(ORDERS[order], Random(0))
    for number in range(replicas):
        residents.add(Replica(f"r{number}", slots=slots, kv_tokens=kv), HOLD_S)
    return residents


class Play:
    """A random step: every trajectory takes turns, tools take time; after each event the set is checked from scratch."""

    def __init__(self, residents: Residents, kv: int, slots: int, order: str) -> None:
        self.residents, self.kv, self.slots, self.order = residents, kv, slots, order
        self.now = 0.0
        self.turns: dict[int, TurnStart] = {}
        """The open turn of each trajectory."""
        self.where: dict[int, str] = {}
        """Open turns that have been let in."""
        self.contexts: dict[int, tuple[int, int]] = {}
        """Of trajectories between turns: context and turns so far."""
        self.legs: dict[int, tuple[int, int, int]] = {}
        """Of trajectories whose turn was interrupted: context, turn and legs so far."""
        self.paused: set[str] = set()
        self.settled_s = 0.0
        """Until when replicas that go on may wait for the paused."""
        self.named: set[str] = set()
        self.over: set[int] = set()

    def start(self, number: int, prompt: int = PROMPT) -> None:
        leg = 0
        if number in self.legs:
            context, turn, leg = self.legs.pop(number)
        else:
            context, turn = self.contexts.pop(number, (prompt, 0))
        self.turns[number] = started(number, turn, context, leg=leg)
        replica = self.residents.turn_started(self.turns[number], self.now)
        if replica is not None:
            self.let_in(number, replica)
        self.check()

    def let_in(self, number: int, replica: str) -> None:
        name = self.turns[number].request
        assert name not in self.named, "a turn is let in once"
        assert replica not in self.paused, "nobody is let into an engine that is paused"
        self.named.add(name)
        self.where[number] = replica

    def finish(self, number: int, tokens: int) -> None:
        turn, replica = self.turns.pop(number), self.where.pop(number)
        self.contexts[number] = (turn.context_tokens + tokens, turn.turn + 1)
        self.residents.turn_finished(finished(turn, replica, tokens), self.now)
        self.check()

    def withdraw(self, number: int) -> None:
        turn = self.turns.pop(number)
        self.contexts[number] = (turn.context_tokens, turn.turn + 1)
        self.residents.turn_finished(replace(finished(turn, "", 0), completed=False), self.now)
        self.check()

    def end(self, number: int) -> None:
        self.contexts.pop(number)
        self.over.add(number)
        self.residents.trajectory_ended(identity(number).key, self.now)
        self.check()

    def pause(self, name: str, done: set[int]) -> None:
        """`done`: those whose turn has ended before its interruption, and is told of later."""
        self.residents.pause(name, self.now)
        self.paused.add(name)
        self.check()
        for number in [number for number, where in self.where.items() if where == name]:
            if number in done:
                self.finish(number, 1)
                continue
            turn = self.turns.pop(number)
            self.where.pop(number)
            self.legs[number] = (turn.context_tokens + 1, turn.turn, turn.leg + 1)
            self.residents.turn_finished(interrupted(turn, name, 1), self.now)
            self.check()
        assert not self.residents.residents(name), "whose context is wiped is resident nowhere"

    def resume(self, name: str) -> None:
        if name in self.paused and self.settled_s <= self.now:
            self.settled_s = self.now + SETTLE_S
        self.paused.discard(name)
        self.residents.resume(name, self.now)
        self.check()

    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.residents.tick(self.now)
        self.check()

    def check(self) -> None:
        keys = {identity(number).key: number for number in self.turns}
        for request, replica in self.residents.admitted():
            self.let_in(keys[request.rpartition(":")[0]], replica)
        for number, replica in self.where.items():
            assert self.residents.home_of(identity(number).key) == replica, "whoever runs is resident"
        held = [number for number in self.turns if number not in self.where]
        homes = self.residents.homes()
        resident, idle = (sum(len(of(name)) for name in homes) for of in (self.residents.residents, self.residents.idle))
        assert +self.residents.now == +Counter(resident=resident, idle=idle, waiting=len(held)), "what is counted is there"
        for name in homes:
            used, residents = self.residents.used(name), self.residents.residents(name)
            counted = sum(live.own for live in residents) + sum(PROMPT for _ in {live.prompt for live in residents})
            assert used == pytest.approx(counted), "the books are right"
            if used > self.kv + 1e-6:
                assert not self.residents.idle(name), "over capacity nobody is idle"
            if held and (not self.paused or (name not in self.paused and self.now >= self.settled_s)):
                assert self.residents.residents(name), "nobody waits while a replica is empty"
        if held:
            assert self.residents.due_s() > self.now, "nobody outstays the rent while somebody waits"


@given(data=st.data(), order=st.sampled_from(sorted(ORDERS)), replicas=st.integers(1, 3), slots=st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_the_law_holds_after_every_event(data, order, replicas, slots):
    kv = 1000
    play = Play(resident_set(order, kv, slots, replicas), kv, slots, order)
    for _ in range(data.draw(st.integers(1, 60))):
        running, held = sorted(play.where), sorted(set(play.turns) - set(play.where))
        choices = (
            ["start", "wait", "pause", "resume"] + ["finish"] * bool(running) + ["withdraw"] * bool(held) + ["end"] * bool(play.contexts)
        )
        match data.draw(st.sampled_from(choices)):
            case "start":
                free = [number for number in range(12) if number not in play.turns and number not in play.over]
                if free:
                    play.start(data.draw(st.sampled_from(free)))
            case "finish":
                play.finish(data.draw(st.sampled_from(running)), data.draw(st.integers(0, 500)))
            case "withdraw":
                play.withdraw(data.draw(st.sampled_from(held)))
            case "end":
                play.end(data.draw(st.sampled_from(sorted(play.contexts))))
            case "wait":
                play.wait(data.draw(st.floats(0, 15)))
            case "pause":
                play.pause(data.draw(st.sampled_from(play.residents.homes())), data.draw(st.sets(st.sampled_from(range(12)))))
            case "resume":
                play.resume(data.draw(st.sampled_from(play.residents.homes())))
    for name in sorted(play.paused):
        play.resume(name)
    for number in sorted(play.legs):
        play.start(number)
    for _ in range(10_000):  # everybody ends
        if play.where:
            number = min(play.where)
            play.finish(number, 1)
            play.end(number)
        elif play.turns:  # all residents are in their tools: until the next rent runs out
            due = play.residents.due_s()
            assert due < inf, f"held for ever: {play.turns}"
            play.wait(due - play.now)
        elif play.contexts:
            play.end(min(play.contexts))
        else:
            break
    assert all(play.residents.used(name) == pytest.approx(0) for name in play.residents.homes())


def test_a_resident_goes_in_at_once_however_full_it_is():
    residents = resident_set(kv=100)
    first = started(0, 0, 90)
    assert residents.turn_started(first, 0.0) == "r0"
    assert residents.turn_started(started(3, 0, 50), 0.0) is None
    residents.turn_finished(finished(first, "r0", 5), 1.0)
    assert residents.turn_started(started(0, 1, 95), 2.0) == "r0"
    assert residents.admitted() == []


def test_an_idle_resident_gives_way_when_its_rent_is_over_and_only_if_somebody_waits():
    residents = resident_set(kv=100)
    first = started(0, 0, 90)
    residents.turn_started(first, 0.0)
    residents.turn_finished(finished(first, "r0", 5), 1.0)
    residents.tick(100.0)
    assert residents.home_of(identity(0).key) == "r0" and residents.due_s() == inf
    assert residents.turn_started(started(3, 0, 50), 100.0) == "r0"
    assert residents.home_of(identity(0).key) is None


def test_an_idle_resident_is_held_until_the_rent_is_over():
    residents = resident_set(kv=100)
    first = started(0, 0, 90)
    residents.turn_started(first, 0.0)
    residents.turn_finished(finished(first, "r0", 5), 1.0)
    assert residents.turn_started(started(3, 0, 50), 2.0) is None
    assert residents.due_s() == 1.0 + HOLD_S
    residents.tick(1.0 + HOLD_S)
    assert residents.admitted() == [(started(3, 0, 50).request, "r0")]


@pytest.mark.parametrize(("tool_s", "held"), [(0.5 * HOLD_S, True), (1.5 * HOLD_S, False), (20 * HOLD_S, False)])
def test_contexts_are_not_held_where_tools_have_been_too_long_for_it(tool_s, held):
    residents, now = resident_set(kv=100), 0.0
    for number in range(FEW + 1):
        turn = started(0, number, 10)
        assert residents.turn_started(turn, now) == "r0"
        residents.turn_finished(finished(turn, "r0", 1), now)
        now += tool_s
    last = started(0, FEW + 1, 90)
    residents.turn_started(last, now)
    assert residents.turn_started(started(3, 0, 50), now) is None
    residents.turn_finished(finished(last, "r0", 5), now + 1)
    assert residents.admitted() == ([] if held else [(started(3, 0, 50).request, "r0")])


@given(st.lists(st.floats(0, 100), min_size=1, max_size=50), st.floats(0.1, 50))
def test_a_hold_is_futile_only_where_not_holding_costs_clearly_less(gaps, hold_s):
    """Per token: a hold costs the rent and, where the tool outlasts it, the reading (t*); no hold costs the reading each time."""
    hold, drop = sum(min(gap, hold_s) + (hold_s if gap > hold_s else 0.0) for gap in gaps), hold_s * len(gaps)
    assert not futile(gaps, hold_s) or hold > drop
    assert futile([*gaps, *[2 * hold_s] * (3 * len(gaps))], hold_s)
    assert not futile(gaps, inf) and not futile([0.9 * gap for gap in gaps], 100.0)


def test_siblings_count_their_prompt_once():
    residents = resident_set(kv=100)
    assert [residents.turn_started(started(number, 0, 90), 0.0) for number in (0, 1, 2)] == ["r0"] * 3
    assert residents.turn_started(started(3, 0, 20), 0.0) is None


def test_the_evicted_return_wherever_there_is_room():
    residents = resident_set(kv=100, replicas=2)
    turns = [started(number, 0, 90) for number in (0, 3)]
    homes = [residents.turn_started(turn, 0.0) for turn in turns]
    residents.turn_finished(finished(turns[0], homes[0], 5), 1.0)
    assert residents.turn_started(started(6, 0, 90), 20.0) == homes[0]
    residents.turn_finished(finished(turns[1], homes[1], 1), 21.0)
    residents.trajectory_ended(identity(3).key, 21.0)
    assert residents.turn_started(started(0, 1, 95), 22.0) == homes[1]


def test_a_fleet_in_which_nothing_completes_is_not_waited_for():
    residents = Residents(ORDERS["least_served"], Random(0), silent_s=60.0)
    residents.add(Replica("r0", kv_tokens=100), HOLD_S)
    first = started(0, 0, 90)
    residents.turn_started(first, 0.0)
    residents.turn_finished(finished(first, "r0", 5), 5.0)
    residents.turn_started(started(0, 1, 95), 6.0)
    assert residents.turn_started(started(3, 0, 50), 7.0) is None and residents.due_s() == 67.0, "60 s after it came"
    residents.tick(66.9)
    assert residents.admitted() == []
    residents.tick(67.0)
    assert residents.admitted() == [(started(3, 0, 50).request, "r0")] and residents.counts["overdue"] == 1


def test_residents_are_no_more_than_the_calls_that_a_server_takes():
    residents = Residents(ORDERS["least_served"], Random(0))
    residents.add(Replica("r0", slots=4, calls=40), HOLD_S)  # 32 are left to others than turns
    for number in range(8):
        turn = started(number, 0, 10)
        assert residents.turn_started(turn, 0.0) == "r0"
        residents.turn_finished(finished(turn, "r0", 5), 0.0)
    assert residents.turn_started(started(8, 0, 10), 1.0) is None


def test_who_was_admitted_to_a_replica_that_leaves_before_being_told_waits_again():
    residents = resident_set(kv=100, replicas=2)
    homes = [residents.turn_started(started(number, 0, 90), 0.0) for number in (0, 3)]
    assert residents.turn_started(started(6, 0, 90), 1.0) is None
    residents.trajectory_ended(identity(0).key, 2.0)
    residents.remove(homes[0])
    assert residents.admitted() == [] and residents.now["waiting"] == 1
    residents.trajectory_ended(identity(3).key, 3.0)
    assert residents.admitted() == [(started(6, 0, 90).request, homes[1])]


def test_how_long_a_context_is_held():
    """Through the time in which its KV cache is read, 8192 tokens at a time; not at all where nothing is found again."""
    held = {}
    for caches in (True, False):
        orchestrator = Orchestrator(Options())
        orchestrator.replicas_added([Replica("r", kv_tokens=81_920, caches=caches)])
        held[caches] = [orchestrator.residents._homes["r"].hold_s]
        orchestrator.step_times_known(LatencyModel.affine(0.01, 0.001, prefill_per_token_s=1e-4))
        held[caches].append(orchestrator.residents._homes["r"].hold_s)
    assert held[False] == [0.0, 0.0] and held[True] == [FIRST_HOLD_S, pytest.approx(8.192, rel=0.1)]


def test_where_the_host_keeps_what_is_evicted_verls_rule_decides():
    made = {tier: Orchestrator(Options()) for tier in (True, False)}
    for tier, orchestrator in made.items():
        orchestrator.replicas_added([Replica("r0", slots=2, kv_tokens=100, tier=tier)])
        held = [orchestrator.turn_started(started(number, 0, 90), 0.0) for number in (0, 3, 6)]
        assert [one.held for one in held] == ([False] * 3 if tier else [False, True, True])
    made[True].replicas_removed(["r0"])
    made[True].replicas_added([Replica("r1", slots=2, kv_tokens=100)])
    decisions = [made[True].turn_started(started(number, 0, 90), 1.0) for number in (9, 12)]
    assert [one.held for one in decisions] == [False, True], "none keeps anything any more"


def test_trajectories_that_begin_while_resident_sets_rest_go_by_verls_rule_and_the_others_as_they_began():
    orchestrator = Orchestrator(Options())
    orchestrator.replicas_added([Replica("r", slots=2, kv_tokens=100)])
    first, second = started(0, 0, 90), started(3, 0, 90)
    assert not orchestrator.turn_started(first, 0.0).held and orchestrator.turn_started(second, 0.0).held
    orchestrator.rest(True, 1.0)
    plain = [started(number, 0, 90) for number in (6, 9)]
    assert [orchestrator.turn_started(turn, 1.0).held for turn in plain] == [False, False]
    assert orchestrator.inflight == {"r": 3} and orchestrator.holds
    orchestrator.rest(False, 2.0)
    orchestrator.turn_finished(finished(plain[0], "r", 5), 2.0)
    assert not orchestrator.turn_started(started(6, 1, 95, 5), 2.0).held, "as it began"
    assert orchestrator.turn_started(started(12, 0, 90), 2.0).held
    orchestrator.turn_finished(finished(first, "r", 5), 3.0)
    orchestrator.trajectory_ended(TrajectoryEnd(first.trajectory, Outcome.FINISHED, 5, 1), 3.0)
    assert orchestrator.admitted(3.0) == [(second.request, "r")]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_at_rest_a_step_is_stocks_turn_by_turn(seed):
    work = [replayable(item) for item in generate("search", 12, 4, seed=seed, median_tokens=150, cap_tokens=1200, tool_mean_s=0.3)]
    latency = LatencyModel.affine(0.01, 0.001, 1e-7, prefill_per_token_s=2e-4, prefill_base_s=0.01)
    fleet = make_fleet(3, 1, latency, 16, {1: 2 * most_kv(work)})
    rests, keeps = Orchestrator(Options(seed=seed)), Orchestrator(Options(seed=seed))
    rests.rest(True, 0.0)
    stock, rested, kept = (simulate(work, fleet, latency, policy, seed=0) for policy in (Stock(seed), rests, keeps))
    for column in ("replica", "end_s", "queue_s", "trajectory"):
        assert (stock.turns.column(column) == rested.turns.column(column)).all()
    assert kept.makespan_s != stock.makespan_s


def test_contexts_that_the_engines_have_dropped_are_not_counted_on():
    orchestrator = Orchestrator(Options())
    orchestrator.replicas_added([Replica("r", kv_tokens=100)])
    first = started(0, 0, 90)
    assert orchestrator.turn_started(first, 0.0).replica == "r"
    orchestrator.turn_finished(finished(first, "r", 5), 1.0)
    assert orchestrator.turn_started(started(3, 0, 50), 2.0).held
    orchestrator.homes_forgotten()
    assert orchestrator.admitted(2.0) == [(started(3, 0, 50).request, "r")]


def test_a_replica_that_leaves_frees_its_residents():
    residents = resident_set(kv=100, replicas=2)
    turn = started(0, 0, 90)
    home = residents.turn_started(turn, 0.0)
    residents.remove(home)
    residents.turn_finished(replace(finished(turn, home, 3), completed=False), 1.0)
    assert residents.turn_started(started(0, 0, 93), 2.0) not in (None, home)


def test_an_interrupted_trajectory_goes_on_wherever_there_is_room():
    """Its context is wiped: the order decides anew, and so does the load."""
    residents = resident_set(kv=100, replicas=2)
    turns = [started(number, 0, 90) for number in (0, 3)]
    homes = [residents.turn_started(turn, 0.0) for turn in turns]
    later = started(6, 0, 90)
    assert residents.turn_started(later, 0.5) is None
    for name in ("r0", "r1"):
        residents.pause(name, 1.0)
    for turn, home in zip(turns, homes, strict=True):
        residents.turn_finished(interrupted(turn, home, 5), 1.0)
    assert residents.admitted() == [], "nobody is let into an engine that is paused"
    legs = [started(number, 0, 95, generated=5, leg=1) for number in (0, 3)]
    assert [residents.turn_started(leg, 2.0) for leg in legs] == [None, None]
    residents.resume("r1", 30.0)
    assert residents.admitted() == [], "it would be given everybody"
    residents.resume("r0", 31.0)
    (first, home), (second, other) = residents.admitted()
    assert (first, second, {home, other}) == (later.request, legs[0].request, {"r0", "r1"}), "least served first"


def test_a_turn_that_ends_as_its_engine_is_paused_leaves_no_resident():
    """Its last token came before the weight update, and the router hears of it after: the next turn does not go to a paused engine."""
    residents = resident_set(kv=100)
    turn = started(0, 0, 50)
    home = residents.turn_started(turn, 0.0)
    residents.pause(home, 1.0)
    residents.turn_finished(finished(turn, home, 5), 1.0)
    assert residents.put_out() == [turn.trajectory.key] and not residents.residents(home)
    assert residents.turn_started(started(0, 1, 55), 1.0) is None


def test_a_replica_that_stays_paused_is_waited_for_a_little():
    residents = resident_set(kv=100, replicas=2)
    for name in ("r0", "r1"):
        residents.pause(name, 1.0)
    turn = started(0, 0, 90)
    assert residents.turn_started(turn, 2.0) is None
    residents.resume("r1", 30.0)
    assert residents.admitted() == [] and residents.due_s() == 30.0 + SETTLE_S
    residents.tick(30.0 + SETTLE_S)
    assert residents.admitted() == [(turn.request, "r1")]


def test_a_replica_that_comes_back_while_it_is_paused_is_given_nobody_before_it_goes_on():
    """As under `separate_async`: it leaves for the trainer, is paused there, is registered again, and then gets its weights."""
    residents = resident_set(kv=100, replicas=2)
    turns = [started(number, 0, 90) for number in (0, 3)]
    homes = [residents.turn_started(turn, 0.0) for turn in turns]
    residents.remove("r1")
    residents.pause("r1", 1.0)
    later = started(6, 0, 90)
    assert residents.turn_started(later, 2.0) is None, f"{homes}: r0 is full"
    residents.add(Replica("r1", slots=4, kv_tokens=100), HOLD_S)
    assert residents.admitted() == []
    residents.resume("r1", 3.0)
    assert residents.admitted() == [(later.request, "r1")]


def test_validation_goes_first_and_then_the_earlier_step():
    residents = resident_set(kv=100)
    residents.turn_started(started(0, 0, 90), 0.0)
    waiting = []
    for number, (step, validate, generated) in enumerate([(7, False, 0), (6, False, 500), (7, True, 900)], start=1):
        who = TrajectoryId(prompt=f"p{number}", uid=f"u{number}", sample=0, step=step, validate=validate)
        waiting.append(TurnStart(who, who.key, 0, 90, generated))
        assert residents.turn_started(waiting[-1], 1.0) is None
    order = []
    key = identity(0).key
    for _ in waiting:
        residents.trajectory_ended(key, 2.0)
        [(request, _)] = residents.admitted()
        order.append(request)
        key = request.rpartition(":")[0]
    assert order == [waiting[index].request for index in (2, 1, 0)]


def test_a_pause_of_which_nobody_hears_the_end_is_not_waited_for():
    residents = Residents(ORDERS["least_served"], Random(0), silent_s=60.0)
    residents.add(Replica("r0", kv_tokens=100), HOLD_S)
    residents.pause("r0", 0.0)
    turn = started(0, 0, 90)
    assert residents.turn_started(turn, 1.0) is None and residents.due_s() == LONGEST_PAUSE_S
    residents.tick(LONGEST_PAUSE_S - 1)
    assert residents.admitted() == [], "a trainer may take longer for a step than a fleet may be silent"
    residents.tick(LONGEST_PAUSE_S)
    assert residents.admitted() == [(turn.request, "r0")]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 12), st.sampled_from([300, 1000, None]))
def test_many_replicas_are_looked_through_at_once_and_decide_as_one_by_one(seed, replicas, kv):
    """The same events, once with arrays and once without: the same replicas, ties included, and the same evictions."""

    def play(many: int) -> list[object]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("verl_heddle.schedule.residents.MANY", many)
            rng, residents, log = Random(seed), resident_set(kv=kv, replicas=replicas), list[object]()
            open_, idle, now = dict[str, tuple[TurnStart, str | None]](), {number: (PROMPT, 0) for number in range(6 * replicas)}, 0.0
            arrays = False
            for _ in range(300):
                now += rng.choice((0.1, 5.0))
                kind, running = rng.random(), [name for name, (_, replica) in open_.items() if replica]
                if kind < 0.5 and idle:
                    number = rng.choice(sorted(idle))
                    context, turns = idle.pop(number)
                    turn = started(number, turns, context)
                    open_[turn.request] = turn, residents.turn_started(turn, now)
                    log.append(open_[turn.request][1])
                elif kind < 0.93 and running:
                    turn, replica = open_.pop(rng.choice(running))
                    tokens, number = rng.randint(1, 60), int(turn.trajectory.uid[1:]) * 3 + turn.trajectory.sample
                    residents.turn_finished(finished(turn, replica, tokens), now)
                    idle[number] = turn.context_tokens + tokens, turn.turn + 1
                    if rng.random() < 0.1:
                        residents.trajectory_ended(turn.trajectory.key, now)
                        idle[number] = PROMPT, turn.turn + 1
                elif kind < 0.96:
                    name = f"r{rng.randrange(replicas)}"
                    (residents.pause if rng.random() < 0.5 else residents.resume)(name, now)
                elif kind < 0.97:
                    name = f"r{rng.randrange(replicas)}"
                    residents.remove(name)
                    for request, (turn, replica) in list(open_.items()):
                        if replica == name:
                            del open_[request]
                            idle[int(turn.trajectory.uid[1:]) * 3 + turn.trajectory.sample] = turn.context_tokens, turn.turn + 1
                    residents.add(Replica(name, slots=4, kv_tokens=kv), HOLD_S)
                residents.tick(now)
                arrays = arrays or residents._rooms is not None
                for request, replica in residents.admitted():
                    log.append((request, replica))
                    open_[request] = open_[request][0], replica
            assert arrays == (many == 0)
            return [*log, residents.metrics()]

    assert play(0) == play(1000)


def test_what_is_kept_does_not_grow_with_the_turns():
    """In a run in which nobody ever waits, nobody asks for the idle or their rents either."""
    residents = resident_set(kv=None)
    for number in range(2000):
        for turn in range(5):
            begun = started(number, turn, PROMPT)
            assert residents.turn_started(begun, float(number)) == "r0"
            residents.turn_finished(finished(begun, "r0", 5), float(number))
        residents.trajectory_ended(identity(number).key, float(number))
    assert len(residents._rents) < 100 and len(residents._homes["r0"].idle) < 100 and not residents._queue
