"""Describe a set of trajectories in sentences, with a text histogram of their lengths."""

from __future__ import annotations

from collections.abc import Iterable
from math import floor, log2
from typing import Any

from verl_heddle.report.words import count, number, percent
from verl_heddle.simulate.workload import walk
from verl_heddle.traces.describe import BATCH, summary
from verl_heddle.traces.replay import replayable
from verl_heddle.trajectory import Trajectory

WIDTH = 44
"""Characters of the longest bar."""


class Measured:
    """Iterator wrapper that collects each trajectory's length and its largest context."""

    def __init__(self, items: Iterable[Trajectory]) -> None:
        self._items = items
        self.lengths: list[int] = []
        self.contexts: list[int] = []

    def __iter__(self) -> Any:
        for item in self._items:
            if item.output_tokens:
                self.lengths.append(item.output_tokens)
                self.contexts.append(max(context + output for context, _, output in walk(replayable(item))))
            yield item


def words(items: Iterable[Trajectory]) -> list[str]:
    """Sentences, then the histogram; reads the stream once."""
    measured = Measured(items)
    facts = summary(measured)
    lines = [f"{count(facts['trajectories'])} trajectories of {count(facts['prompts'])} prompts{_samples(facts)}{_turns(facts)}."]
    if (tokens := facts["output_tokens"]) is not None:
        lines.append(
            f"They generate {count(tokens['p50'])} tokens in the median, {count(tokens['p90'])} at the 90th percentile, "
            f"{count(tokens['max'])} at most; the longest of {BATCH} has {number(facts['batch_max_over_mean'])} times the mean."
        )
        contexts = sorted(measured.contexts)
        lines.append(
            f"A context grows to {count(contexts[len(contexts) // 2])} tokens in the median, {count(contexts[-1])} at most; all contexts "
            f"together need KV cache for {count(sum(contexts))} tokens."
        )
    if (spread := facts["longest_over_median"]) is not None:
        within = facts["within_share"]
        share = f"; {percent(within)} of the variance of log length is within prompts" if within is not None else ""
        longest = f"{number(spread['p50'])} times its median sample, {number(spread['p90'])} at the 90th percentile"
        lines.append(f"The longest sample of a prompt is {longest}{share}.")
    if (tools := facts["tool_s"]) is not None:
        share = f", {percent(facts['tool_share'])} of tool and generation time" if facts["tool_share"] is not None else ""
        named = ", ".join(f"{name} {number(times['p50'])} s" for name, times in list(facts["tools"].items())[:4])
        spread_s = f"{number(tools['p50'])} s in the median, {number(tools['p99'])} s at the 99th percentile"
        lines.append(f"A tool call takes {spread_s}{share}; by tool: {named}.")
    else:
        lines.append("Tool times are unknown; simulations assume 0.")
    if facts["reward"] is not None:
        lines.append(f"Mean reward {facts['reward']:.3f}.")
    return [*lines, *bars(measured.lengths)]


def bars(lengths: list[int]) -> list[str]:
    """Histogram of generated tokens per trajectory, one bar for each doubling."""
    if not lengths:
        return []
    bins: dict[int, int] = {}
    for length in lengths:
        bins[floor(log2(length))] = bins.get(floor(log2(length)), 0) + 1
    most = max(bins.values())
    rows = []
    for power in range(min(bins), max(bins) + 1):
        size = bins.get(power, 0)
        bar = "█" * round(WIDTH * size / most) or ("▏" if size else "")
        rows.append(f"{2**power:>12,} {bar} {size:,}" if size else f"{2**power:>12,}")
    return ["", "tokens from   trajectories", *rows]


def _samples(facts: dict[str, Any]) -> str:
    samples = facts["samples"]
    if samples is None or samples["max"] == 1:
        return ""
    span = f"{samples['min']}" if samples["min"] == samples["max"] else f"{samples['min']} to {samples['max']}"
    return f", {span} samples each"


def _turns(facts: dict[str, Any]) -> str:
    steps = facts["steps"]
    return "" if steps is None else f", {count(steps['p50'])} turns in the median, {count(steps['max'])} at most"
