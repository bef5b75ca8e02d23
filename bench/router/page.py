"""The README's table and picture, from the JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.marked import fill

README = Path(__file__).parent / "README.md"
PICTURE = Path(__file__).parent / "curve.png"
COLORS = {"floor": "#9aa3ad", "stock": "#66707c", "default": "#2a5db0", "place": "#b8420f"}
INK, GRID = "#1b2430", "#e3e7ec"


def write(result: dict[str, Any]) -> None:
    """Both."""
    fill(README, "tables", "\n".join(_tables(result)))
    if any("curve" in found for found in result["options"].values()):
        _picture(result)


def _tables(result: dict[str, Any]) -> list[str]:
    lines = ["Alone, CPU of one core:", "", "| options | a turn, all its events | acquire p50 | p99 | p99.9 |", "|---|---|---|---|---|"]
    for name, found in result["options"].items():
        if "alone" in found:
            took = found["alone"]["acquire_ms"]
            lines.append(
                f"| {name} | {found['alone']['us_per_turn']:.0f} us | {took['p50']:.2f} ms | {took['p99']:.2f} ms | {took['p999']:.2f} ms |"
            )
    for name, found in result["options"].items():
        if "memory" in found:
            rows = found["memory"]["mib"]
            looks = [rows[0], rows[len(rows) // 4 - 1], rows[len(rows) // 2 - 1], rows[-1]]
            told = ", ".join(f"{mib:.0f} MiB after {turns:,}" for turns, mib in looks)
            lines += ["", f"Memory, {name}, {found['memory']['trajectories']:,} trajectories: {told} turns."]
    lines += [
        *_scale(result),
        *_step(result),
        "",
        "Through Ray:",
        "",
        "| options | offered turns/s | answered | that ask | they wait p50 | p99 | p99.9 | the others p99 | turns per call | router CPU "
        "| its share of a core | load's |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, found in result["options"].items():
        for point in found.get("curve", []):
            took, told = point["acquire_ms"], point.get("told_ms")
            others = f"{told['p99']:.2f} ms" if told else "-"
            waits = " | ".join(f"{took[share]:.1f} ms" for share in ("p50", "p99", "p999"))
            lines.append(
                f"| {name} | {point['rate']} | {point['answered_per_s']:.0f} | {point.get('asked_share', 1.0):.0%} | {waits} | {others} "
                f"| {point['turns_per_call']:.1f} "
                f"| {point['actor_us_per_turn']:.0f} us | {point['actor_cpu_share']:.0%} | {point['loaders_cpu_share']:.0%} |"
            )
    return lines


def _scale(result: dict[str, Any]) -> list[str]:
    found = result["options"].get("default", {}).get("scale", {})
    if not found:
        return []
    one = next(iter(found.values()))
    lines = ["", f"Scale, default, {one['replicas']:,} replicas and {one['live']:,} trajectories under way, in one process:", ""]
    lines += [
        "| KV cache | waiting | a turn, all its events | turns that ask | they take p50 | p99 | memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, at in found.items():
        took = at["acquire_ms"]
        lines.append(
            f"| {name} | {at['waiting']:,} | {at['us_per_turn']:.0f} us | {at['asked_share']:.0%} "
            f"| {took['p50']:.2f} ms | {took['p99']:.2f} ms | {at['mib']:.0f} MiB |"
        )
    return lines


def _step(result: dict[str, Any]) -> list[str]:
    rows = []
    for name, found in result["options"].items():
        if "step" in found:
            at = found["step"]
            first, others = at["first_s"], at["others_s"]
            rows.append(
                f"| {name} | {first['p50']:.2f} s | {first['max']:.2f} s | {others['p50']:.3f} s | {others['max']:.3f} s "
                f"| {at['makespan_added_s']:.2f} s | {at['actor_us_per_turn']:.0f} us |"
            )
    if not rows:
        return []
    title = (
        f"A step replayed through Ray: 10,000 trajectories of 20 turns, all begun at once, {at['longest_s']:.0f} s in engines and tools:"
    )
    head = "| options | a first turn waits p50 | at most | its others together p50 | at most | the step is longer by | router CPU a turn |"
    return ["", title, "", head, "|---|---|---|---|---|---|---|", *rows]


def _picture(result: dict[str, Any]) -> None:
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams.update({"font.size": 10, "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK})
    figure = Figure(figsize=(7.5, 4.4), layout="constrained", facecolor="white")
    axes = figure.subplots()
    for name, found in result["options"].items():
        points = found.get("curve", [])
        if points:
            rates = [point["answered_per_s"] for point in points]
            axes.plot(rates, [point["acquire_ms"]["p99"] for point in points], "o-", color=COLORS[name], label=f"{name}, p99")
            axes.plot(rates, [point["acquire_ms"]["p50"] for point in points], "o:", color=COLORS[name], label=f"{name}, p50", markersize=3)
    axes.axhline(2.0, color=INK, linewidth=0.8, linestyle="--")
    axes.annotate("target at 2,000 turns/s", (0.02, 2.0), xycoords=("axes fraction", "data"), fontsize=8.5, va="bottom")
    axes.set(yscale="log", xlabel="turns answered per second", ylabel="acquire, ms (from the call to the answer)")
    axes.grid(color=GRID)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    axes.set_title("Router actor, 64 replicas, 10,000 live trajectories; load and actor share two cores", fontsize=10, loc="left")
    figure.savefig(PICTURE, dpi=120, metadata={"Software": None})
