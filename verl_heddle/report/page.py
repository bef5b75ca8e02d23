"""Render one self-contained HTML page: table, sentences, timeline, lengths, configuration. It loads nothing and runs no script.

The layout is in `page.html.j2`; this module computes the values it shows. The template engine escapes names that come from traces.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

import verl_heddle
from verl_heddle.report.advice import Advice
from verl_heddle.report.figure import Scene, rasters
from verl_heddle.report.html import render, ticks
from verl_heddle.report.raster import DARK, LIGHT, data_uri, palette, png
from verl_heddle.report.study import WORTH, Answer, Row
from verl_heddle.report.text import headline, plan_headline
from verl_heddle.report.words import count, number, percent, ratio, seconds

BINS = 40
"""Bars of the histogram of lengths."""

SCENE_NOTE = (
    "Each band is a replica; the last to finish is on top. It shows the trajectories that hold a slot, longest at the bottom, coloured by "
    "the tokens they generate in all. Its fill grows with the square root of their number and is full at the arm's maximum. Solid line: "
    "end of the step."
)


def page(answer: Answer, sentences: Sequence[str], shown: Sequence[Scene], shell: str = "", advice: Advice | None = None) -> str:
    """Render the page as HTML text.

    Args:
        sentences: the explanation, as printed.
        shown: arms of the timeline.
        shell: the command line that made the page.
        advice: the recommendation and the verl settings to paste; for a plan only.
    """
    setting, about = answer.setting, answer.source.about
    lines = headline(answer) if advice is None else plan_headline(answer, advice)
    return render(
        "page.html.j2",
        title=f"{answer.source.name} on {setting.gpus} x {setting.gpu}",
        command_name="simulate" if advice is None else "plan",
        subtitle=f"One step of rollouts with {setting.model.rsplit(' on ', 1)[0]}, simulated: {_size(answer)}.",
        tiles=_tiles(answer, advice),
        sentences=sentences,
        helps=lines[1],
        paste="" if len(lines) < 3 else lines[2].partition(": ")[2],
        rows=[_row(row, answer) for row in answer.rows.values() if advice is None or row.name != "stock"],
        ranges="In brackets: minimum and maximum over the draws." if len(answer.source.draws) > 1 else "",
        scenes=list(_scenes(shown)),
        ticks=ticks(max(scene.result.makespan_s for scene in shown), " s"),
        longest=f"{max(int(scene.result.output_tokens.max()) for scene in shown):,}",
        scene_note=SCENE_NOTE + (" The slowest of the steps is shown." if about["steps"] > 1 else ""),
        histogram=_histogram(answer),
        facts=_facts(answer),
        version=verl_heddle.__version__,
        shell=shell,
    )


def _size(answer: Answer) -> str:
    work = [item for step in answer.source.draws[answer.typical].steps for item in step]
    steps = answer.source.about["steps"]
    text = f"{count(len(work) / steps)} trajectories, {count(sum(item.output_tokens for item in work) / steps)} tokens"
    return text + (f", mean of {steps} steps" if steps > 1 else "")


def _tiles(answer: Answer, advice: Advice | None) -> list[dict[str, str]]:
    stock = answer.stock
    if advice is None:
        honest = [row for row in answer.rows.values() if row.rule != "lpt_oracle"]
        shortest = min(row.typical.makespan_s for row in honest)
        best = next(row for row in honest if row.typical.makespan_s <= WORTH * shortest)  # the first of equals, so stock wins ties
    else:
        best = advice.row
    base = stock.typical.makespan_s
    stays = (best.rule, best.tp) == (stock.rule, stock.tp)
    spent = f"{number(best.gpu_hours)} GPU-hours"
    note = "stock unchanged: nothing gains 2 %" if stays else f"{best.title}, {best.where}: {ratio(best.speedup)}, {spent}"
    idle, share = percent(stock.typical.idle_share), percent(answer.bound_s / base)
    shortest_s = seconds(best.typical.makespan_s)
    tiles = (
        ("", f"stock verl, tp={stock.tp}", seconds(base), f"{number(stock.gpu_hours)} GPU-hours a step; replicas idle {idle} of the time"),
        ("best", "best arm" if advice is None else "recommended", shortest_s, note),
        ("bound", "lower bound", seconds(answer.bound_s), f"no schedule is faster; {share} of stock"),
    )
    return [dict(zip(("kind", "what", "value", "note"), tile, strict=True)) for tile in tiles]


def _row(row: Row, answer: Answer) -> dict[str, Any]:
    widest = max(other.typical.makespan_s for other in answer.rows.values())
    run = row.typical
    total = sum(run.tail.values()) or 1.0
    low = row.bounds_s[row.runs.index(run)]
    spread = f"({number(min(row.makespans_s))}–{number(max(row.makespans_s))})" if len(row.runs) > 1 else ""  # noqa: RUF001
    return {
        "title": row.title,
        "name": row.name,
        "tp": row.degrees,
        "width": round(100 * run.makespan_s / widest, 2),
        "bound": round(min(99.5, 100 * low / widest), 2),
        "parts": [{"kind": key.removesuffix("_s"), "width": round(100 * value / total, 3)} for key, value in run.tail.items()],
        "spoken": f"{row.title}: {seconds(run.makespan_s)}, lower bound {seconds(low)}",
        "makespan": seconds(run.makespan_s),
        "range": spread,
        "speedup": ratio(row.speedup),
        "gpu_hours": number(row.gpu_hours),
        "per_1000": number(row.gpu_hours_per_1000),
        "fraction": percent(row.bound_fraction),
        "throughput": count(round(run.throughput_tok_s)),
        "moves": count(run.migrations),
        "preemptions": count(run.preemptions),
    }


def _scenes(shown: Sequence[Scene]) -> Iterator[dict[str, Any]]:
    pictures = rasters(shown)
    span = pictures[0].span_s
    light, dark = palette(LIGHT), palette(DARK)
    for scene, picture in zip(shown, pictures, strict=True):
        end = scene.result.makespan_s
        at = 100 * scene.bound_s / span
        yield {
            "title": f"{scene.title}: {seconds(end)}, replicas idle {percent(scene.idle_share)} of the time",
            "alt": f"{scene.title}: {len(scene.result.replicas)} replicas over {seconds(end)}",
            "light": data_uri(png(picture.pixels, light)),
            "dark": data_uri(png(picture.pixels, dark)),
            "bound": round(min(99.7, at), 2),
            "bound_text": seconds(scene.bound_s),
            "flag": f"left: calc({at:.2f}% + 6px)" if at < 60 else f"right: calc({100 - at:.2f}% + 6px)",
            "end": round(min(99.8, 100 * end / span), 2),
        }


def _histogram(answer: Answer) -> dict[str, Any]:
    work = [item for step in answer.source.draws[answer.typical].steps for item in step]
    lengths = np.array([item.output_tokens for item in work], dtype=np.float64)
    top = float(lengths.max())
    counts, _ = np.histogram(lengths, bins=BINS, range=(0, top))
    shades = len(LIGHT.lengths)
    bars = []
    for index, value in enumerate(counts.tolist()):
        height = max(1.5, 100 * value / counts.max()) if value else 0.0
        bars.append({"shade": index * shades // BINS, "height": round(height, 2), "y": round(100 - height, 2)})
    p50, p90 = np.quantile(lengths, [0.5, 0.9], method="higher").tolist()
    note = (
        f"Tokens per trajectory: median {p50:,.0f}, 90th percentile {p90:,.0f}, maximum {top:,.0f} "
        f"({number(top / max(1.0, p50))} times the median). Colours as above."
    )
    return {"bars": bars, "bins": BINS, "ticks": ticks(top, " tokens"), "note": note, "spoken": note}


def _facts(answer: Answer) -> list[tuple[str, str]]:
    setting, about, draws = answer.setting, answer.source.about, answer.source.draws
    held = setting.kv_tokens[setting.tp]
    others = [str(tp) for tp in setting.tps if tp != setting.tp]
    steps = f"{about['steps']} step{'s' if about['steps'] > 1 else ''}"
    memory = f"{setting.utilization:g}" + ("" if held is None else f", {held:,} KV tokens a replica of tp={setting.tp}")
    facts = [
        ("trajectories", f"{answer.source.name}; {count(about['prompts'])} prompts x {count(about['samples'])} samples, {steps}"),
        ("model, GPUs", f"{setting.model}, {setting.gpus} GPUs"),
        ("tensor parallel", f"{setting.tp} (also possible: {', '.join(others) or 'none'})"),
        ("slots (max_num_seqs)", str(setting.slots)),
        ("gpu_memory_utilization", memory),
        ("step times", setting.step_times),
        ("heddle's history", str(about["history"])),
        ("draws", f"{len(draws)}, seeds {', '.join(str(draw.seed) for draw in draws)}"),
    ]
    if setting.overhead_s:
        facts.append(("per turn outside engine and tool", seconds(setting.overhead_s)))
    return facts + [("note", note) for note in answer.source.notes]
