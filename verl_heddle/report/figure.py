"""Draw the timeline as a PNG: one panel per arm, common time axis, replicas as bands (`raster`). Needs matplotlib (`verl-heddle[report]`).

Pictures show the slowest step of the draw in which stock's makespan is the median. It is simulated again for each arm, because results hold
every turn and are not kept while arms are measured. Simulations are bitwise reproducible, so this costs only time.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from verl_heddle.report.play import play
from verl_heddle.report.raster import FIRST, LIGHT, Raster, Scheme, palette, raster
from verl_heddle.report.rules import rule_of
from verl_heddle.report.study import Answer, Row
from verl_heddle.report.words import percent, ratio, seconds
from verl_heddle.simulate import Result


@dataclass(frozen=True, slots=True)
class Scene:
    """One arm's step. `bound_s` is the lower bound of that step."""

    row: Row
    result: Result
    bound_s: float

    @property
    def title(self) -> str:
        """For example "stock verl, tp=1"."""
        return f"{rule_of(self.row.rule).title}, {self.row.where}"

    @property
    def idle_share(self) -> float:
        """Share of the makespan in which a replica was idle, mean over replicas."""
        return max(0.0, float(self.result.summary()["idle_share"]))


def pictured(answer: Answer) -> list[str]:
    """The rows to draw: stock, heddle below it, and the best fixed degree if it differs from the user's."""
    rows = answer.rows
    names = [name for name in ("stock", "heddle") if name in rows]
    better = next((name for name in ("heddle_best_tp", "stock_best_tp") if name in rows), None)
    if better is not None and rows[better].tp != answer.setting.tp:
        names.append(better)
    if len(names) == 1:
        names += [name for name in rows if name != "stock"][:1]
    return names


def scenes(answer: Answer, names: Sequence[str]) -> list[Scene]:
    """Simulate the slowest step again for each of the rows."""
    draw = answer.source.draws[answer.typical]
    played = [play(answer.rows[name].rule, answer.rows[name].tp, answer.setting, draw) for name in names]
    stock = played[0] if names[0] == "stock" else play("stock", answer.setting.tp, answer.setting, draw)
    slowest = max(range(len(stock)), key=lambda index: stock[index].makespan_s)
    low = answer.bounds[answer.typical][slowest].makespan_s
    return [Scene(answer.rows[name], results[slowest], low) for name, results in zip(names, played, strict=True)]


def rasters(shown: Sequence[Scene]) -> list[Raster]:
    """Pictures of the scenes on a common time axis and length scale; a full band is the arm's maximum of running trajectories."""
    span = max(scene.result.makespan_s for scene in shown)
    longest = max(int(scene.result.output_tokens.max()) for scene in shown)
    return [raster(scene.result, span, longest) for scene in shown]


WIDTH_IN, PANEL_IN, DPI = 12.0, 3.9, 130
"""Figure width and panel height in inches, and pixels per inch: 64 replicas get 8 pixels each."""


def timeline(path: str | os.PathLike[str], answer: Answer, shown: Sequence[Scene], scheme: Scheme = LIGHT) -> None:
    """Write the timeline of the given scenes.

    Raises:
        ValueError: matplotlib is missing.
        OSError: the file cannot be written.
    """
    draw(answer, shown, scheme).savefig(path, dpi=DPI, facecolor=scheme.background, format="png")


def need_matplotlib() -> None:
    """Check for matplotlib, so that its absence is reported before the simulation rather than after it.

    Raises:
        ValueError: matplotlib is missing.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError("a PNG needs matplotlib: pip install matplotlib (or use --html, which does not need it)") from None


def draw(answer: Answer, shown: Sequence[Scene], scheme: Scheme) -> Any:
    """The matplotlib figure."""
    need_matplotlib()
    from matplotlib.colors import ListedColormap, Normalize
    from matplotlib.figure import Figure  # without pyplot: no window system, no global state

    pictures = rasters(shown)
    colors = palette(scheme)
    height = PANEL_IN * len(shown) + 1.75
    figure = Figure(figsize=(WIDTH_IN, height))
    panels = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
    figure.subplots_adjust(left=0.055, right=0.985, top=1 - 0.95 / height, bottom=1.05 / height, hspace=0.42 / PANEL_IN)
    figure.text(0.012, 1 - 0.3 / height, _headline(answer), fontsize=15, fontweight="bold", color=scheme.text, va="center")
    first = shown[0].result.makespan_s
    for panel, scene, picture in zip(panels, shown, pictures, strict=True):
        end = scene.result.makespan_s
        panel.imshow(
            colors[picture.pixels], aspect="auto", interpolation="auto", extent=(0, picture.span_s, 0, picture.gpus), rasterized=True
        )
        gain = f", {ratio(first / end)}" if scene is not shown[0] else ""
        title = f"{scene.title}: {seconds(end)}{gain}; replicas idle {percent(scene.idle_share)} of the time"
        panel.set_title(title, loc="left", fontsize=11.5, color=scheme.text, pad=5)
        panel.axvline(scene.bound_s, color=scheme.bound, linewidth=1.6, linestyle=(0, (4, 2)))
        panel.axvline(end, color=scheme.text, linewidth=1.2)
        replicas = len(scene.result.replicas)
        panel.set_ylabel(f"{replicas} replica{'s' if replicas > 1 else ''}", fontsize=10, color=scheme.muted)
        panel.set_yticks([])
        panel.set_xlim(0, picture.span_s * 1.005)
        panel.tick_params(axis="x", colors=scheme.muted, labelsize=9.5, labelbottom=panel is panels[-1])
        for spine in panel.spines.values():
            spine.set_visible(False)
    late = shown[0].bound_s > 0.7 * pictures[0].span_s
    panels[0].annotate(
        f"lower bound {seconds(shown[0].bound_s)}",
        (shown[0].bound_s, 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(-6 if late else 6, -6),
        textcoords="offset points",
        va="top",
        ha="right" if late else "left",
        fontsize=10,
        color=scheme.bound,
        fontweight="bold",
        bbox={"facecolor": scheme.background, "edgecolor": "none", "alpha": 0.85, "pad": 2.0},
    )
    panels[-1].set_xlabel("seconds since the first submit", fontsize=10.5, color=scheme.muted)
    bar = figure.add_axes((0.055, 0.34 / height, 0.26, 0.12 / height))
    from matplotlib.cm import ScalarMappable

    scale = figure.colorbar(
        ScalarMappable(Normalize(0, pictures[0].longest), ListedColormap(colors[FIRST:] / 255.0)), cax=bar, orientation="horizontal"
    )
    figure.text(0.055, 0.53 / height, "tokens of the whole trajectory", fontsize=9.5, color=scheme.muted)
    scale.ax.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    scale.outline.set_visible(False)
    scale.ax.tick_params(colors=scheme.muted, labelsize=8.5, length=2)
    figure.text(
        0.345,
        0.40 / height,
        "Each band is a replica; the last to finish is on top. It shows the trajectories that hold a slot, longest at the bottom.\n"
        "Its fill grows with the square root of their number, full at the arm's maximum. Solid line: end of the step. Simulated.",
        fontsize=9,
        color=scheme.muted,
        va="center",
        linespacing=1.4,
    )
    return figure


def _headline(answer: Answer) -> str:
    setting = answer.setting
    return f"{answer.source.name}: {setting.model}, {setting.gpus} GPUs"
