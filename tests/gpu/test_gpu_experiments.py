"""What the experiments are made of, without engines: shapes, points, policies, forecasts, and the player against a made-up engine."""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from bench.gpu import one, replay, shapes, versus
from bench.gpu.engines import Answer, words
from bench.gpu.experiments import endtoend, fidelity, place, schedule, shape, tau
from bench.gpu.profiles import PROFILES
from verl_heddle.fleet import Replica
from verl_heddle.simulate import Prewarm, simulate
from verl_heddle.simulate.baselines import Stock
from verl_heddle.traces import generate
from verl_heddle.trajectory import Outcome, Trajectory, TrajectoryEnd, TrajectoryId, Turn, TurnStart

REHEARSAL = PROFILES["rehearsal"]()
H200 = PROFILES["h200"]()


@pytest.mark.parametrize(("name", "billions"), [("Qwen3-0.6B", 0.596), ("Qwen3-4B", 4.02), ("Qwen3-8B", 8.19)])
def test_shapes_have_the_sizes_of_their_names(name, billions):
    assert shapes.QWEN3[name].parameters / 1e9 == pytest.approx(billions, rel=0.005)


def test_the_8b_shape_is_the_tables():
    memory = H200.prior().engines[1].memory
    shape8 = shapes.QWEN3["Qwen3-8B"]
    assert memory.kv_bytes_per_token == shape8.kv_bytes_per_token
    assert memory.weight_bytes == pytest.approx(2 * shape8.parameters, rel=0.01)
    assert memory.kv_tokens(H200.memory_share) > H200.tau_kv_tokens  # what tau asks for fits the card


def test_ending_ids_make_the_mean_length():
    ids = shapes.ending_ids(shapes.QWEN3["Qwen3-0.6B"], 600)
    assert len(ids) / shapes.VOCABULARY == pytest.approx(1 / 600, rel=0.01)
    assert shapes.VOCABULARY - 2 not in ids and shapes.VOCABULARY - 1 in ids  # the padding id ends nothing
    with pytest.raises(ValueError):
        shapes.ending_ids(shapes.TINY, 1)


def test_points_fit_the_cache():
    for profile in (REHEARSAL, H200):
        made = tau.points(profile)
        assert len(made) == len(set(made))
        assert all(batch * (context + profile.tau_tokens) <= profile.tau_kv_tokens for batch, context in made)
        assert {1} <= {batch for batch, _ in made} and {context for _, context in made} == set(profile.tau_contexts)
    assert max(batch for batch, _ in tau.points(H200)) == 256 and (1, 32_768) in tau.points(H200)


def test_every_trajectory_fits_its_engine():
    """Neither the model's context nor the KV cache of a replica is too short for the longest."""
    for profile in (REHEARSAL, H200):
        for scenario in (profile.schedule, profile.place, profile.shape_):
            for seed in scenario.seeds:
                for item in generate(scenario.workload, scenario.prompts, scenario.samples + scenario.spare, seed):
                    most = (item.prompt_tokens or 0) + sum((turn.input_tokens or 0) + (turn.output_tokens or 0) for turn in item.steps)
                    assert most < min(profile.max_model_len, scenario.kv_tokens)


def test_words_depend_on_their_key_only():
    assert words("a", 20, 1280) == words("a", 20, 1280) != words("b", 20, 1280)
    assert all(0 <= one < 1280 for one in words("a", 500, 1280))


def test_predictions_name_each_row_once():
    for name in one.NAMES:
        rows = one.experiment(name).predict(REHEARSAL).rows
        assert len({row.name for row in rows}) == len(rows) > 0
        assert all(row.measured is None for row in rows)


def ended(sample: int, outcome: Outcome = Outcome.FINISHED) -> TrajectoryEnd:
    return TrajectoryEnd(TrajectoryId("p", "g", sample, 0), outcome, 5, 1)


def test_enough_samples_cancel_the_others_once():
    policy = shape.FirstEnough(2)
    policy.replicas_added([Replica("r")])
    for sample in range(4):
        who = TrajectoryId("p", "g", sample, 0)
        policy.turn_started(TurnStart(who, who.key, 0, 10, 0), 0.0)
    assert policy.trajectory_ended(ended(2), 1.0) == []
    assert [cancel.trajectory for cancel in policy.trajectory_ended(ended(0), 2.0)] == ["g_1", "g_3"]
    assert policy.trajectory_ended(ended(1, Outcome.CANCELLED), 2.0) == []
    assert policy.trajectory_ended(ended(3), 2.0) == []  # ended before the cancel reached it


def test_abort_keeps_exactly_what_is_needed_of_each_group():
    scenario, arm = REHEARSAL.shape_, shape.arms(REHEARSAL)[2]
    items = arm.work(0)
    fleet = versus.fleet(scenario)
    result = simulate(items, fleet, REHEARSAL.prior(), arm.policy(items, 0, fleet, REHEARSAL.prior(), 0), engine=arm.engine)
    kept = Counter(item.prompt_id for item, outcome in zip(items, result.outcomes, strict=True) if outcome == "finished")
    assert all(count >= scenario.samples for count in kept.values()) and len(kept) == scenario.prompts
    assert "cancelled" in result.outcomes


def test_slower_is_slower_everywhere():
    latency = H200.prior()
    twice = versus.slowed(latency, 2.0)
    assert twice.decode_s(1, 8, 4096) == pytest.approx(2 * latency.decode_s(1, 8, 4096))
    assert twice.prefill_s(1, 512, 100) == pytest.approx(2 * latency.prefill_s(1, 512, 100))
    assert twice.kv_tokens(1) == latency.kv_tokens(1)


def test_ratios_are_of_pairs():
    rows = {row.name: row.predicted for row in versus.rows({"stock": [10.0, 20.0], "new": [5.0, 20.0]})}
    assert rows == {"stock, makespan": 15.0, "new, makespan": 12.5, "stock / new": 1.5}


def test_errors_of_forecasts():
    pair = {"seed": 0, "arms": {"a": {"table_s": 11.0, "makespan_s": 10.0}, "b": {"table_s": 5.0, "makespan_s": 5.0}}}
    half = {"seed": 1, "arms": {"a": {"table_s": 11.0, "makespan_s": 10.0}, "b": {"table_s": 5.0}}}
    makespans, ratios = fidelity.errors([pair, half], "table_s")
    assert makespans == pytest.approx([10.0, 0.0]) and ratios == pytest.approx([10.0])


def test_the_trainers_metrics_are_read_from_its_console():
    log = "noise\n(Task pid=1) step:1 - heddle/makespan_s:2.5 - timing_s/step:np.float64(9.0) - x:nan\nstep:2 - timing_s/step:1e-1\n"
    assert endtoend.steps(log) == {1: {"heddle/makespan_s": 2.5, "timing_s/step": 9.0}, 2: {"timing_s/step": 0.1}}


class MadeUp:
    """An engine that takes a millisecond a token and remembers what it was asked. Its real twin: `make bench-rehearsal`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.asked: list[tuple[str, int, int]] = []
        self.aborted: list[str] = []

    async def generate(self, prompt, tokens, request, priority=0, temperature=1.0):
        self.asked.append((request, len(prompt), tokens))
        try:
            await asyncio.sleep(0.001 * tokens)
        except asyncio.CancelledError:
            self.aborted.append(request)
            raise
        return Answer([7] * tokens, 0, 0.001 * tokens, 0.0, 0, 0.001, 0.001 * tokens, 0.0, 0.0)

    async def utility(self, method, *args):
        return 0


def played(items, policy, engines=1):
    made = {f"replica_{index}": MadeUp(f"replica_{index}") for index in range(engines)}
    fleet = [Replica(name, slots=4) for name in made]

    async def go():
        return await replay.Play(made, fleet, policy, 1280, 3).run(items)

    return asyncio.run(go()), made


def test_every_turn_is_played_with_the_context_so_far():
    steps = (Turn(0, 5, "sleep", 0.01), Turn(4, 6, "sleep", 0.0), Turn(2, 7))
    item = Trajectory("s", "w", "p", 0, 10, steps)
    records, engines = played([item], Stock())
    assert [asked[1:] for asked in engines["replica_0"].asked] == [(10, 5), (19, 6), (27, 7)]
    assert [turn.output_tokens for turn in records[0].steps] == [5, 6, 7]
    assert [turn.input_tokens for turn in records[0].steps] == [0, 4, 2]
    assert records[0].steps[0].tool_latency_s >= 0.01 and records[0].meta["outcome"] == "finished"


def test_cancelled_samples_leave_their_engine():
    items = [Trajectory("s", "w", "p", sample, 10, (Turn(0, 5 + 200 * sample),)) for sample in range(3)]
    records, engines = played(items, shape.FirstEnough(1))
    assert [record.meta["outcome"] for record in records] == ["finished", "cancelled", "cancelled"]
    assert len(engines["replica_0"].aborted) == 2
    assert replay.makespan_s(records) < 0.2


class Warming(Stock):
    """Prewarms the other replica whenever a turn ends."""

    def turn_finished(self, turn, now):
        super().turn_finished(turn, now)
        return [Prewarm(turn.trajectory.key, "replica_1", 9)]


def test_a_prewarm_reads_the_context_in_the_tool_gap_only():
    item = Trajectory("s", "w", "p", 0, 10, (Turn(0, 5, "sleep", 0.05), Turn(4, 6)))
    _, engines = played([item], Warming(), engines=2)
    warm = [asked for engine in engines.values() for asked in engine.asked if ":warm" in asked[0]]
    assert [asked[1:] for asked in warm] == [(15, 1)]  # prompt and what was generated; none after the last turn


def test_an_engines_failure_reaches_the_caller_and_leaves_nothing():
    class Broken(MadeUp):
        async def generate(self, *args, **kwargs):
            raise RuntimeError("engine died")

    items = [Trajectory("s", "w", str(n), 0, 10, (Turn(0, 5),)) for n in range(3)]

    async def go():
        await replay.Play({"replica_0": Broken("replica_0")}, [Replica("replica_0")], Stock(), 1280, 0).run(items)

    with pytest.raises(RuntimeError, match="engine died"):
        asyncio.run(go())


def test_the_planner_moves_the_same_in_the_bench_as_in_the_simulator():
    """Same policy object, same trajectories: nobody is lost and the placement is made of known replicas."""
    profile = replace(REHEARSAL, place=replace(REHEARSAL.place, prompts=6))
    arm = place.arms(profile)[1]
    items = [replace(item, steps=tuple(replace(turn, tool_latency_s=0.01) for turn in item.steps)) for item in arm.work(0)]
    fleet = versus.fleet(profile.place)
    records, _ = played(items, arm.policy(items, 0, fleet, profile.prior(), 3), engines=2)
    assert [record.output_tokens for record in records] == [item.output_tokens for item in items]


def test_arms_are_those_of_the_schedule_bench():
    assert [arm.name for arm in schedule.arms(REHEARSAL)] == ["stock", "priority", "heddle"]
    assert endtoend.ARMS["stock"] == "+plugin=observe"  # stock decisions, same instruments
