"""What the planner is measured on: generated regimes, and the open traces where a folder of them is given."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import exp
from pathlib import Path
from random import Random

from verl_heddle.report.setting import Setting, setting
from verl_heddle.simulate.workload import most_kv
from verl_heddle.traces import Tool, episodes, generate, read, replayable, split_variance
from verl_heddle.traces.workloads import BETWEEN_SHARE, CODING
from verl_heddle.trajectory import Trajectory

GPU, GPUS, SAMPLES, MEAN_TOKENS = "h200", 8, 8, 8000
SIGMA = 0.9
LONGEST_TOOL_S = 60.0
"""Cap on a recorded tool call: the gaps of people are not tools."""

Draw = tuple[list[Trajectory], list[Trajectory]]
"""A step, and another epoch of the same prompts to learn from (empty where there is none)."""


@dataclass(frozen=True)
class Case:
    """A regime: `draw(seed)` gives a step of it."""

    name: str
    where: Setting
    draw: Callable[[int], Draw]
    cap_tokens: int | None = None
    """verl's `response_length`, where the workload has one."""


def generated(
    name: str, model: str, concurrency: int, utilization: float, *, tools: float = 0.0, sigma: float = SIGMA, turns: float = 8
) -> Case:
    """`concurrency` trajectories per GPU, mean 8,000 tokens; `tools`: mean seconds of a call."""
    where = setting(model, GPU, GPUS, utilization=utilization)

    def draw(seed: int) -> Draw:
        both = generate(
            "coding",
            concurrency * GPUS // SAMPLES,
            2 * SAMPLES,
            seed=seed,
            median_tokens=MEAN_TOKENS / exp(sigma**2 / 2),
            median_turns=turns,
            max_turns=1 if turns == 1 else 100,
            tools=(Tool("tool", 1.0, 1.0, 0.8),),
            tool_mean_s=tools,
            **split_variance(sigma, BETWEEN_SHARE),
        )
        return [item for item in both if int(item.trial) < SAMPLES], [item for item in both if int(item.trial) >= SAMPLES]

    return Case(name, where, draw, CODING.cap_tokens)


def regimes() -> list[Case]:
    """A handful: few and many per GPU, tight and roomy KV, with and without tools, one and many turns, small and large model."""
    return [
        generated("8B, 16 per GPU", "Qwen3-8B", 16, 0.5),
        generated("8B, 16 per GPU, wide", "Qwen3-8B", 16, 0.5, sigma=1.3),
        generated("8B, 64 per GPU", "Qwen3-8B", 64, 0.5),
        generated("8B, 64 per GPU, roomy KV", "Qwen3-8B", 64, 0.9),
        generated("8B, 64 per GPU, tools", "Qwen3-8B", 64, 0.5, tools=10.0),
        generated("8B, 64 per GPU, one turn", "Qwen3-8B", 64, 0.9, turns=1),
        generated("32B, 16 per GPU, tools", "Qwen3-32B", 16, 0.5, tools=5.0),
    ]


TRACES = {
    "balrog_cot": 48,
    "bfcl_vllm": 512,
    "claude_code": 128,
    "math8": 512,
    "sweagent": 512,
    "tau2_retail_cc": 256,
    "taubench": 256,
    "tbench_mini": 256,
}
"""Trajectories of a step; fewer where episodes are long. Short sources are drawn more than once, as further samples of their prompts."""


def traces(folder: Path) -> list[Case]:
    """The sources that the folder has, on 8 GPUs with Qwen3-8B."""
    where = setting("Qwen3-8B", GPU, GPUS)
    cases = []
    for name, number in TRACES.items():
        path = folder / f"{name}.jsonl.gz"
        if path.exists():
            cases.append(Case(name, where, _resampled(path, number, where)))
    return cases


def _resampled(path: Path, number: int, where: Setting) -> Callable[[int], Draw]:
    """Whole prompts at random until the step is full."""
    held = where.kv_tokens[where.tp]
    groups: dict[str, list[Trajectory]] = defaultdict(list)
    for item in read(path):
        pieces = episodes(item) if item.source == "claude_code" else [item]
        for piece in pieces:
            whole = replayable(piece, max_tool_s=LONGEST_TOOL_S)
            if whole.steps and (held is None or most_kv([whole]) <= held):
                groups[piece.prompt_id].append(whole)

    def draw(seed: int) -> Draw:
        rng = Random(seed)
        step: list[Trajectory] = []
        visit = 0
        while len(step) < number:
            prompts = sorted(groups)
            rng.shuffle(prompts)
            for prompt in prompts:
                step += [replace(item, trial=f"{visit}.{index}") for index, item in enumerate(groups[prompt])]
                if len(step) >= number:
                    break
            visit += 1
        return step[:number], []

    return draw


def select(cases: Sequence[Case], words: Sequence[str]) -> list[Case]:
    """Those whose name is one of the words, or contains one that is nobody's name; all without words."""
    names = {case.name for case in cases}
    parts = [word for word in words if word not in names]
    return [case for case in cases if not words or case.name in words or any(part in case.name for part in parts)]
