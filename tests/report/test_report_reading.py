"""What of a step's prefill was read before, by hand and against the simulator's own count."""

from dataclasses import replace

import pytest

from verl_heddle.fleet import Replica
from verl_heddle.latency.model import LatencyModel
from verl_heddle.report.attribution import step_metrics
from verl_heddle.simulate import EngineOptions, simulate
from verl_heddle.simulate.baselines import Stock
from verl_heddle.traces import generate
from verl_heddle.trajectory import Trajectory, Turn

META = {"start_s": 0.0, "end_s": 1.0, "outcome": "finished", "step": 1, "validate": False}


def life(*turns: tuple[int | None, int | None, int]) -> Trajectory:
    """Of turns (context, cached, output)."""
    steps = tuple(Turn(0, made, ctx_tokens=context, cached_tokens=cached) for context, cached, made in turns)
    return Trajectory("s", "w", "p", 0, 100, steps, meta=dict(META))


def test_whole_blocks_that_the_turn_before_left_and_are_gone():
    """Blocks of 16: the second turn finds all of its 112 that are whole, the third none of 144, the fourth has a shorter context."""
    metrics = step_metrics([life((100, 0, 15), (130, 112, 20), (170, 0, 10), (50, 16, 1)), life(), life((60, 48, 5))])
    assert metrics["prefill_tokens"] == 100 + 18 + 170 + 34 + 12
    assert metrics["read_again_tokens"] == 144 + 32
    assert metrics["read_again_share"] == pytest.approx(176 / 334)


def test_engines_that_do_not_say():
    assert "read_again_share" not in step_metrics([life((100, None, 15), (130, None, 20))])


def with_contexts(item: Trajectory) -> Trajectory:
    """A simulated record does not tell what each turn reads: all that came before."""
    context, steps = item.prompt_tokens or 0, []
    for turn in item.steps:
        context += turn.input_tokens or 0
        steps.append(replace(turn, ctx_tokens=context))
        context += turn.output_tokens or 0
    return replace(item, steps=tuple(steps))


def test_it_is_what_the_simulator_counts():
    work = generate("search", 8, 4, seed=3, median_tokens=900)
    latency = LatencyModel.affine(0.02, 0.001, prefill_per_token_s=1e-5)
    fleet = [Replica("r0", slots=2, kv_tokens=24_000)]
    result = simulate(work, fleet, latency, Stock(), engine=EngineOptions(share_prompts=False), step=1)
    assert result.preemptions == 0, "they are counted too, and no turn tells of them"
    metrics = step_metrics([with_contexts(item) for item in result.trajectories()])
    counted = sum(one.recomputed_tokens for one in result.replicas)
    assert counted > 0 and metrics["read_again_tokens"] == pytest.approx(counted, rel=0.02)
