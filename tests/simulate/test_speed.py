"""The speed target, on whatever machine runs the tests: CPU seconds of this process, so that neighbours do not matter much."""

import time

from verl_heddle.latency import load
from verl_heddle.options import Options
from verl_heddle.orchestrator import Orchestrator
from verl_heddle.simulate import PRIORITY, make_fleet, simulate
from verl_heddle.traces import generate


def test_a_step_of_the_papers_size_takes_seconds():
    """6,400 trajectories of about 12 turns on 64 GPUs: under 8 s by verl's rules; more in `bench/simulate_speed`."""
    work = generate("coding", 400, 16, seed=1, median_turns=10.5)
    latency = load("h200", "Qwen3-8B")
    start = time.process_time()
    result = simulate(work, make_fleet(64, 1, latency), latency, Orchestrator(Options(observe=True)), engine=PRIORITY)
    assert time.process_time() - start < 8.0
    assert len(result.turns) > 70_000
