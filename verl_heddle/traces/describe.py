"""Summarise a set of trajectories: lengths, tails, groups, tool times, and how well cheap features predict length.

The definitions match the table of the public traces, so a recorded or generated workload can be compared with it.
Quantiles are observed values (the next higher one), because tails of few samples should not be interpolated.
"""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from verl_heddle.traces.schema import PSEUDO_TOOLS
from verl_heddle.trajectory import Trajectory

BATCH = 256
"""Trajectories of a synchronous batch, which waits for its longest member (`batch_max_over_mean`)."""

BATCH_DRAWS = 2000
"""Random batches drawn: on the public traces the mean of max/mean then varies by about 2 % between seeds."""

EARLY_TURNS = (3, 10)
"""Numbers of turns after which tokens so far are correlated with tokens remaining."""

Floats = NDArray[np.float64]


def summary(trajectories: Iterable[Trajectory], seed: int = 0) -> dict[str, Any]:
    """Statistics of a workload, as JSON values; None where the trajectories lack the data.

    Keys: `trajectories`, `prompts`, `samples` (per group: min, max), `steps`, `output_tokens` and `prompt_tokens` per trajectory,
    `output_tokens_per_turn`, `tool_s` (without pseudo-tools), `gen_s`: each {n, mean, p50, p90, p99, max}; `tools`: the same per tool
    name; `longest_over_median` over groups; `within_share`: share of the variance of log(output) inside groups, biased low when groups are
    small; `batch_max_over_mean`: expected longest/mean of a random batch of `BATCH`; `tool_share` = tool / (tool + generation) seconds,
    None unless both are known; `reward`: mean; `spearman`: rank correlation of the output with prompt length (`prompt_tokens`) and with
    the mean of the group's other samples (`siblings`), and of the first 3 and 10 turns' tokens with what follows (`first_3`, `first_10`).

    A group is the samples drawn together from one prompt: same source, prompt and, in a live run, same visit (`meta.uid`). Trajectories
    without any known output tokens count only in `trajectories` and `steps`. Reads the stream once; keeps a few numbers per turn.
    """
    number, steps, rewards = 0, array("d"), array("d")
    groups: dict[Any, list[int]] = defaultdict(list)
    output, prompts, per_turn, gen = array("d"), array("d"), array("d"), array("d")
    tools: dict[str, array[float]] = defaultdict(lambda: array("d"))
    early: dict[int, list[tuple[float, float]]] = {turns: [] for turns in EARLY_TURNS}
    for trajectory in trajectories:
        number += 1
        steps.append(len(trajectory.steps))
        for turn in trajectory.steps:
            if turn.output_tokens is not None:
                per_turn.append(turn.output_tokens)
            if turn.gen_s is not None:
                gen.append(turn.gen_s)
            if turn.tool_latency_s is not None and turn.tool not in PSEUDO_TOOLS:
                tools[turn.tool or ""].append(turn.tool_latency_s)
        if trajectory.reward is not None:
            rewards.append(trajectory.reward)
        if total := trajectory.output_tokens:
            groups[trajectory.source, trajectory.prompt_id, str(trajectory.meta.get("uid"))].append(len(output))
            output.append(total)
            prompts.append(np.nan if trajectory.prompt_tokens is None else trajectory.prompt_tokens)
            for turns, pairs in early.items():
                if len(trajectory.steps) > turns:
                    first = sum(turn.output_tokens or 0 for turn in trajectory.steps[:turns])
                    pairs.append((first, total - first))
    lengths, prompt = _floats(output), _floats(prompts)
    members = [np.array(group) for group in groups.values() if len(group) > 1]
    tool, generation = np.concatenate([_floats(times) for times in tools.values()] or [np.empty(0)]), _floats(gen)
    return {
        "trajectories": number,
        "prompts": len(groups),
        "samples": {"min": min(map(len, groups.values())), "max": max(map(len, groups.values()))} if groups else None,
        "steps": _spread(_floats(steps)),
        "output_tokens": _spread(lengths),
        "output_tokens_per_turn": _spread(_floats(per_turn)),
        "prompt_tokens": _spread(prompt[~np.isnan(prompt)]),
        "longest_over_median": _spread(np.array([lengths[group].max() / np.median(lengths[group]) for group in members])),
        "within_share": _within_share(np.log(lengths), members),
        "batch_max_over_mean": _batch_max_over_mean(lengths, np.random.default_rng(seed)),
        "tool_s": _spread(tool),
        "gen_s": _spread(generation),
        "tool_share": float(tool.sum() / (tool.sum() + generation.sum())) if len(tool) and generation.sum() > 0 else None,
        "tools": {name or "(unnamed)": _spread(_floats(times)) for name, times in sorted(tools.items(), key=lambda item: -len(item[1]))},
        "reward": float(np.mean(rewards)) if len(rewards) else None,
        "spearman": {
            "prompt_tokens": spearman(prompt[~np.isnan(prompt)], lengths[~np.isnan(prompt)]),
            "siblings": _siblings(lengths, members),
            **{f"first_{turns}": spearman(*(np.array(pairs, dtype=float).reshape(-1, 2).T)) for turns, pairs in early.items()},
        },
    }


def spearman(left: Floats, right: Floats) -> float | None:
    """Rank correlation of two arrays of equal length, ties at their mean rank; None for fewer than 3 pairs or a constant array."""
    if len(left) < 3 or np.ptp(left) == 0 or np.ptp(right) == 0:
        return None
    return float(np.corrcoef(_ranks(left), _ranks(right))[0, 1])


def _ranks(values: Floats) -> Floats:
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: Floats = (np.cumsum(counts) - (counts - 1) / 2)[which]
    return ranks


def _siblings(lengths: Floats, members: list[NDArray[np.int64]]) -> float | None:
    others = [(lengths[group].sum() - lengths[group]) / (len(group) - 1) for group in members]
    return spearman(np.concatenate(others), np.concatenate([lengths[group] for group in members])) if members else None


def _within_share(logs: Floats, members: list[NDArray[np.int64]]) -> float | None:
    if not members:
        return None
    used = logs[np.concatenate(members)]
    total = float(((used - used.mean()) ** 2).sum())
    inside = sum(float(((logs[group] - logs[group].mean()) ** 2).sum()) for group in members)
    return inside / total if total > 0 else None


def _batch_max_over_mean(lengths: Floats, rng: np.random.Generator) -> float | None:
    if not len(lengths):
        return None
    batches = lengths[rng.integers(len(lengths), size=(BATCH_DRAWS, BATCH))]
    return float((batches.max(axis=1) / batches.mean(axis=1)).mean())


def _spread(values: Floats) -> dict[str, float] | None:
    if not len(values):
        return None
    p50, p90, p99 = np.quantile(values, [0.5, 0.9, 0.99], method="higher").tolist()
    return {"n": len(values), "mean": float(values.mean()), "p50": p50, "p90": p90, "p99": p99, "max": float(values.max())}


def _floats(values: array[float]) -> Floats:
    return np.frombuffer(values, dtype=np.float64) if len(values) else np.empty(0)
