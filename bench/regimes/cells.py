"""The cells of the map: which workload on which GPUs, and the numbers that come out of one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from math import exp
from statistics import median_low
from typing import Any

from verl_heddle.latency import LatencyModel
from verl_heddle.report.draws import Draw, Source
from verl_heddle.report.setting import UTILIZATION, Setting, setting
from verl_heddle.report.study import Answer, study
from verl_heddle.traces import CODING, Tool, generate, split_variance
from verl_heddle.traces.workloads import BETWEEN_SHARE
from verl_heddle.trajectory import Trajectory

GPU, GPUS, SLOTS = "h200", 8, 256
SAMPLES = 8
MEAN_TOKENS = 8000
CONCURRENCY = (4, 16, 64, 128, 256)
"""Trajectories per GPU, all submitted at once."""

SIGMAS = (0.5, 0.9, 1.3)
"""Standard deviation of log length; the public agent traces have 0.5 to 0.9."""

TOOL_SHARES = (0.0, 0.3, 0.6)
MODELS = ("Qwen3-8B", "Qwen3-14B", "Qwen3-32B", "Qwen3-30B-A3B")
DRAWS = {4: 6, 16: 3, 64: 3, 128: 3, 256: 3}
"""By concurrency: small steps differ more from draw to draw, and cost less."""

MORE_MEMORY = 0.8
"""gpu_memory_utilization of the second map."""

PEERS = ("stock_tier", "trajectory_fcfs", "thunder_agent")
"""Arms of which the table shows one number: over stock at the usual degree."""

ARMS = ("stock_best_tp", *PEERS, "heddle", "heddle_best_tp")
"""Beside stock."""

TOOLS = (Tool("tool", 1.0, 1.0, 0.8),)
LONGEST_TOOL = 8.0
"""A tool call takes at most this many times the mean."""


@dataclass(frozen=True)
class Cell:
    """One place on the map."""

    model: str
    concurrency: int
    sigma: float
    tool_share: float
    utilization: float = UTILIZATION


def cells() -> Iterator[Cell]:
    """The map, then the part of it that is repeated with more KV memory."""
    for model in MODELS:
        for share in TOOL_SHARES:
            for sigma in SIGMAS:
                for concurrency in CONCURRENCY:
                    yield Cell(model, concurrency, sigma, share)
    for model in MODELS:
        for concurrency in CONCURRENCY:
            yield Cell(model, concurrency, SIGMAS[1], 0.0, MORE_MEMORY)


def measure(cell: Cell) -> dict[str, Any]:
    """Simulate a cell; JSON-ready. Ratios are medians over the draws, times those of the draw with stock's median makespan."""
    where = setting(cell.model, GPU, GPUS, None, SLOTS, cell.utilization)
    draws = tuple(draw(cell, where, seed) for seed in range(DRAWS[cell.concurrency]))
    about = {"steps": 1}
    answer = study(where, Source("map", draws, about), ARMS, jobs=1)
    rows = answer.rows
    stock, best = rows["stock"], rows["stock_best_tp"]
    return {
        **asdict(cell),
        "tp": where.tp,
        "best_tp": best.tp,
        "draws": len(draws),
        "trajectories": len(draws[0].steps[0]),
        "stock_s": stock.typical.makespan_s,
        "best_s": best.typical.makespan_s,
        "bound_s": answer.bound_s,
        "bound_is_longest": answer.worst_bound.longest_s >= answer.worst_bound.work_s,
        "stock_over_bound": median_low(1 / share for share in stock.bound_fractions),
        "best_over_bound": median_low(1 / share for share in best.bound_fractions),
        "best_speedup": best.speedup,
        "heddle_speedup": rows["heddle"].speedup,
        "heddle_draws": rows["heddle"].speedups,
        "heddle_best_speedup": median_low(rows["heddle_best_tp"].ratios(best)),
        "heddle_best_draws": rows["heddle_best_tp"].ratios(best),
        "peers": {name: rows[name].speedup for name in PEERS},
        "read_again": {name: sum(run.recomputed_tokens for run in rows[name].runs) / len(draws) for name in ("stock", "heddle")},
        "queue_share": stock.typical.queue_share,
        "preemptions": stock.typical.preemptions,
        "idle_share": stock.typical.idle_share,
        "tool_share_stock": _tool_share(answer),
    }


def draw(cell: Cell, where: Setting, seed: int, longer: float = 1.0) -> Draw:
    """The step, and as many other samples of the same prompts as the epoch before; trajectories `longer` than the map's."""
    number = cell.concurrency * where.gpus
    both = generate(
        "coding",
        number // SAMPLES,
        2 * SAMPLES,
        seed=seed,
        median_tokens=longer * MEAN_TOKENS / exp(cell.sigma**2 / 2),
        tools=TOOLS,
        tool_mean_s=1.0,
        tool_timeout_s=LONGEST_TOOL,
        **split_variance(cell.sigma, BETWEEN_SHARE),
    )
    both = _with_tools(both, cell, where.latency, where.tp)
    now = tuple(item for item in both if int(item.trial) < SAMPLES)
    before = tuple(item for item in both if int(item.trial) >= SAMPLES)
    return Draw(seed, (now,), (before,), cap_tokens=CODING.cap_tokens)


def _with_tools(items: Sequence[Trajectory], cell: Cell, latency: LatencyModel, tp: int) -> list[Trajectory]:
    """Scale all tool times alike, so that tools have their share of tool + generation seconds at the batch of a full step on stock's tp."""
    tokens = sum(item.output_tokens for item in items)
    context = sum(turn.output_tokens or 0 for item in items for turn in item.steps) / len(items) / 2 + 1000
    batch = min(SLOTS, cell.concurrency * tp)
    generating = tokens * float(latency.decode_s(tp, batch, context))
    tools = sum(item.tool_s for item in items)
    factor = cell.tool_share / (1 - cell.tool_share) * generating / tools
    return [
        replace(item, steps=tuple(replace(turn, tool_latency_s=factor * (turn.tool_latency_s or 0.0)) for turn in item.steps))
        for item in items
    ]


def _tool_share(answer: Answer) -> float:
    """Tool share of all trajectory time that is not queueing, as stock's simulated step has it."""
    from verl_heddle.report.play import play

    (result,) = play("stock", answer.setting.tp, answer.setting, answer.source.draws[answer.typical])
    tools = float(result.tool_s.sum())
    return tools / (tools + float(result.generate_s.sum() + result.prefill_s.sum()))
