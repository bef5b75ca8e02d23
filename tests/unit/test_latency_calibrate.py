"""Calibration on engines whose law is known."""

import heapq
import math
from dataclasses import replace

import numpy as np
import pytest

from verl_heddle.latency import LatencyModel, Memory, calibrate
from verl_heddle.latency.calibrate import MIN_TURNS, Work, batch_history, step_times
from verl_heddle.trajectory import Trajectory, Turn

GPU_LIKE = LatencyModel.affine(5e-3, 1e-4, 2e-8, prefill_per_token_s=2e-5, prefill_base_s=5e-3)
CPU_LIKE = LatencyModel.affine(5e-2, 5e-3, 1e-6, prefill_per_token_s=5e-4, prefill_base_s=5e-2)


def recorded(truth, *, trajectories=40, turns=4, slots=64, spread_s=20.0, noise=0.0, seed=0, replica="a", epoch_s=1.7e9):
    """What the recorder writes of an engine that steps as `truth` says: continuous batching, prefills within the step, tools between
    turns."""
    rng = np.random.default_rng(seed)
    begun = rng.uniform(0, spread_s, trajectories)
    asked = [(float(when), who) for who, when in enumerate(begun)]
    heapq.heapify(asked)
    context, told = [0] * trajectories, [[] for _ in range(trajectories)]
    now, running, waiting, prefill = 0.0, [], [], truth.engines[1].prefill
    while asked or running or waiting:
        if not running and not waiting:
            now = max(now, asked[0][0])
        while asked and asked[0][0] <= now:
            waiting.append(heapq.heappop(asked))
        joining = []
        while waiting and len(running) + len(joining) < slots:
            when, who = waiting.pop(0)
            new = int(rng.integers(20, 400))
            context[who] += new
            left = max(2, int(rng.lognormal(math.log(150), 0.8)))
            joining.append({"who": who, "asked": when, "begin": now, "new": new, "left": left, "output": left})
        batch = len(running)
        total = sum(context[turn["who"]] + turn["output"] - turn["left"] for turn in running)
        # Weights are read once a step: a prefill among decoding sequences costs its tokens only.
        step = truth.decode_s(1, batch, total / max(1, batch)) + prefill.per_token_s * sum(turn["new"] for turn in joining)
        now += step * max(0.1, 1 + noise * rng.standard_normal())
        running += joining
        for turn in running:
            turn["left"] -= 1
        for turn in [turn for turn in running if not turn["left"]]:
            running.remove(turn)
            who = turn["who"]
            told[who].append(
                Turn(
                    input_tokens=turn["new"] if told[who] else 0,
                    output_tokens=turn["output"],
                    gen_s=now - turn["begin"],
                    ctx_tokens=context[who],
                    route_s=0.0,
                    queue_s=turn["begin"] - turn["asked"],
                    transport_s=0.0,
                    replica=replica,
                    preemptions=0,
                    cached_tokens=context[who] - turn["new"],
                    start_s=turn["asked"] - begun[who],
                )
            )
            context[who] += turn["output"]
            if len(told[who]) < turns:
                heapq.heappush(asked, (now + float(rng.exponential(2.0)), who))
    return [
        Trajectory("test", "synthetic", str(who), 0, None, tuple(told[who]), meta={"start_s": epoch_s + begun[who]})
        for who in range(trajectories)
    ]


def distance(fitted: LatencyModel, truth: LatencyModel, tp: int = 1) -> float:
    """Largest relative error of step times over the batches and contexts of these runs."""
    batch, context = np.meshgrid([1, 4, 16], [300, 1000, 2000])
    return float(np.abs(fitted.decode_s(tp, batch, context) / truth.decode_s(1, batch, context) - 1).max())


@pytest.mark.parametrize("truth", [GPU_LIKE, CPU_LIKE], ids=["gpu", "cpu"])
@pytest.mark.parametrize(
    "run",
    [{}, {"noise": 0.05}, {"slots": 8}, {"spread_s": 0.0}, {"trajectories": 150, "turns": 6, "spread_s": 60.0, "noise": 0.05}],
    ids=["plain", "noisy", "few slots", "all at once", "long"],
)
def test_recovers_the_law(truth, run):
    fitted = calibrate(recorded(truth, **run))
    assert distance(fitted, truth) < 0.05
    quality = fitted.engines[1].fit
    assert quality.median_error < 0.02 and quality.p90_error < 0.05
    assert quality.turns > 150 and 1 < quality.max_batch <= run.get("slots", 64) + 1e-9 and quality.max_context > 1000


def test_recovers_prefill_per_token_where_prefill_matters():
    truth = LatencyModel.affine(2e-2, 1e-3, prefill_per_token_s=1e-3, prefill_base_s=2e-2)
    fitted = calibrate(recorded(truth, noise=0.05, trajectories=80))
    assert fitted.engines[1].prefill.per_token_s == pytest.approx(1e-3, rel=0.05)
    assert fitted.prefill_s(1, 300) == pytest.approx(truth.prefill_s(1, 300), rel=0.05)


def test_fits_each_degree_apart_and_keeps_what_the_base_knows():
    memory = Memory(80_000_000_000, 16_000_000_000, 100_000, 4_000_000_000)
    base = LatencyModel.affine(1.0, tps=(1, 2, 4), memory=memory, weight_load_s=3.0)
    records = recorded(GPU_LIKE, replica="a") + recorded(GPU_LIKE, replica="b", seed=1) + recorded(CPU_LIKE, replica="c", seed=2)
    fitted = calibrate(records, {"a": 1, "b": 1, "c": 2}, base=base)
    assert fitted.tps == (1, 2, 4)
    assert distance(fitted, GPU_LIKE) < 0.05 and distance(fitted, CPU_LIKE, tp=2) < 0.05
    assert fitted.engines[4] == base.engines[4]
    assert fitted.kv_tokens(2) == base.kv_tokens(2) and fitted.weight_load_s(2) == 3.0
    assert "480 recorded turns" in fitted.source


def test_too_few_records_say_how_many_more():
    records = recorded(GPU_LIKE, trajectories=3, turns=2)
    with pytest.raises(ValueError, match=f"needs {MIN_TURNS} usable turns .* tp=1 has 6: record 14 more"):
        calibrate(records)
    with pytest.raises(ValueError, match="there are none: record 20"):
        calibrate([])
    bare = [Trajectory("public", "w", "p", 0, 10, (Turn(0, 5),), meta={"start_s": 0.0})]
    with pytest.raises(ValueError, match="1 turns with no replica, start_s or gen_s"):
        calibrate(bare)


def test_unnamed_replica_is_an_error():
    with pytest.raises(ValueError, match="replica 'a'"):
        calibrate(recorded(GPU_LIKE), {"b": 1})


def test_constant_batch_still_explains_its_own_turns():
    alone = calibrate(recorded(GPU_LIKE, slots=1, trajectories=30))
    assert alone.engines[1].fit.p90_error < 0.05
    assert alone.decode_s(1, 1, 1000) == pytest.approx(GPU_LIKE.decode_s(1, 1, 1000), rel=0.05)


def test_unknown_cache_hits_are_taken_from_the_conversation():
    known = recorded(GPU_LIKE)
    silent = [replace(item, steps=tuple(replace(turn, cached_tokens=None) for turn in item.steps)) for item in known]
    a, b = calibrate(known), calibrate(silent)
    assert b.decode_s(1, 16, 1000) == pytest.approx(a.decode_s(1, 16, 1000), rel=0.01)


def test_batch_history_counts_by_steps():
    # Two turns overlap for half of the first one's life.
    works = [Work(0.0, 10.0, 1, 100, 100), Work(5.0, 15.0, 1, 300, 100)]
    history = batch_history(works, np.zeros(4))
    assert history.batch.tolist() == pytest.approx([1.5, 1.5])
    assert history.prefilled_tokens.tolist() == [2.0, 1.0]
    # First half alone with 100..150 tokens, second half with its own 150..200 and the other's 300..350.
    assert history.total_context[0] == pytest.approx((125 + 175 + 325) / 2)


def test_a_run_under_way_learns_every_degree_in_its_fleet_and_keeps_what_it_knew():
    fast = LatencyModel.affine(2.5e-3, 5e-5, 1e-8, prefill_per_token_s=1e-5, prefill_base_s=2.5e-3)
    slow, quick = recorded(GPU_LIKE, replica="a"), recorded(fast, replica="b", seed=1)
    both = step_times([*slow, *quick], {"a": 1, "b": 2})
    assert distance(both, GPU_LIKE) < 0.05 and both.tps == (1, 2)
    assert both.decode_s(2, 8, 1000) == pytest.approx(fast.decode_s(1, 8, 1000), rel=0.05)
    later = step_times([*slow, *quick], {"a": 1}, both)
    assert later.tps == (1, 2), "turns on a replica that is not of the fleet are not looked at, its degree is not forgotten"
    assert later.decode_s(2, 8, 1000) == both.decode_s(2, 8, 1000)
    with pytest.raises(ValueError, match="turns"):
        step_times([*slow, *quick[:2]], {"a": 1, "b": 2})
