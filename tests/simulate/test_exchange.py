"""Preemption on arrival in the simulated engine is the law of `schedule.preempt`, the one that the plugin's scheduler asks."""

from random import Random

import pytest
from simulate_cases import FLAT, lengths, trajectory

from verl_heddle.fleet import Replica
from verl_heddle.options import Options
from verl_heddle.report.play import preempt_rule
from verl_heddle.schedule import preempt
from verl_heddle.schedule.preempt import Rule
from verl_heddle.simulate import EngineOptions, simulate
from verl_heddle.simulate import slots as module
from verl_heddle.simulate.baselines import Stock
from verl_heddle.simulate.engine import Engine
from verl_heddle.simulate.workload import Request, states
from verl_heddle.trajectory import Decision, Reason

RULES = [Rule(margin=1, min_steps=0, ageing_per_s=0.0), Rule(margin=2, max_preemptions=1), Rule(margin=4, tokens_per_step=0.5)]


def crowded(seed: int, rule: Rule, capacity: int | None) -> Engine:
    """An engine in the middle of something: some run for a while, some have just begun, some wait."""
    rng = Random(seed)
    options = EngineOptions("priority", preempt=rule, block_tokens=rng.choice([1, 16]), batch_tokens=None)
    work = states([trajectory(f"p{k % 5}", k, [(0, 400, 0.0)], rng.randint(20, 90)) for k in range(24)], options, 0)
    engine = Engine(Replica("r", slots=8, kv_tokens=capacity), FLAT, options, 0)
    for number, state in enumerate(work):
        request = Request(state, state.context, 400, 0)
        request.priority, request.arrival_s, request.order = rng.randint(-12, 0), engine.at_s, number
        request.rank = preempt.aged(request.priority, request.arrival_s, rule.ageing_per_s)
        request.yielded = rng.choice([0, 0, 0, rule.max_preemptions])
        engine.submit(request, engine.at_s)
        for _ in range(rng.choice([0, 1, 3])):
            engine.finish()
            engine.begin()
    return engine


def described(engine: Engine):
    """Everything that the law asks about, from everybody: nothing is left out for speed."""
    cache, block = engine.cache, engine.cache.block
    running = preempt.worst_first(map(engine._as_running, engine.running), engine.options.preempt)
    queue = sorted((item[3] for item in engine.queue._heap if item[3].waiting), key=lambda r: (r.rank, r.arrival_s, r.order))
    waiting = [preempt.Waiting(str(r.order), r.priority, r.arrival_s, -(-cache.need(r) // block)) for r in dict.fromkeys(queue)]
    free = module.UNLIMITED if cache.capacity is None else (cache.capacity - cache.in_use - engine.decoding) // block
    return running, waiting, preempt.Room(engine.replica.slots - len(engine.running), free, block)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("capacity", [None, 1200, 2500])
def test_the_engine_exchanges_whom_the_law_says(rule, capacity):
    exchanged = 0
    for seed in range(60):
        engine = crowded(seed, rule, capacity)
        if not engine.queue.count:
            continue
        running, waiting, room = described(engine)
        said = preempt.preemptions(running, waiting, room, rule).pairs
        by_ticket = {str(request.ticket): request for request in engine.running}
        expected = [by_ticket[loser.key] for loser, _ in said]
        queued = engine.queue.count
        victims, _ = engine.exchange()
        assert victims == expected
        assert engine.queue.count == queued  # victims come back when the step has begun
        exchanged += len(victims)
    assert exchanged > 0 or capacity == 1200  # where KV is that short, slots are hardly ever full


class ByTrial(Stock):
    def turn_started(self, turn, now):
        return Decision(super().turn_started(turn, now).replica, -10 * turn.trajectory.sample, Reason.STICKY)


def test_a_turn_pays_back_its_prefill_first():
    """The better turn comes at once; it gets the slot after eight steps, though nothing happens then."""
    work = [trajectory("p", rank, [(0, 50, 0.0)], 1) for rank in (0, 1)]
    options = EngineOptions("priority", preempt=Rule(ageing_per_s=0.0))
    result = simulate(work, [Replica("r", slots=1)], module_step(), ByTrial(), engine=options, arrivals_s=[0.0, 1.5])
    assert result.finish_s.tolist() == [100.0, 8.0 + 50.0]


def test_nobody_makes_way_for_want_of_kv_while_a_slot_is_free():
    work = [*lengths(60, prompt_tokens=40), trajectory("q", 1, [(0, 20, 0.0)], 30)]
    options = EngineOptions("priority", preempt=Rule(min_steps=0, ageing_per_s=0.0), block_tokens=1, share_prompts=False)
    result = simulate(work, [Replica("r", slots=4, kv_tokens=100)], module_step(), ByTrial(), engine=options, arrivals_s=[0.0, 40.5])
    assert result.preemptions == 0
    result = simulate(work, [Replica("r", slots=1, kv_tokens=100)], module_step(), ByTrial(), engine=options, arrivals_s=[0.0, 40.5])
    assert result.preemptions == 1 and result.finish_s.argmin() == 1


def test_what_costs_more_than_it_gains_is_left():
    work = [*lengths(60, prompt_tokens=40), trajectory("q", 1, [(0, 20, 0.0)], 30)]
    dear = Rule(min_steps=0, ageing_per_s=0.0, tokens_per_step=1e-3)
    options = EngineOptions("priority", preempt=dear, block_tokens=1, share_prompts=False)
    result = simulate(work, [Replica("r", slots=1, kv_tokens=100)], module_step(), ByTrial(), engine=options, arrivals_s=[0.0, 40.5])
    assert result.preemptions == 0


def test_the_law_gets_the_options_as_in_a_run():
    options = Options()
    options.preempt.margin, options.preempt.min_steps = 7, 3
    assert preempt_rule(options) == Rule(margin=7, min_steps=3)


def module_step():
    """One second a step."""
    from verl_heddle.latency.model import LatencyModel

    return LatencyModel.affine(1.0)
