"""The orchestrator as a state machine: random lives of random trajectories."""

from collections import Counter, deque
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_heddle.fleet import Replica
from verl_heddle.latency.model import LatencyModel
from verl_heddle.options import Admission, Options, Place, Priority, Residents
from verl_heddle.orchestrator import Orchestrator
from verl_heddle.place.sticky import CACHE_SIZE, StickyLeastInflight
from verl_heddle.predict.predictor import Predictor
from verl_heddle.trajectory import Outcome, Reason, TrajectoryEnd, TrajectoryId, TurnEnd, TurnStart

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


def build(options: Options, slots: int = 256, kv_tokens: int | None = None) -> Orchestrator:
    orchestrator = Orchestrator(options)
    orchestrator.replicas_added(Replica(f"r{i}", slots=slots, kv_tokens=kv_tokens) for i in range(3))
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

    for options in (Options(observe=True), Options(priority=Priority(enable=False), residents=Residents(enable=False))):
        assert {d.priority for d in live(build(options), lives, count())} == {0}


def test_longer_prompts_run_first_once_history_exists():
    orchestrator = build(Options.longest())
    for prompt, tokens in (("short", 100), ("long", 5000)):
        who = TrajectoryId(prompt, "u", 0, 1)
        orchestrator.trajectory_ended(TrajectoryEnd(who, Outcome.FINISHED, tokens, 1), 0.0)

    def priority(prompt: str, generated: int) -> int:
        who = TrajectoryId(prompt, f"{prompt} {generated}", 0, 2)
        return orchestrator.turn_started(TurnStart(who, "c" + prompt, 1 if generated else 0, 10, generated), 1.0).priority

    assert priority("long", 0) < priority("short", 0) < 0
    assert priority("short", 9000) < priority("long", 0), "what a trajectory has shown counts"


def test_cancelled_failed_and_validation_lives_teach_nothing():
    orchestrator = build(Options.longest())
    for outcome, validate in ((Outcome.CANCELLED, False), (Outcome.FAILED, False), (Outcome.FINISHED, True)):
        who = TrajectoryId("p", "u", 0, 1, validate)
        orchestrator.trajectory_ended(TrajectoryEnd(who, outcome, 900, 3), 0.0)
    decision = orchestrator.turn_started(TurnStart(identity(1), "c", 0, 10, 0), 1.0)
    fresh = build(Options.longest()).turn_started(TurnStart(identity(1), "c", 0, 10, 0), 1.0)
    assert decision.predicted_remaining == fresh.predicted_remaining


def test_turns_beyond_the_bound_wait_and_the_most_urgent_goes_first():
    orchestrator = Orchestrator(Options.longest(admission=Admission(per_slot=1.0, hold_s=100.0)))
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
    assert orchestrator.admitted(3.0) == [("vlong_e:0", "r")]
    end("c", "short", 4.0, completed=False)
    assert orchestrator.admitted(4.0) == [], "a held turn that gives up frees no place"
    assert orchestrator.admitted(102.9) == [], "a turn completed there 99.9 s ago"
    assert orchestrator.admitted(103.0) == [("vshort_d:0", "r")], "its replica is silent"
    for name, prompt in (("b", "short"), ("d", "short"), ("e", "long")):
        end(name, prompt, 104.0)
    assert set(orchestrator.inflight.values()) == {0} and len(orchestrator.admission) == 0


def test_siblings_that_end_change_the_priority_of_turns_under_way():
    orchestrator = build(Options.longest())
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


def test_by_arrival_validation_goes_first_and_nothing_is_predicted():
    orchestrator = build(Options())
    assert orchestrator.predictor is None
    who = [replace(identity(sample), validate=sample == 2) for sample in range(3)]
    turns = [TurnStart(one, one.key, 0, 10, 0) for one in who]
    assert [orchestrator.turn_started(turn, 0.0).priority for turn in turns] == [0, 0, -1]
    longest = build(Options.longest())
    assert [longest.turn_started(turn, 0.0).priority < 0 for turn in turns] == [True] * 3, "by length"


KINDS = {
    "default": Options(),
    "longest": Options.longest(admission=Admission(per_slot=1.0)),
    "longest, residents": Options.longest(residents=Residents(enable=True)),
    "arrival": Options(admission=Admission(per_slot=1.0), residents=Residents(enable=False)),
    "planned": Options.longest(admission=Admission(per_slot=1.0), place=Place(enable=True)),
    "planned, no refresh": Options(priority=Priority(order="longest", refresh_s=0.0), place=Place(enable=True)),
    "planned, no priority": Options(priority=Priority(enable=False), place=Place(enable=True)),
    "stock": Options(observe=True),
}


class Crowd:
    """Trajectories that talk in shared conversations, several turns at a time, of workers that repeat themselves, lose replicas or die."""

    def __init__(self, options: Options, rng: Random, trajectories: int) -> None:
        self.mind, self.rng, self.now = build(options, slots=2, kv_tokens=4000), rng, 0.0
        self.mind.step_times_known(LatencyModel.affine(0.02, 0.01, prefill_per_token_s=1e-5))
        self.todo = {TrajectoryId(f"p{n % 3}", f"u{n % 4}", n, 1): rng.randint(1, 6) for n in range(trajectories)}
        self.begun: Counter[TrajectoryId] = Counter()
        self.tokens: Counter[TrajectoryId] = Counter()
        self.open: dict[str, tuple[TurnStart, str]] = {}
        self.held: set[str] = set()
        self.stays: dict[str, str] = {}
        """What workers believe: where trajectories stay."""
        self.news: deque[str] = deque()
        """Trajectories that have been put out, of which their workers have not heard."""
        self.told = 0

    def event(self) -> None:
        """One thing that may happen."""
        self.now += self.rng.choice((0.01, 1.0))
        kind = self.rng.choice("ssseeerldx")
        ready = [who for who, left in self.todo.items() if left]
        free = sorted(set(self.open) - self.held)
        if kind == "s" and ready:
            who = self.rng.choice(ready)
            self.todo[who] -= 1
            conversation = f"c{self.rng.randint(0, 2)}"
            self.start(TurnStart(who, conversation, self.begun[who], 100, self.tokens[who], self.rng.choice((None, 3.0, float("nan")))))
            self.begun[who] += 1
        elif kind in "el" and free:
            turn, replica = self.open[self.rng.choice(free)]
            self.end(turn, replica, kind == "e")
            if kind == "l":  # its replica was lost, or it is sent again for another reason
                self.start(replace(turn, leg=turn.leg + 1))
            elif self.rng.random() < 0.2:
                self.mind.turn_finished(TurnEnd(turn.trajectory, turn.conversation, replica, turn.turn, 9, leg=turn.leg), self.now)
        elif kind == "r" and self.open:  # the answer did not arrive
            self.start(self.open[self.rng.choice(sorted(self.open))][0])
        elif kind == "d" and self.held:  # gives up waiting
            turn, replica = self.open[self.rng.choice(sorted(self.held))]
            self.end(turn, replica, False)
        elif kind == "x":
            over = [who for who, left in self.todo.items() if not left and not any(t.trajectory == who for t, _ in self.open.values())]
            if over:
                who = self.rng.choice(over)
                del self.todo[who]
                end = TrajectoryEnd(who, Outcome.FINISHED, self.tokens[who], self.begun[who])
                self.mind.trajectory_ended(end, self.now)
        self.mind.reprioritised(self.now)
        self.mind.prewarms(self.now)
        self.let_in()
        self.news += self.mind.put_out()
        while self.news and self.rng.random() < 0.4:
            self.stays.pop(self.news.popleft(), None)
        placed = Counter(replica for _, replica in self.open.values())
        assert self.mind.inflight == {name: placed[name] for name in self.mind.replicas}
        assert len(self.open) == len(self.mind.turns) and self.mind.holds == bool(self.held)
        assert set(self.mind._refresh.changed) <= set(self.mind.turns.groups)

    def start(self, turn: TurnStart) -> None:
        key = turn.trajectory.key
        if key in self.stays and not turn.leg and turn.request not in self.open:
            self.mind.turn_begun(turn, self.stays[key], self.now)
            self.open[turn.request] = (turn, self.stays[key])
            self.told += 1
            return
        decision = self.mind.turn_started(turn, self.now)
        if decision.stays and key not in self.news:
            self.stays[key] = decision.replica
        self.open[turn.request] = (turn, decision.replica)
        self.held.discard(turn.request)
        if decision.held:
            self.held.add(turn.request)

    def end(self, turn: TurnStart, replica: str, completed: bool) -> None:
        del self.open[turn.request]
        self.held.discard(turn.request)
        tokens = self.rng.randint(1, 3000) if completed else 0
        self.tokens[turn.trajectory] += tokens
        seconds = self.rng.choice((None, 0.02 * tokens, float("inf")))
        self.mind.turn_finished(
            TurnEnd(turn.trajectory, turn.conversation, replica, turn.turn, tokens, completed, seconds, turn.leg), self.now
        )

    def let_in(self) -> None:
        self.mind.tick(self.now)
        for request, replica in self.mind.admitted(self.now):
            self.held.remove(request)  # once, and only if it was held
            turn, before = self.open[request]
            assert before in ("", replica), "bound late, but once"
            self.open[request] = (turn, replica)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(KINDS)), st.integers(1, 12), st.integers(0, 10_000))
def test_whatever_turns_share_and_whoever_dies_nothing_is_left(kind, trajectories, seed):
    crowd = Crowd(KINDS[kind], Random(seed), trajectories)
    for _ in range(120):
        crowd.event()
    mind = crowd.mind
    assert not crowd.told or kind == "default"
    assert mind.step_ended(1, crowd.now) == 0, "they are of this step"
    alive = {who for who in crowd.todo if crowd.begun[who]}
    assert mind.step_ended(2, crowd.now) == len(alive), "their workers have died"
    assert set(mind.inflight.values()) == {0}
    assert not (mind.turns or mind.turns.groups or mind._lives or mind._refresh.changed or (mind.admitted(crowd.now) and not crowd.held))
    assert mind.admission is None or (not mind.admission and not any(mind.admission.inside(name) for name in mind.inflight))
    assert mind.residents is None or (not +mind.residents.now and not any(map(mind.residents.used, mind.residents.homes())))
    audit = mind._placement._audit
    assert not audit._shadow and set(audit._stock.inflight.values()) == {0}
    if mind.predictor is not None:
        assert Predictor.from_bytes(mind.predictor.to_bytes())


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 14), st.integers(0, 10_000), st.sampled_from([600, 2000, None]))
def test_told_in_time_decides_as_asked(trajectories, seed, kv_tokens):
    asked_and_told(trajectories, seed, kv_tokens)


def test_most_turns_are_told_unless_contexts_are_evicted():
    told, evicted = asked_and_told(12, 1, None)
    assert told > 30 and not evicted
    told, evicted = asked_and_told(12, 1, 2000)
    assert told > 3 and evicted > 3


def asked_and_told(trajectories: int, seed: int, kv_tokens: int | None) -> tuple[int, int]:
    """One orchestrator is asked for every turn, another told of those whose trajectories stay: the same answers, admissions and evictions.
    Returns how many were told, and how many evicted."""
    rng, now, told = Random(seed), 0.0, 0
    asked, other = (build(Options(), slots=4, kv_tokens=kv_tokens) for _ in range(2))
    todo = {TrajectoryId(f"p{n % 3}", f"u{n % 4}", n, 1): rng.randint(1, 8) for n in range(trajectories)}
    done, tokens, open_, held = Counter(), Counter(), {}, set()
    stays: dict[str, tuple[str, int]] = {}
    for _ in range(400):
        now += rng.choice((0.01, 1.0, 20.0))
        idle = [who for who in todo if who.key not in open_]
        running = sorted(set(open_) - held)
        if idle and (not running or rng.random() < 0.5):
            who = rng.choice(idle)
            turn = TurnStart(who, who.key, done[who], 100 + tokens[who], tokens[who], 1.0 if done[who] else None)
            answer = asked.turn_started(turn, now)
            if who.key in stays:
                told += 1
                other.turn_begun(turn, stays[who.key][0], now)
                assert (answer.replica, answer.priority, answer.reason, answer.held) == (*stays[who.key], Reason.STICKY, False)
            else:
                assert other.turn_started(turn, now) == answer
            open_[who.key] = (turn, answer.replica)
            if answer.held:
                held.add(who.key)
            elif answer.stays:
                stays[who.key] = answer.replica, answer.priority
        elif running:
            turn, replica = open_.pop(rng.choice(running))
            who, new = turn.trajectory, rng.randint(1, 300)
            done[who], tokens[who] = done[who] + 1, tokens[who] + new
            for mind in (asked, other):
                mind.turn_finished(TurnEnd(who, who.key, replica, turn.turn, new), now)
                if done[who] == todo[who]:
                    mind.trajectory_ended(TrajectoryEnd(who, Outcome.FINISHED, tokens[who], done[who]), now)
            if done[who] == todo[who]:
                del todo[who]
                stays.pop(who.key, None)
        let_in = asked.admitted(now)
        assert let_in == other.admitted(now) and asked.inflight == other.inflight
        for request, replica in let_in:
            key = request.rpartition(":")[0]
            held.remove(key)
            open_[key] = (open_[key][0], replica)
            if asked.stays(key):
                stays[key] = replica, 0
        out = asked.put_out()
        assert out == other.put_out() and asked.residents.metrics() == other.residents.metrics()
        for key in out:
            stays.pop(key, None)
    assert asked.counts == other.counts
    return told, sum(asked.residents.counts[why] for why in ("full", "rent"))


def test_a_conversation_stays_while_its_trajectory_lives_however_many_there_are():
    many = CACHE_SIZE + 500
    for observe in (False, True):
        mind = build(Options(observe, priority=Priority(enable=False), residents=Residents(enable=False), admission=Admission(per_slot=0)))
        stock = StickyLeastInflight(Random(0))
        for name in ("r0", "r1", "r2"):
            stock.add(name)
        homes: dict[int, str] = {}
        moved = 0
        for number in range(2):
            for sample in range(many):
                turn = TurnStart(identity(sample), f"c{sample}", number, 10, number)
                replica = mind.turn_started(turn, 0.0).replica
                mind.turn_finished(TurnEnd(turn.trajectory, turn.conversation, replica, number, 1), 0.0)
                expected, _ = stock.acquire(turn.conversation)
                stock.release(expected)
                if observe:
                    assert replica == expected, "stock's choice, though stock forgets"
                moved += homes.setdefault(sample, replica) != replica
        assert (moved > 0) == observe
        mind.homes_forgotten()
        for sample in range(many):
            mind.trajectory_ended(TrajectoryEnd(identity(sample), Outcome.FINISHED, 2, 2), 0.0)
        assert not mind._lives


def test_new_priorities_come_in_slices_predicted_together(monkeypatch):
    monkeypatch.setattr("verl_heddle.orchestrator.SLICE", 10)
    mind = build(Options.longest(admission=Admission(per_slot=0)))
    first = {}
    for sample in range(35):
        turn = TurnStart(identity(sample), f"c{sample}", 0, 10, 0)
        first[turn.request] = mind.turn_started(turn, 0.0).priority
    asked, many = [], mind.predictor.predict_many
    mind.predictor.predict_many = lambda keys: asked.append(len(keys)) or many(keys)
    mind.predictor.predict = None  # not one by one
    assert mind.refresh_due_s is None
    for sample in range(100, 108):
        who = identity(sample)
        mind.predictor.turn_started(TurnStart(who, "c", 0, 10, 0))
        mind.trajectory_ended(TrajectoryEnd(who, Outcome.FINISHED, 50_000, 1), 1.0)
    assert mind.refresh_due_s == float("-inf")
    told: dict[str, int] = {}
    while mind.refresh_due_s is not None:
        for table in mind.reprioritised(2.0).values():
            told |= table
    assert asked == [10, 10, 10, 5] and set(told) == set(first) and all(told[name] < first[name] - 100 for name in told)
    mind.trajectory_ended(TrajectoryEnd(identity(0), Outcome.FINISHED, 5, 1), 2.1)
    assert mind.refresh_due_s == 3.0 and mind.reprioritised(2.9) == {}, "once a second"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_a_time_that_is_no_time_was_not_measured(bad):
    def play(seconds: float | None) -> tuple[list, bytes]:
        mind, decisions = build(Options.longest()), []
        for sample in range(6):
            who = identity(sample)
            for number in range(3):
                turn = TurnStart(who, f"c{sample}", number, 100 * number, 50 * number, seconds if number == 1 else 2.0 * number or None)
                decisions.append(mind.turn_started(turn, 0.0))
                end = TurnEnd(who, f"c{sample}", decisions[-1].replica, number, 50, True, seconds if number == 1 else 1.0)
                mind.turn_finished(end, 0.0)
            mind.trajectory_ended(TrajectoryEnd(who, Outcome.FINISHED, 150, 3), 0.0)
        return decisions, mind.predictor.to_bytes()

    assert play(bad) == play(None)


def test_the_whole_length_counts_tools_that_have_run():
    mind = build(Options.longest(priority=Priority(order="longest", quantum_tokens=1)))

    def second(sample: int, tool_s: float) -> int:
        who = TrajectoryId(f"p{sample}", f"u{sample}", 0, 1)
        first = mind.turn_started(TurnStart(who, who.key, 0, 100, 0), 0.0)
        mind.turn_finished(TurnEnd(who, who.key, first.replica, 0, 1000, True, 100.0), 1.0)
        turn = TurnStart(who, who.key, 1, 1100, 1000, tool_s)
        lost = mind.turn_started(turn, 2.0)
        mind.turn_finished(TurnEnd(who, who.key, lost.replica, 1, 0, False), 3.0)
        again = mind.turn_started(replace(turn, leg=1), 4.0)
        assert again.priority == lost.priority, "counted once"
        return again.priority

    left = {tool_s: second(number, tool_s) for number, tool_s in enumerate((1.0, 1000.0))}
    assert left[1000.0] <= left[1.0] - 9000, "999 s at 0.1 s per token are 9,990 tokens"
