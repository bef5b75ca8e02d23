"""Render the HTML pages: templates, their common style (`look.css.j2`) and axes. Pages are self-contained: no loads, no scripts."""

from __future__ import annotations

from importlib.resources import files
from math import floor, log10
from typing import Any

from verl_heddle.report.raster import DARK, LIGHT, Scheme


def render(template: str, **values: Any) -> str:
    """Render a template of this folder; the template engine escapes the values."""
    from jinja2 import Environment, FunctionLoader

    folder = files("verl_heddle.report")
    loader = FunctionLoader(lambda name: folder.joinpath(name).read_text(encoding="utf-8"))
    look = {
        "light_vars": _variables(LIGHT),
        "dark_vars": _variables(DARK),
        "ramp_vars": ", ".join(f"var(--l{index})" for index in range(len(LIGHT.lengths))),
        "hist_rules": " ".join(f".b{index} {{ fill: var(--l{index}); }}" for index in range(len(LIGHT.lengths))),
    }
    return Environment(autoescape=True, loader=loader).get_template(template).render(**look, **values).rstrip() + "\n"


def ticks(end: float, unit: str, start: float = 0.0) -> list[dict[str, Any]]:
    """Three to six ticks at round values from `start` to `end`, positions in percent; few enough for a phone. The first shows the unit."""
    rough = (end - start) / 5
    base = 10.0 ** floor(log10(rough))
    step = next(base * factor for factor in (1, 2, 5, 10) if base * factor >= rough)
    first = int(-(-start // step))
    marks: list[dict[str, Any]] = []
    for index in range(first, int(end / step + 1e-9) + 1):
        at = 100 * (index * step - start) / (end - start)
        text = f"{index * step:,.{max(0, -floor(log10(step)))}f}"
        kind = "first" if at < 1 else "last" if at > 96 else ""
        marks.append({"at": round(at, 2), "text": text + unit if not marks and index == first and start == 0 else text, "kind": kind})
    if start == 0:
        marks[0]["text"] = f"0{unit}"
    return marks


def _variables(scheme: Scheme) -> str:
    named = {name: getattr(scheme, name) for name in ("background", "idle", "text", "muted", "bound")}
    named |= {f"l{index}": color for index, color in enumerate(scheme.lengths)}
    return " ".join(f"--{name}: {color};" for name, color in named.items())
