"""The preemption rule, checked law by law against brute force."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_heddle.schedule.preempt import (
    STARTS,
    WEIGHED,
    Objection,
    Plan,
    Room,
    Rule,
    Running,
    Waiting,
    aged,
    objection,
    order,
    preemptions,
    worst_first,
)

RULES = st.builds(
    Rule,
    margin=st.integers(1, 5),
    max_preemptions=st.integers(0, 3),
    min_steps=st.integers(0, 4),
    ageing_per_s=st.sampled_from([0.0, 0.1, 2.0]),
    tokens_per_unit=st.sampled_from([1, 64]),
    tokens_per_step=st.sampled_from([1, 100]),
)
ROOMS = st.builds(Room, slots=st.integers(-1, 3), blocks=st.integers(-2, 12), block_tokens=st.just(16), cached=st.booleans())


def held(blocks):
    """A running turn's blocks, counted when asked."""
    return lambda: blocks


PRIORITY, ARRIVAL = st.integers(-8, 8), st.integers(0, 20).map(float)


@st.composite
def cases(draw):
    """(running, waiting in the engine's order, room, rule)."""
    rule = draw(RULES)
    running = [
        Running(f"r{i}", draw(PRIORITY), draw(ARRIVAL), draw(st.integers(0, 6)), draw(st.integers(0, 3)), tokens, held(-(-tokens // 16)))
        for i, tokens in enumerate(draw(st.lists(st.integers(1, 90), max_size=5)))
    ]
    waiting = [
        Waiting(f"w{i}", draw(PRIORITY), draw(ARRIVAL), blocks) for i, blocks in enumerate(draw(st.lists(st.integers(1, 6), max_size=5)))
    ]
    return worst_first(running, rule), sorted(waiting, key=lambda turn: order(turn, rule)), draw(ROOMS), rule


def run(priority=0, arrival=0.0, steps=100, preemptions=0, tokens=40, blocks=3, key="r"):
    return Running(key, priority, arrival, steps, preemptions, tokens, held(blocks))


def wait(priority=-10, arrival=0.0, blocks=3, key="w"):
    return Waiting(key, priority, arrival, blocks)


FULL = Room(slots=0, blocks=100, block_tokens=16)
PLAIN = Rule(ageing_per_s=0.0)


@settings(max_examples=500, deadline=None)
@given(cases())
def test_every_pair_obeys_the_law_and_no_allowed_pair_is_left_out(case):
    running, waiting, room, rule = case
    plan = preemptions(running, waiting, room, rule)
    victims, winners = [v.key for v, _ in plan.pairs], [w.key for _, w in plan.pairs]
    assert len(set(victims)) == len(victims) and len(set(winners)) == len(winners)
    slots, free, spare, pairs, left = room.slots, room.blocks, room.blocks, dict(zip(winners, plan.pairs, strict=True)), list(running)
    stopped = short = False
    for turn in waiting:
        if turn.key not in pairs:
            if stopped:
                continue
            if slots > 0 and turn.blocks <= free:
                slots, free, spare = slots - 1, free - turn.blocks, max(0, spare - turn.blocks)
                continue
            no_slot = slots <= 0
            if no_slot:
                assert all(objection(v, turn, free, spare, room, rule) is not None for v in left), "somebody would have made way"
            stopped, short = True, not no_slot
            continue
        assert not stopped, "the winners are the first of the waiting order"
        victim, _ = pairs[turn.key]
        assert slots <= 0, "it has a slot: what it lacks is KV, or nothing"
        gain = victim.priority - turn.priority
        assert gain >= rule.margin >= 1
        assert aged(victim.priority, victim.arrival_s, rule.ageing_per_s) > aged(turn.priority, turn.arrival_s, rule.ageing_per_s)
        assert victim.preemptions < rule.max_preemptions and victim.steps >= rule.min_steps
        lost = victim.tokens if not room.cached else victim.tokens % 16 + 16 * max(0, turn.blocks - spare)
        assert gain * rule.tokens_per_unit > lost / rule.tokens_per_step
        for other in left:
            if order(other, rule) > order(victim, rule):
                assert objection(other, turn, free, spare, room, rule) is not None, "a worse one would have made way"
        left.remove(victim)
        free, spare = free + victim.blocks() - turn.blocks, max(0, spare - turn.blocks)
        assert free >= 0
    assert (plan.refused is not None) == (stopped and (bool(left) or short))
    assert (plan.refused is Objection.KV_SHORT) == short


@settings(max_examples=150, deadline=None)
@given(cases(), st.integers(1, 50))
def test_the_rule_comes_to_rest(case, between):
    """Ask again and again with the places exchanged: it ends, no pair is undone, nobody is thrown out more often than allowed."""
    running, waiting, room, rule = case
    runs, waits = {r.key: r for r in running}, {w.key: w for w in waiting}
    seen, lost = set(), dict.fromkeys([*runs, *waits], 0) | {r.key: r.preemptions for r in running}
    for _ in range(3 * len(lost) + 1):
        queue = sorted(waits.values(), key=lambda turn: order(turn, rule))
        plan = preemptions(worst_first(runs.values(), rule), queue, Room(0, room.blocks, 16, room.cached), rule)
        if not plan.pairs:
            break
        for victim, winner in plan.pairs:
            assert (winner.key, victim.key) not in seen, "an exchange was undone"
            seen.add((victim.key, winner.key))
            lost[victim.key] += 1
            assert lost[victim.key] <= rule.max_preemptions
            del runs[victim.key], waits[winner.key]
            waits[victim.key] = Waiting(victim.key, victim.priority, victim.arrival_s, victim.blocks())
            runs[winner.key] = Running(winner.key, winner.priority, winner.arrival_s, between, lost[winner.key], 20, held(winner.blocks))
    else:
        pytest.fail("still exchanging")


def test_slots_full_of_short_turns_and_a_long_one_comes():
    shorts = [run(priority=-i, arrival=float(i), key=f"r{i}") for i in range(4)]
    plan = preemptions(worst_first(shorts, PLAIN), [wait(priority=-50, arrival=9.0)], FULL, PLAIN)
    assert [(v.key, w.key) for v, w in plan.pairs] == [("r0", "w")]
    assert plan.refused is None


def test_the_worst_goes_first_and_among_equals_the_latest():
    running = [run(arrival=1.0, key="early"), run(arrival=2.0, key="late"), run(priority=-9, key="long")]
    plan = preemptions(worst_first(running, PLAIN), [wait(-20, key="a"), wait(-19, key="b"), wait(-10, key="c")], FULL, PLAIN)
    assert [(v.key, w.key) for v, w in plan.pairs] == [("late", "a"), ("early", "b")]
    assert plan.refused is Objection.MARGIN


@pytest.mark.parametrize(
    ("victim", "winner", "room", "why"),
    [
        (run(), wait(-PLAIN.margin + 1), FULL, Objection.MARGIN),
        (run(priority=-10), wait(-10), FULL, Objection.MARGIN),
        (run(preemptions=3), wait(), FULL, Objection.CAPPED),
        (run(steps=7), wait(), FULL, Objection.YOUNG),
        (run(blocks=1), wait(blocks=3), Room(0, 1, 16), Objection.NO_ROOM),
        (run(tokens=70_000), wait(-10), Room(0, 100, 16, cached=False), Objection.COST),
        (run(tokens=6400, blocks=400), wait(-4, blocks=1700), Room(0, 1400, 16), None),
        (run(tokens=64_000, blocks=4000), wait(-4, blocks=3300), Room(0, 1600, 16), Objection.COST),
    ],
)
def test_each_objection(victim, winner, room, why):
    plan = preemptions([victim], [winner], room, PLAIN)
    assert plan.refused is why
    assert bool(plan.pairs) == (why is None)


def test_a_turn_with_a_free_slot_preempts_nobody():
    assert preemptions([run()], [wait()], Room(1, 100, 16), PLAIN) == Plan()
    assert preemptions([run()], [wait()], Room(1, 2, 16), PLAIN) == Plan((), Objection.KV_SHORT)


def test_running_turns_are_not_looked_at_while_nobody_has_to_wait():
    def never():
        raise AssertionError
        yield

    assert preemptions(never(), [], FULL, PLAIN).pairs == ()
    assert preemptions(never(), [wait()], Room(1, 100, 16), PLAIN).pairs == ()


def many(number, blocks, **kwargs):
    """Equal running turns, and how many were read and weighed."""
    seen = {"read": 0, "weighed": 0}

    def weigh():
        seen["weighed"] += 1
        return blocks

    def turns():
        for i in range(number):
            seen["read"] += 1
            yield run(key=f"r{i}", **kwargs)._replace(blocks=weigh)

    return turns(), seen


def test_a_step_has_few_victims_however_many_win():
    """1,024 running turns, 3,072 better ones waiting: no more are thrown out than could start."""
    running, seen = many(1024, blocks=3)
    plan = preemptions(running, [wait(-50, key=f"w{i}") for i in range(3072)], FULL, PLAIN)
    assert len(plan.pairs) == STARTS and plan.refused is None
    assert seen["read"] == STARTS


def test_who_starts_by_himself_counts_as_well():
    running, _ = many(1024, blocks=3)
    plan = preemptions(running, [wait(-50, key=f"w{i}") for i in range(3072)], Room(STARTS - 1, 100, 16), PLAIN)
    assert len(plan.pairs) == 1


@pytest.mark.parametrize(
    ("turns", "room", "why", "read", "weighed"),
    [
        ({"priority": -9}, FULL, Objection.MARGIN, 1, 0),
        ({"steps": 7}, FULL, Objection.YOUNG, 1024, 0),
        ({"preemptions": 3}, FULL, Objection.CAPPED, 1024, 0),
        ({}, Room(0, 1, 16), Objection.NO_ROOM, WEIGHED, WEIGHED),
    ],
)
def test_a_refusal_is_cheap(turns, room, why, read, weighed):
    """Of 1,024 running turns: those within the margin are not read, and few have their blocks counted."""
    running, seen = many(1024, blocks=1, **turns)
    plan = preemptions(running, [wait(key=f"w{i}") for i in range(3072)], room, PLAIN)
    assert (plan.pairs, plan.refused) == ((), why)
    assert seen == {"read": read, "weighed": weighed}


def test_ageing_orders_the_queue_shields_the_running_and_takes_no_place_by_itself():
    rule = Rule(ageing_per_s=1.0)
    old_short, new_long = wait(priority=0, arrival=0.0, key="old"), wait(priority=-20, arrival=30.0, key="new")
    assert order(old_short, rule) < order(new_long, rule), "overtaken for 20 s only"
    assert order(wait(priority=-20, arrival=10.0), rule) < order(old_short, rule)
    assert preemptions([run(priority=0, arrival=0.0)], [new_long], FULL, rule).refused is Objection.MARGIN
    assert preemptions([run(priority=-1, arrival=100.0)], [wait(priority=0, arrival=0.0)], FULL, rule).refused is Objection.MARGIN


def test_settings_by_name():
    assert Rule.of({"margin": 2, "ageing_per_s": 0}) == Rule(margin=2, ageing_per_s=0)
    for wrong in ({"margin": 0}, {"margin": 1.5}, {"margin": "1"}, {"margin": True}, {"nonsense": 1}, {"tokens_per_step": 0}):
        with pytest.raises(ValueError):
            Rule.of(wrong)
