"""Each peer's law over programs, event by event."""

from math import log

import numpy as np
import pytest

from verl_heddle.fleet import Replica
from verl_heddle.simulate.baselines import Continuum, Lfs, ThunderAgent, UniBoost, WaveAdmission
from verl_heddle.simulate.baselines.continuum import memory, time_to_live
from verl_heddle.simulate.baselines.programs import Programs
from verl_heddle.simulate.baselines.uniboost import GAMMA_PER_S, boost_s
from verl_heddle.simulate.baselines.wave_admission import Growth
from verl_heddle.trajectory import Outcome, ToolStart, TrajectoryEnd, TrajectoryId, TurnEnd, TurnStart


class Step:
    """Events by hand. A trajectory is `<group>.<sample>`; `at` says in which replica its turn runs."""

    def __init__(self, policy, kv=1000, replicas=1, slots=8):
        self.policy, self.turn, self.context, self.at = policy, {}, {}, {}
        policy.replicas_added([Replica(f"r{i}", 1, slots, kv) for i in range(replicas)])

    def identity(self, name):
        group, _, sample = name.partition(".")
        return TrajectoryId(group, group, int(sample or 0), 0)

    def start(self, name, new=0, now=0.0, tool_s=None):
        who = self.identity(name)
        self.turn[name] = self.turn.get(name, -1) + 1
        self.context[name] = self.context.get(name, 0) + new
        decision = self.policy.turn_started(TurnStart(who, who.key, self.turn[name], self.context[name], 0, tool_s), now)
        if not decision.held:
            self.at[name] = decision.replica
        self.look(now)
        return decision

    def finish(self, name, tokens=0, now=0.0):
        who = self.identity(name)
        self.context[name] += tokens
        self.policy.turn_finished(TurnEnd(who, who.key, self.at.pop(name), self.turn[name], tokens), now)
        self.look(now)

    def end(self, name, now=0.0):
        self.policy.trajectory_ended(TrajectoryEnd(self.identity(name), Outcome.FINISHED, 0, 0), now)
        self.look(now)

    def over(self, name, tokens, now=0.0):
        """Its last turn is over: what the simulator does in one instant."""
        self.finish(name, tokens, now)
        self.end(name, now)
        if self.policy.due_s(now) <= now:
            self.tick(now)

    def tick(self, now):
        self.policy.tick(now)
        self.look(now)

    def look(self, now):
        names = {f"{self.identity(name).key}:{turn}": name for name, turn in self.turn.items()}
        if isinstance(self.policy, Programs):
            self.at |= {names[request]: replica for request, replica in self.policy.admitted(now)}


def test_thunder_agent_pauses_the_smallest_in_a_tool_first_every_five_seconds():
    step = Step(ThunderAgent())
    for name, context in (("small", 50), ("middle", 100), ("large", 200)):
        step.start(name, context)
    step.finish("small", 10)
    step.finish("middle", 300)
    policy = step.policy
    assert policy.due_s(0.0) == 5.0
    step.tick(5.0)
    assert policy.live["small_0"].home == "r0", "60 + 400 + 200 + 3 * 100 fits"
    step.start("middle", 50)
    step.finish("middle")
    step.tick(9.9)
    assert policy.live["small_0"].home == "r0", "nothing happens between two checks"
    step.tick(10.0)
    assert policy.live["small_0"].home is None and policy.live["middle_0"].home == "r0", "710 + 300: one of 60 + 100 is enough"
    assert step.start("small", now=11.0).held and step.start("new", 10, now=11.0).held, "who is paused waits, and new ones after it"
    assert step.start("middle", now=11.0).replica == "r0", "the others go on, whatever is used"


def test_thunder_agent_marks_those_in_a_turn_and_pauses_them_when_it_ends():
    step = Step(ThunderAgent())
    for name, context in (("small", 100), ("large", 500)):
        step.start(name, context)
    step.finish("large", 300)
    step.start("large", 200)
    step.tick(5.0)
    policy = step.policy
    assert policy.counts["marked"] == 2 and set(step.at) == {"small", "large"}, "marking frees nothing at once"
    step.finish("small", 10)
    assert policy.live["small_0"].home is None and policy.live["large_0"].home == "r0"


def test_thunder_agent_resumes_who_waits_before_new_ones_before_those_in_tools():
    step = Step(ThunderAgent())
    step.start("large", 500)
    for name in ("tool", "back"):
        step.start(name, 1)
    assert step.start("new", 450).held
    for name in ("tool", "back"):
        step.finish(name, 400)
    step.tick(5.0)
    assert step.policy.counts["paused"] == 2 and step.start("back", now=6.0).held
    step.finish("large")
    step.end("large")
    assert not step.at, "room is given away every five seconds only"
    step.tick(10.0)
    assert set(step.at) == {"back"} and step.policy.live["tool_0"].home is None, "501 of 1000; 501 or 550 more do not fit"
    step.over("back", 0)
    step.tick(15.0)
    assert set(step.at) == {"new"} and step.policy.live["tool_0"].home is None


def test_thunder_agent_forgets_tools_with_decay():
    for decay, held in ((False, True), (True, False)):
        step = Step(ThunderAgent(decay=decay))
        step.start("long", 700)
        step.finish("long")
        assert step.start("new", 300).held
        step.tick(5.0)
        assert ("new" not in step.at) is held


def test_continuum_holds_for_the_time_that_pays():
    assert time_to_live([], 0.5) == 0.0 and time_to_live([9.0] * 100, 3.0) == pytest.approx(log(3.0)), "the prior, up to 100 calls"
    calls = sorted([1.0] * 80 + [10.0] * 40)
    assert time_to_live(calls, 6.0) == 1.0 and time_to_live(calls, 60.0) == 10.0 and time_to_live(calls, 1.0) == 0.0
    draws = np.sort(np.random.default_rng(0).lognormal(size=200)).tolist()
    gains = {tau: sum(one <= tau for one in draws) / 200 * 4.0 - tau for tau in (0.0, *draws)}
    assert time_to_live(draws, 4.0) == max(gains, key=lambda tau: (round(gains[tau], 9), -tau))


def test_continuum_knows_how_much_turns_tell():
    for turns in ([4, 4, 7], [2, 9, 3, 3]):
        pairs = np.array([(k, number - k) for number in turns for k in range(1, number)])
        assert memory(turns) == pytest.approx(-np.corrcoef(pairs.T)[0, 1])
    assert memory([]) == memory([1, 1]) == memory([2]) == 0.0


class Reading:
    """A latency with a reload cost: 0.01 s a token."""

    def prefill_s(self, tp, new_tokens, context_tokens=0):
        return 0.01 * new_tokens


def continuum(**kwargs):
    policy = Continuum()
    policy.latency_known(Reading())
    return Step(policy, **kwargs)


def test_continuum_keeps_a_context_through_a_tool_and_lets_its_turn_in_first():
    step = continuum()
    step.start("other", 50)
    step.start("held", 600)
    assert step.start("early", 500).held
    step.finish("held", 100)
    policy = step.policy
    assert policy.pins["held_0"] == pytest.approx(log(7.0)) and "early" not in step.at, "held while its pin lasts"
    step.start("held", 50, now=1.0)
    assert "held" in step.at
    step.finish("held", now=2.0)
    assert policy.due_s(2.0) == pytest.approx(2.0 + log(7.5))
    step.tick(5.0)
    assert "early" in step.at and policy.released(5.0) == [("held_0", "r0")]
    assert step.start("held", now=6.0).held, "its pin ran out"
    step.finish("early", 10, now=9.0)
    step.end("early", now=9.0)
    assert "held" in step.at and list(policy._waits) == [3.0], "the wait of who was evicted is learned"


def test_continuum_lets_the_pinned_in_before_earlier_programs():
    step = continuum()
    for name, context in (("other", 50), ("a", 400), ("b", 500)):
        step.start(name, context)
    step.finish("a")
    step.tick(100.0)
    assert step.start("c", 420, now=100.0).replica == "r0" and step.start("a", now=101.0).held
    step.finish("b", now=102.0)
    assert step.start("b", now=102.1).replica == "r0"


def test_continuum_is_first_come_first_served_by_program():
    step = continuum()
    step.start("big", 900)
    for name in ("first", "second"):
        step.start(name, 400)
    step.finish("big")
    step.tick(100.0)
    assert list(step.at) == ["first", "second"]
    assert step.start("big", now=101.0).held and step.start("third", 10, now=102.0).held, (
        "the earlier program first, though it does not fit"
    )
    step.finish("first", now=103.0)
    step.end("first", now=103.0)
    step.finish("second", now=104.0)
    step.end("second", now=104.0)
    assert step.at == {"big": "r0", "third": "r0"}


def test_continuum_gives_up_the_latest_pin_where_nothing_runs():
    step = continuum()
    for name in ("a", "b"):
        step.start(name, 400)
        step.finish(name)
    step.start("c", 500)
    assert step.at == {"c": "r0"} and set(step.policy.pins) == {"a_0"}


def test_continuum_pins_by_the_tool():
    step = continuum()
    policy = step.policy
    policy._calls[""].extend([1.0] * 200)
    policy._calls["slow"].extend([8.0] * 200)
    policy._turns.extend([3, 4])
    step.start("a", 900)
    step.finish("a", now=1.0)
    assert policy.pins["a_0"] == 2.0
    policy.tool_started(ToolStart(step.identity("a"), "slow"), 1.0)
    assert policy.pins["a_0"] == 9.0
    step.start("a", now=9.5, tool_s=8.5)
    assert policy._calls["slow"][-1] == policy._calls[""][-1] == 8.5


def test_wave_admission_asks_for_room_beside_expected_growth():
    step = Step(WaveAdmission(guess_tokens=300, first_wave=1), replicas=2)
    assert [step.start(name, 100).replica for name in ("a", "b", "c", "d")] == ["r0", "r1", "r0", "r1"], "1000 - 400 >= 100 each"
    assert step.start("e", 201).held and not step.start("f", 200).held, "200 are free on either"
    step.finish("a", 40)
    assert step.start("a", 100).replica == "r0", "who is in stays, though it does not fit"
    step.tick(59.0)
    assert "e" not in step.at
    step.tick(60.0)
    assert "e" in step.at, "after a minute without asking"


def test_wave_admission_moves_only_for_a_large_deficit():
    step = Step(WaveAdmission(guess_tokens=0), replicas=2)
    step.start("a", 450)
    step.start("b", 50)
    step.policy.place(step.policy.live["b_0"], "r0", 0.0)
    step.at["b"] = "r0"
    step.finish("a", 500)
    step.finish("b")
    assert step.start("a", 40).replica == "r0", "40 too many are not worth reading 990 again"
    assert step.start("b").replica == "r0", "40 are less than its 50"
    step.finish("b")
    step.finish("a", 30)
    assert step.start("b").replica == "r1", "70 are more, and there is room"


def test_wave_admission_learns_growth_by_size():
    growth = Growth(1000.0)
    assert growth.expected(100) == 1000.0
    for grown in (100, 300):
        growth.observe(100, grown)
    assert growth.expected(70) == pytest.approx((15 * 1000 + 400) / 17 + 1.5 * np.std([100, 300], ddof=1))
    assert growth.expected(200) == 1000.0, "another power of two"


def test_wave_admission_sends_a_leader_first_then_the_longest():
    step = Step(WaveAdmission(guess_tokens=0, first_wave=0))
    step.start("a.0", 500)
    assert step.start("a.1", 10).held, "its leader has not been there"
    assert step.start("b.0", 510).held and step.start("c.0", 520).held
    step.finish("a.0", 100)
    step.tick(0.5)
    assert list(step.at) == ["a.1"], "its leader has, and nobody else fits"
    step.end("a.0")
    step.tick(1.0)
    assert list(step.at) == ["a.1", "c.0"], "the longest first"


def test_lfs_probes_every_group_before_anybody_else():
    step = Step(Lfs(), kv=None, slots=2)
    for name in ("a.0", "a.1", "a.2", "b.0"):
        step.start(name, 10)
    assert list(step.at) == ["a.0", "a.1"]
    step.start("c.0", 10)
    step.over("a.1", 5)
    assert list(step.at) == ["a.0", "b.0"], "b has not been probed"
    step.over("b.0", 5)
    assert list(step.at) == ["a.0", "c.0"]


def test_lfs_fills_unknown_groups_least_sampled_first():
    step = Step(Lfs(), kv=None, slots=3)
    for name in ("a.0", "a.1", "a.2", "a.3", "b.0", "b.1"):
        step.start(name, 10)
    step.over("a.2", 5)
    assert set(step.at) == {"a.0", "a.1", "b.0"}
    step.over("a.1", 5)
    assert set(step.at) == {"a.0", "b.0", "b.1"}, "a.3 came first, but a has been sampled three times"


def test_lfs_orders_known_groups_by_their_longest_finished_sample():
    step = Step(Lfs(), kv=None, slots=3)
    names = [f"{group}.{sample}" for sample in range(4) for group in "abc"]
    for name in names:
        step.start(name, 10)
    assert list(step.at) == ["a.0", "b.0", "c.0"]
    step.over("a.0", 50)
    assert "b.1" in step.at, "an unknown group counts as longest"
    step.over("b.0", 70)
    assert "c.1" in step.at, "known is not unknown: b has been sampled twice, c once"
    step.over("c.1", 500)
    assert "c.2" in step.at, "only the probe reveals a group"
    step.over("c.0", 20)
    assert "b.2" in step.at, "b 70, a 50, c 20"
    step.over("c.2", 60)
    assert "b.3" in step.at and step.policy._longest == {"a": 50, "b": 70, "c": 60}


def test_lfs_keeps_a_turn_with_its_replica_unless_told_otherwise():
    for sticky, where in ((True, "r0"), (False, "r1")):
        step = Step(Lfs(sticky=sticky), kv=None, replicas=2, slots=2)
        for name in ("a", "b", "c"):
            step.start(name, 10)
        assert step.at == {"a": "r0", "b": "r1", "c": "r0"}
        step.finish("a", 5)
        step.finish("b", 5)
        step.start("a", 5)
        assert step.at["a"] == where


def test_uniboost_puts_short_reads_forward_and_bounds_how_far():
    assert boost_s(100) > boost_s(1000) > boost_s(100_000) == pytest.approx(0.0, abs=1e-6)
    assert boost_s(1) == boost_s(0) == pytest.approx(-log(GAMMA_PER_S * 64e-6) / GAMMA_PER_S, rel=1e-3), "nobody starves"
    step = Step(UniBoost(), kv=None)
    long, short = step.start("long", 20_000, now=1.0), step.start("short", 100, now=1.2)
    assert short.priority < long.priority < step.start("late", 100, now=2.0).priority
    step.finish("long", 10, now=3.0)
    assert step.start("long", 90, now=4.0).priority == round(1e6 * (4.0 - boost_s(90))), "what is cached is not read"


def test_uniboost_forgets_what_the_cache_cannot_hold():
    step = Step(UniBoost(), kv=1000)
    step.start("a", 600)
    step.finish("a", 0)
    step.start("b", 500)
    assert step.start("a", 10, now=1.0).priority == round(1e6 * (1.0 - boost_s(610)))
