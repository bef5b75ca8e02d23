"""Computes the data of the page's charts, with positions in percent of each chart's frame, so that the template only places them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import log, log10
from pathlib import Path
from random import Random
from typing import Any

from verl_heddle.compare.findings import interval
from verl_heddle.compare.ledger import Ledger
from verl_heddle.compare.measure import Step, traced_steps
from verl_heddle.compare.plan import Key
from verl_heddle.compare.result import ArmResult, Comparison
from verl_heddle.report.html import ticks
from verl_heddle.report.page import SCENE_NOTE
from verl_heddle.report.raster import DARK, LIGHT, data_uri, palette, png, raster, recorded
from verl_heddle.report.words import count, percent, seconds

STACKED = ("generate_s", "queue_s", "tool_s", "other_s", "late_start_s")
"""Order of a stacked column from the bottom up: unavoidable time is lowest."""

MOST_COLUMNS = 48
"""Most columns of a stacked chart; more steps are averaged into this many, because narrower columns blur on a phone."""

MOST_DOTS = 400
"""Most dots of a prediction chart; more would only overlap and enlarge the page."""

Chart = dict[str, Any]


def forest(answer: Comparison, colors: Mapping[str, int]) -> Chart:
    """Each arm's ratio with its interval and its pairs, on one axis that includes 1."""
    found = {arm.arm.name: ratio for arm in answer.others if (ratio := arm.headline or arm.step_ratio) is not None}
    if not found:
        return {"forest": []}
    values = [1.0]
    for ratio in found.values():
        values += [ratio.value, *(value for _, value in ratio.by_pair), *(end for end in (ratio.low, ratio.high) if end is not None)]
    low, high = min(values), max(values)
    margin = max(0.02, 0.08 * (high - low))
    low, high = max(0.0, low - margin), high + margin

    def at(value: float) -> float:
        return round(100 * (value - low) / (high - low), 2)

    rows = []
    for name, ratio in found.items():
        span = (
            None if ratio.low is None or ratio.high is None else {"left": at(ratio.low), "width": round(at(ratio.high) - at(ratio.low), 2)}
        )
        clock = "" if answer.arms[name].headline else ", whole step by verl's clock"
        rows.append(
            {
                "name": name,
                "color": colors[name],
                "span": span,
                "mid": at(ratio.value),
                "dots": [at(value) for _, value in ratio.by_pair],
                "text": interval(ratio).split(";")[0].replace("95 % interval ", "").rstrip(")") + (")" if span else "") + clock,
            }
        )
    marks = [{**mark, "text": f"{mark['text']}x"} for mark in ticks(high, "", low)]
    return {"forest": rows, "forest_one": at(1.0), "forest_ticks": marks}


def stacks(answer: Comparison) -> Chart:
    """One column per step of each traced arm, all on the same scale."""
    rows = {name: _mean_splits(arm) for name, arm in answer.arms.items()}
    rows = {name: found for name, found in rows.items() if found}
    top = max((sum(split.values()) for found in rows.values() for _, split in found), default=1.0) * 1.04
    charts = []
    note = ""
    for name, found in rows.items():
        binned, width = _binned(found)
        note = f" A column is the mean of {width} steps." if width > 1 else note
        columns = []
        for _, split in binned:
            total = sum(split.values()) or 1.0
            parts = [{"kind": key.removesuffix("_s"), "height": round(100 * split[key] / total, 2)} for key in STACKED if split[key] > 0]
            columns.append({"height": round(100 * total / top, 2), "parts": parts})
        mean = sum(sum(split.values()) for _, split in found) / len(found)
        charts.append(
            {
                "name": name,
                "columns": columns,
                "ticks": _step_ticks([number for number, _ in binned], columns=True),
                "spoken": f"{name}: {len(found)} steps of {seconds(mean)} on average",
            }
        )
    return {"stacks": charts, "stack_ticks": _levels(0.0, top, " s"), "stack_note": note}


def curves(answer: Comparison, colors: Mapping[str, int]) -> list[Chart]:
    """Line charts over the training steps: makespan, throughput, reward, validation, response length and step time."""
    wanted = (
        ("makespan of a rollout", "makespan_s", " s"),
        ("tokens trained on per second", "trained/tokens_per_s", ""),
        ("reward", "reward", ""),
        ("validation", "validation", ""),
        ("tokens per response", "response_tokens", ""),
        ("whole training step", "step_s", " s"),
    )
    charts = []
    for title, name, unit in wanted:
        lines = []
        for arm_name, arm in answer.arms.items():
            runs = [[(step.number, value) for step in run.steps if (value := step.get(name)) is not None] for run in arm.runs.values()]
            runs = [run for run in runs if run]
            lines += [(colors[arm_name], "thin", run) for run in runs if len(runs) > 1]
            if runs:
                lines.append((colors[arm_name], "thick", arm.curve(name)))
        points = [point for _, _, line in lines for point in line]
        if not points:
            continue
        steps, values = [step for step, _ in points], [value for _, value in points]
        low, high = _range(values, from_zero=unit == " s")
        first, last = min(steps), max(steps)
        drawn = [{"color": color, "kind": kind, "points": _points(line, first, last, low, high)} for color, kind, line in lines]
        means = [
            f"{arm_name} {sum(v for _, v in arm.curve(name)) / len(arm.curve(name)):.3g}"
            for arm_name, arm in answer.arms.items()
            if arm.curve(name)
        ]
        charts.append(
            {
                "name": title,
                "lines": drawn,
                "levels": _levels(low, high, unit),
                "ticks": _step_ticks(sorted(set(steps))),
                "spoken": f"{title}: mean {', '.join(means)}",
            }
        )
    return charts


def timeline(answer: Comparison, out: Path) -> Chart:
    """The replicas over time in the step with the median ratio; all arms show the same pair and step."""
    chosen = _typical(answer)
    if chosen is None:
        return {"scenes": []}
    pair, number, arms = chosen
    ledger = Ledger(out)
    items = {name: traced_steps(ledger.folder(Key(pair, name)))[number] for name in arms}
    results = {name: answer.arms[name].runs[pair].step(number) for name in arms}
    span = max(step.metrics["makespan_s"] for step in results.values() if step)
    longest = max(1, max(item.output_tokens for work in items.values() for item in work))
    tp, replicas = (answer.machine.engines.tp, answer.machine.engines.replicas) if answer.machine else (1, 1)
    light, dark = palette(LIGHT), palette(DARK)
    scenes = []
    for name, work in items.items():
        step = results[name]
        assert step is not None
        picture = raster(recorded(work, tp, replicas), span, longest)
        end, idle = step.metrics["makespan_s"], step.get("idle_share/mean")
        scenes.append(
            {
                "title": f"{name}: {seconds(end)}" + (f", replicas not decoding {percent(idle)} of the time" if idle is not None else ""),
                "alt": f"{name}: replicas over {seconds(end)}",
                "light": data_uri(png(picture.pixels, light)),
                "dark": data_uri(png(picture.pixels, dark)),
                "bound": None if step.bound_s is None else round(min(99.7, 100 * step.bound_s / span), 2),
                "end": round(min(99.8, 100 * end / span), 2),
            }
        )
    return {
        "scenes": scenes,
        "scene_ticks": ticks(span, " s"),
        "scene_which": f"Step {number} of pair {pair}, the step with the median ratio. As recorded; dashed: its lower bound.",
        "scene_note": SCENE_NOTE,
        "longest": f"{longest:,}",
    }


def predictions(answer: Comparison, colors: Mapping[str, int]) -> list[Chart]:
    """True against predicted remaining tokens, for a sample of turns."""
    charts = []
    for name, arm in answer.arms.items():
        guess = arm.prediction
        if guess is None:
            continue
        rows = [row for run in arm.runs.values() for row in run.predicted]
        shown = Random(0).sample(rows, MOST_DOTS) if len(rows) > MOST_DOTS else rows
        top = max(10.0, max(max(row[1], row[2]) for row in shown))
        decades = log10(top) * 1.02

        def at(value: float, decades: float = decades) -> float:
            return round(100 * log10(max(1.0, value)) / decades, 2)

        rank = f"rank correlation {guess.rank:.2f}, " if guess.rank is not None else ""
        covered = f", {percent(guess.covered)} below the predicted 0.9 quantile" if guess.covered is not None else ""
        levels = [
            {"at": at(10.0**power), "text": f"{10**power:,}", "kind": "low first" if power == 0 else "top" if at(10.0**power) > 92 else ""}
            for power in range(int(decades) + 1)
        ]
        text = (
            f"{count(guess.turns)} turns: {rank}half within a factor of {guess.factor:.2f}, sum {guess.bias:.2f} of the true sum{covered}."
        )
        charts.append(
            {
                "name": name,
                "color": colors[name],
                "dots": [(at(row[2]), round(100 - at(row[1]), 2)) for row in shown],
                "levels": levels,
                "told": text,
                "spoken": f"{name}: {text}",
            }
        )
    return charts


def _typical(answer: Comparison) -> tuple[int, int, list[str]] | None:
    """Pair, step and traced arms of the median ratio, taken over the first arm that shares steps with the base."""
    base = answer.base
    for arm in answer.others:
        if arm.split is None:
            continue
        rows: list[tuple[float, int, int]] = []
        for pair, run in arm.runs.items():
            other = base.runs.get(pair)
            for step in run.warm if other else ():
                theirs: Step | None = other.step(step.number) if other else None
                if theirs is not None and "makespan_s" in theirs.metrics and "makespan_s" in step.metrics:
                    rows.append((log(theirs.metrics["makespan_s"] / step.metrics["makespan_s"]), pair, step.number))
        if rows:
            _, pair, number = sorted(rows)[(len(rows) - 1) // 2]
            names = [name for name, one in answer.arms.items() if pair in one.runs and (s := one.runs[pair].step(number)) and s.split]
            return pair, number, names[:4]
    return None


def _mean_splits(arm: ArmResult) -> list[tuple[int, dict[str, float]]]:
    """(step, mean split over the runs) for every traced step."""
    by_step: dict[int, list[dict[str, float]]] = {}
    for run in arm.runs.values():
        for step in run.steps:
            if step.split is not None:
                by_step.setdefault(step.number, []).append(step.split)
    return [(number, {key: sum(one[key] for one in found) / len(found) for key in STACKED}) for number, found in sorted(by_step.items())]


def _binned(found: list[tuple[int, dict[str, float]]]) -> tuple[list[tuple[int, dict[str, float]]], int]:
    width = -(-len(found) // MOST_COLUMNS)
    groups = [found[index : index + width] for index in range(0, len(found), width)]
    return [(group[0][0], {key: sum(split[key] for _, split in group) / len(group) for key in STACKED}) for group in groups], width


def _points(line: Sequence[tuple[int, float]], first: int, last: int, low: float, high: float) -> str:
    wide = max(1, last - first)
    if len(line) == 1:
        line = [(first, line[0][1]), (last if last > first else first + 1, line[0][1])]
    return " ".join(f"{100 * (step - first) / wide:.2f},{100 - 100 * (value - low) / (high - low):.2f}" for step, value in line)


def _range(values: Sequence[float], from_zero: bool) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = max(0.06 * (high - low), 0.02 * abs(high), 1e-3)
    return (0.0 if from_zero and low >= 0 else low - margin), high + margin


def _levels(low: float, high: float, unit: str) -> list[Chart]:
    """Marks of a vertical axis, positioned by height in percent."""
    marks = [mark for mark in ticks(high, "", low) if mark["at"] <= 98]
    kept = marks[:: 1 + len(marks) // 5]
    return [
        {
            "at": mark["at"],
            "text": mark["text"] + (unit if index == len(kept) - 1 else ""),
            "kind": "low" if mark["at"] < 3 else "top" if mark["at"] > 92 else "",
        }
        for index, mark in enumerate(kept)
    ]


def _step_ticks(numbers: Sequence[int], columns: bool = False) -> list[Chart]:
    """Up to six step numbers below a chart, centred on their column or placed at their point."""
    some = numbers[:: -(-len(numbers) // 6)]
    first, wide = numbers[0], max(1, numbers[-1] - numbers[0])
    marks = []
    for number in some:
        at = 100 * (numbers.index(number) + 0.5) / len(numbers) if columns else 100 * (number - first) / wide
        kind = "" if columns else "first" if at < 2 else "last" if at > 96 else ""
        marks.append({"at": round(at, 2), "text": f"step {number}" if number == first else f"{number}", "kind": kind})
    return marks
