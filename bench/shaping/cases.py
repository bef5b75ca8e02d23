"""What shaping is measured on: generated workloads with spare samples, and the open traces that have several samples of a prompt."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import exp
from pathlib import Path
from random import Random

from verl_heddle.report.setting import Setting, setting
from verl_heddle.simulate.workload import most_kv
from verl_heddle.traces import Tool, generate, read, replayable, split_variance
from verl_heddle.traces.workloads import BETWEEN_SHARE
from verl_heddle.trajectory import Trajectory

GPU, GPUS, SIZE = "h200", 32, 8
LONGEST_TOOL_S = 60.0
"""Cap on a recorded tool call: the gaps of people are not tools."""

Pool = dict[str, list[Trajectory]]
"""Samples by prompt, in the order in which they would be started."""


@dataclass(frozen=True)
class Case:
    """`draw(seed)`: the step's pool, at least `most` samples a prompt, and other samples of the same prompts to learn from."""

    name: str
    where: Setting
    draw: Callable[[int], tuple[Pool, Pool]]
    size: int
    """n."""
    most: int
    """Samples of a prompt that there are."""
    cap_tokens: int | None = None
    recorded: bool = False
    """A trace: its samples and rewards were measured; spare ones are taken out of those that there are."""


def pooled(items: Sequence[Trajectory]) -> Pool:
    """By prompt."""
    pool: Pool = defaultdict(list)
    for item in items:
        pool[item.prompt_id].append(item)
    return dict(pool)


def generated(
    name: str,
    model: str,
    per_gpu: int,
    *,
    sigma: float = 0.9,
    turns: float = 8,
    tools: float = 0.0,
    mean: float = 8000,
    cap: int = 40_960,
    between: float = BETWEEN_SHARE,
    late: float = 1.75,
) -> Case:
    """`per_gpu` trajectories per GPU under stock; 16 samples to draw from, 8 other ones to learn from. `tools`: mean seconds of a call."""

    def draw(seed: int) -> tuple[Pool, Pool]:
        made = pooled(
            generate(
                "coding",
                per_gpu * GPUS // SIZE,
                3 * SIZE,
                seed=seed,
                median_tokens=mean / exp(sigma**2 / 2),
                median_turns=turns,
                max_turns=1 if turns == 1 else 100,
                late_growth=late,
                tools=(Tool("tool", 1.0, 1.0, 0.8),),
                tool_mean_s=tools,
                cap_tokens=cap,
                **split_variance(sigma, between),
            )
        )
        return {p: items[: 2 * SIZE] for p, items in made.items()}, {p: items[2 * SIZE :] for p, items in made.items()}

    return Case(name, setting(model, GPU, GPUS, utilization=0.8), draw, SIZE, 2 * SIZE, cap)


def regimes() -> list[Case]:
    """DARTS-like: one turn of math, short (8k) and long (16k) caps; Heddle-like: many turns, with tools; small and full fleets."""
    return [
        generated("math, one turn, 8B, 16 per GPU", "Qwen3-8B", 16, turns=1, mean=2500, cap=8192, sigma=0.8, between=0.5),
        generated("math, one turn, 8B, 128 per GPU", "Qwen3-8B", 128, turns=1, mean=2500, cap=8192, sigma=0.8, between=0.5),
        generated("math, one turn, 14B, 32 per GPU, cap 16k", "Qwen3-14B", 32, turns=1, mean=4000, cap=16_384, between=0.5),
        generated("math, one turn, 8B, short and even", "Qwen3-8B", 64, turns=1, mean=900, cap=8192, sigma=0.45),
        generated("agents, 8B, 16 per GPU", "Qwen3-8B", 16),
        generated("agents, 8B, 64 per GPU", "Qwen3-8B", 64),
        generated("agents, 8B, 16 per GPU, tools", "Qwen3-8B", 16, tools=5.0),
        generated("agents, 32B, 16 per GPU", "Qwen3-32B", 16),
        generated("agents, 8B, 16 per GPU, spread within prompts", "Qwen3-8B", 16, between=0.3),
    ]


TRACES = {"math8": (4, 8), "bfcl_vllm": (3, 5), "balrog_cot": (3, 5), "tbench_mini": (3, 5), "taubench": (2, 4), "sweagent": (2, 3)}
"""Trace: n, and the samples of a prompt that there are."""

PROMPTS = 64
"""Of a step, and at most three quarters of the trace's, so that there are others to learn the pool from."""


def traces(folder: Path) -> list[Case]:
    """The traces that the folder has, on two GPUs (they have few samples), Qwen3-8B."""
    where = setting("Qwen3-8B", GPU, 2, utilization=0.8)
    made = []
    for name, (size, most) in TRACES.items():
        path = folder / f"{name}.jsonl.gz"
        if path.exists():
            made.append(Case(f"trace {name}, {size} of {most}", where, _recorded(path, most, where), size, most, recorded=True))
    return made


def _recorded(path: Path, most: int, where: Setting) -> Callable[[int], tuple[Pool, Pool]]:
    held = where.kv_tokens[where.tp]
    groups: Pool = defaultdict(list)
    for item in read(path):
        whole = replayable(item, max_tool_s=LONGEST_TOOL_S)
        if whole.steps and (held is None or most_kv([whole]) <= held):
            groups[item.prompt_id].append(whole)
    full = sorted(prompt for prompt, items in groups.items() if len(items) >= most)

    def draw(seed: int) -> tuple[Pool, Pool]:
        """Nothing to learn from: the samples are all needed. What a step is planned by is the pool of the *other* prompts."""
        rng = Random(seed)
        chosen = rng.sample(full, min(PROMPTS, len(full) * 3 // 4))
        pool = {prompt: rng.sample(groups[prompt], most) for prompt in chosen}
        pool = {prompt: [replace(item, trial=number) for number, item in enumerate(items)] for prompt, items in pool.items()}
        return pool, {prompt: groups[prompt] for prompt in full if prompt not in pool}

    return draw
