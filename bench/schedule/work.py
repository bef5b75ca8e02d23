"""What is replayed: heavy-tailed steps for one replica with few slots, the same trajectories in every arm.

Sizes: a token takes about 5 ms on the CPU engine, so a run is 10 to 25 s.
"""

from __future__ import annotations

from dataclasses import replace

from verl_heddle.options import Options
from verl_heddle.report.play import preempt_rule
from verl_heddle.simulate import EngineOptions
from verl_heddle.traces import Tool, Workload, generate
from verl_heddle.trajectory import Outcome, Trajectory, TrajectoryEnd, TrajectoryId

SLOTS = 4
PROMPTS = 24
MAX_SLOTS = 8
BATCH_TOKENS = 2048
BLOCK_TOKENS = 32
QUANTUM = 16
"""Tokens per priority unit. The trajectories are some 20 times shorter than on a GPU, and so is the default of 64, nearly."""

ARMS = {"stock": "fcfs", "priority": "priority", "heddle": "preempt"}
"""Arm -> order. `stock`: verl and vLLM as they are; `priority`: vLLM's priority policy alone; `heddle`: with preemption on arrival. The
last two know every trajectory's true length."""

_BASE = Workload(
    name="agentic",
    median_tokens=220.0,
    prompt_sigma=0.85,
    sample_sigma=0.35,
    spread_sigma=0.0,
    median_turns=4.0,
    turns_per_length=0.5,
    turns_sigma=0.3,
    turn_token_sigma=0.4,
    late_growth=0.5,
    prompt_tokens=150.0,
    prompt_tokens_sigma=0.4,
    input_tokens=50.0,
    input_tokens_sigma=0.5,
    tool_mean_s=0.5,
    tools=(Tool("sleep", 1.0, 1.0, 0.7),),
    cap_tokens=1600,
    max_turns=10,
    max_input_tokens=150,
)
WORKLOADS = {
    "agentic": _BASE,
    "long_turns": replace(_BASE, name="long_turns", median_turns=2.0, turns_per_length=0.25, turns_sigma=0.2),
    "one_turn": replace(_BASE, name="one_turn", median_turns=1.0, turns_per_length=0.0, turns_sigma=0.0, max_turns=1),
}
"""`agentic`: turns of about 100 tokens, a tool of half a second after each; `long_turns`: turns two to three times as long; `one_turn`: no
tools, all submitted at once, where preemption has nothing to do."""


def items(workload: str, seed: int) -> list[Trajectory]:
    """The trajectories of one step, in order of submission."""
    return generate(WORKLOADS[workload], PROMPTS, 1, seed)


def known(arm: str, work: list[Trajectory]) -> list[TrajectoryEnd]:
    """What the router is told to have seen before: every true length, or nothing."""
    if arm == "stock":
        return []
    ids = [TrajectoryId(item.prompt_id, f"before:{item.prompt_id}", item.trial, -1) for item in work]
    return [TrajectoryEnd(who, Outcome.FINISHED, item.output_tokens, len(item.steps)) for who, item in zip(ids, work, strict=True)]


def options(arm: str, seed: int) -> Options:
    """The plugin's settings."""
    made = Options.longest(observe=arm == "stock", seed=seed)
    made.priority.quantum_tokens = QUANTUM
    made.priority.refresh_s = 1.0 if arm == "heddle" else 0.0  # vLLM's own scheduler takes no new priorities
    return made


def engine(arm: str, overhead_s: float) -> EngineOptions:
    """The same engine in the simulator, with the same law of preemption on arrival."""
    return EngineOptions(
        order="fcfs" if arm == "stock" else "priority",
        batch_tokens=BATCH_TOKENS,
        block_tokens=BLOCK_TOKENS,
        preempt=preempt_rule(options(arm, 0)) if arm == "heddle" else None,
        turn_overhead_s=overhead_s,
    )
