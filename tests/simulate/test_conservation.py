"""What must hold whatever a policy does: nothing is lost, nothing is exceeded, and chance comes from seeds only."""

from dataclasses import replace

import numpy as np
import pytest
from drawn import examples
from hypothesis import given
from hypothesis import strategies as st
from simulate_cases import FULL, Anything, trajectory, workloads

from verl_heddle.fleet import Replica
from verl_heddle.options import Options
from verl_heddle.orchestrator import Orchestrator
from verl_heddle.schedule.preempt import Rule
from verl_heddle.simulate import EngineOptions, FleetChange, Outage, simulate
from verl_heddle.simulate.baselines import Slime
from verl_heddle.simulate.engine import Engine
from verl_heddle.traces import generate

ENGINES = st.builds(
    EngineOptions,
    order=st.just("priority"),
    batch_tokens=st.sampled_from([None, 8, 40]),
    block_tokens=st.sampled_from([1, 16]),
    prefix_cache=st.booleans(),
    share_prompts=st.booleans(),
    preempt=st.sampled_from([None, Rule(margin=1, ageing_per_s=0.0), Rule(margin=3, min_steps=0), Rule(margin=2, max_preemptions=1)]),
    turn_overhead_s=st.sampled_from([0.0, 0.0131]),
) | st.builds(EngineOptions, batch_tokens=st.sampled_from([None, 8, 40]), share_prompts=st.booleans())


def watch(monkeypatch):
    """Make every engine check itself after every boundary."""
    begin, finish = Engine.begin, Engine.finish

    def check(self):
        cache, running = self.cache, list(self.running)
        decoding = [r for r in running if not r.owed]
        assert len(running) <= self.replica.slots
        assert self.decoding == len(decoding) and len(self.backlog) == len(running) - len(decoding)
        assert self.context_sum == sum(r.context + r.left - (r.ends - self.step) for r in decoding)
        own = sum(r.context - r.shared for r in running) + sum(r.left - (r.ends - self.step) for r in decoding)
        shared = {r.trajectory.group: r.shared for r in running if r.shared}
        assert cache.in_use == own + sum(shared.values())
        assert cache.held >= 0 and cache.held == sum(cache._free.values())

    def checked_begin(self):
        begin(self)
        check(self)
        limit = self.cache.capacity
        if limit is not None:
            last = self.cache.in_use + max(0, self.ahead - 1) * self.decoding
            assert last <= limit  # KV stored by the last of the steps taken at once
            assert self.cache.in_use + self.cache.held <= limit

    def checked_finish(self):
        done = finish(self)
        check(self)
        return done

    monkeypatch.setattr(Engine, "begin", checked_begin)
    monkeypatch.setattr(Engine, "finish", checked_finish)


def needed(work) -> int:
    return max(t.prompt_tokens + sum(s.input_tokens + s.output_tokens for s in t.steps) for t in work)


@examples(70)
@given(workloads(), ENGINES, st.integers(1, 3), st.integers(1, 5), st.one_of(st.none(), st.integers(0, 150)), st.integers(0, 9))
def test_nothing_is_lost_or_exceeded(work, engine, replicas, slots, spare, seed):
    with pytest.MonkeyPatch.context() as patch:
        watch(patch)
        capacity = None if spare is None else needed(work) + spare
        policy = Anything(seed, prewarms=True)
        result = simulate(work, [Replica(f"r{i}", 1, slots, capacity) for i in range(replicas)], FULL, policy, engine=engine)
    assert result.output_tokens.tolist() == [item.output_tokens for item in work]
    assert policy.started == policy.finished == sum(len(item.steps) for item in work) == len(result.turns)
    assert not policy.open and set(policy.ended.values()) == {"finished"} and len(policy.ended) == len(work)
    parts = result.queue_s + result.prefill_s + result.generate_s + result.tool_s + result.other_s
    assert parts == pytest.approx(result.finish_s - result.start_s, rel=1e-9)
    assert (result.turns.column("cached_tokens") >= 0).all()
    for replica in result.replicas:
        assert all(a < b for a, b in replica.busy) and all(a[1] <= b[0] for a, b in zip(replica.busy, replica.busy[1:], strict=False))
        assert 0 <= replica.recomputed_tokens <= replica.prefilled_tokens


@examples(70)
@given(workloads(), ENGINES, st.integers(0, 99), st.floats(0.01, 1.0), st.booleans())
def test_cancelled_and_reshuffled(work, engine, seed, when, keep):
    """Early stops, pre-warms, an outage and a reshard in the middle: the protocol still holds, and every trajectory ends once."""
    fleet = [Replica("a", 1, 2), Replica("b", 2, 3)]
    changes = [
        Outage("a", when / 2, when, keep_cache=keep),
        FleetChange(when, remove=("b",), add=(Replica("c", 1, 2), Replica("d", 4, 1)), ready_s=when * 1.5),
    ]
    policy = Anything(seed, cancels=True, prewarms=True)
    result = simulate(work, fleet, FULL, policy, engine=engine, changes=changes)
    assert not policy.open and policy.started == policy.finished and len(policy.ended) == len(work)
    asked = np.array([item.output_tokens for item in work])
    finished = np.array([outcome == "finished" for outcome in result.outcomes])
    assert (result.output_tokens[finished] == asked[finished]).all() and (result.output_tokens <= asked).all()
    parts = result.queue_s + result.prefill_s + result.generate_s + result.tool_s + result.other_s
    assert parts == pytest.approx(result.finish_s - result.start_s, rel=1e-6, abs=1e-9)


def test_same_seed_same_result():
    work = generate("coding", 12, 8, seed=3)
    fleet = [Replica(f"r{i}", 1, 8, 200_000) for i in range(4)]

    def run(seed):
        orchestrator = Orchestrator(Options(seed=seed))
        result = simulate(work, fleet, FULL, orchestrator, engine=EngineOptions("priority"), spread_s=3.0, seed=seed)
        assert set(orchestrator.inflight.values()) == {0}
        return result

    first, again, other = run(1), run(1), run(2)
    assert (first.finish_s == again.finish_s).all() and first.summary() == again.summary()
    assert (first.finish_s != other.finish_s).any()


def test_a_policy_can_be_used_for_the_next_step():
    work = _small()
    policy = Orchestrator(Options.longest())
    fleet = [Replica("a"), Replica("b")]
    first = simulate(work, fleet, FULL, policy)
    second = simulate(work, fleet, FULL, policy, step=1)
    assert first.tokens == second.tokens
    told = second.turns.column("predicted_remaining")
    assert not np.isnan(told).any()  # what step 0 taught


def _small():
    return [trajectory("p", i, [(0, 5 + i, 0.1), (3, 7, 0.0)]) for i in range(4)]


def test_least_loaded_keeps_replicas_level():
    work = _small()
    peer = Slime()
    simulate(work, [Replica("a"), Replica("b")], FULL, peer)
    assert (peer.loads["a"], peer.loads["b"], peer.loads.most) == (0, 0, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": ()}, "no turns"),
        ({"prompt_tokens": None}, "prompt_tokens"),
        ({"prompt_tokens": 0}, "prompt_tokens"),
    ],
)
def test_bad_trajectories(change, message):
    with pytest.raises(ValueError, match=message):
        simulate([replace(_small()[0], **change)], [Replica("a")], FULL, Slime())


def test_bad_input():
    work, fleet = _small(), [Replica("a")]
    with pytest.raises(ValueError, match="no trajectories"):
        simulate([], fleet, FULL, Slime())
    with pytest.raises(ValueError, match="fleet is empty"):
        simulate(work, [], FULL, Slime())
    with pytest.raises(ValueError, match="both trial"):
        simulate([work[0], work[0]], fleet, FULL, Slime())
    with pytest.raises(ValueError, match="named 'a'"):
        simulate(work, [Replica("a"), Replica("a")], FULL, Slime())
    with pytest.raises(ValueError, match="holds 20"):
        simulate(work, [Replica("a", kv_tokens=20)], FULL, Slime())
    with pytest.raises(ValueError, match="below its 256 slots"):
        simulate(work, fleet, FULL, Slime(), engine=EngineOptions(batch_tokens=100))
    with pytest.raises(ValueError, match="not in the fleet"):
        simulate(work, fleet, FULL, Slime(), changes=[Outage("b", 0.0, 1.0)])
    with pytest.raises(ValueError, match="arrivals_s"):
        simulate(work, fleet, FULL, Slime(), arrivals_s=[0.0])
    with pytest.raises(ValueError, match="output_tokens"):
        simulate([trajectory("p", 0, [(0, 0, 0.0)])], fleet, FULL, Slime())
    for bad in ({"order": "lifo"}, {"batch_tokens": 0}, {"preempt": Rule()}, {"turn_overhead_s": -1.0}, {"block_tokens": 0}):
        with pytest.raises(ValueError):
            EngineOptions(**bad)
