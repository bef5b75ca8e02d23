"""Renders the comparison as one self-contained HTML page that loads nothing and runs no script.

The templates are `report/look.css.j2` and `report/compare.html.j2`; `charts.py` computes the chart data.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import verl_heddle
from verl_heddle.compare import charts
from verl_heddle.compare.bootstrap import Ratio
from verl_heddle.compare.findings import SPLIT_WORDS, cautions, findings, interval, not_helped
from verl_heddle.compare.measure import WINDOW
from verl_heddle.compare.progress import duration
from verl_heddle.compare.result import ArmResult, Comparison
from verl_heddle.report.html import render
from verl_heddle.report.words import count, number, percent, ratio, seconds

COLORS = 6
"""Number of arm colours; further arms repeat them."""

SHARE_WORDS = [
    ("generate", "generating"),
    ("queue", "waiting"),
    ("tool", "in tools"),
    ("paused", "paused for weight updates"),
    ("other", "other"),
]
"""How trajectories of an asynchronous trainer spend their time: key and label."""

COUNTED = ("decisions/", "outcomes/", "fallbacks/")
"""Prefixes of the metrics shown as counts."""


STEP_ROWS = (
    ("share of trajectory time waiting for a slot", "queue_share"),
    ("share of the makespan a replica is not decoding", "idle_share/mean"),
)
WINDOW_ROWS = (
    ("share of trajectory time waiting", "queue_share"),
    ("share of trajectory time paused for weight updates", "paused_share"),
    ("share of turns interrupted by weight updates", "interrupted_share"),
    ("share of the window an engine has requests", "engines/busy_share"),
)
"""Mean shares shown below the counts: label and metric."""


def page(answer: Comparison, out: Path, shell: str = "") -> str:
    """The HTML text. `out` is the comparison's folder, which holds the timeline's traces; `shell` is the command that made the page."""
    plan = answer.plan
    colors = {name: index % COLORS for index, name in enumerate(answer.arms)}
    bounded = any(arm.bound_fraction is not None for arm in answer.arms.values())
    diff = answer.config_diff()
    diff_arms = list(next(iter(diff.values()))) if diff else []
    return render(
        "compare.html.j2",
        title=f"{plan.name}: {', '.join(arm.arm.name for arm in answer.others)} against {answer.base.arm.name}",
        subtitle=_subtitle(answer),
        tiles=_tiles(answer),
        sentences=findings(answer),
        not_helped=not_helped(answer),
        cautions=cautions(answer),
        rows=[_row(arm, answer) for arm in answer.arms.values()],
        split_words=SHARE_WORDS if answer.in_windows else [(key.removesuffix("_s"), SPLIT_WORDS[key]) for key in charts.STACKED],
        bounded=bounded,
        bound_note=f"Of bound: lower bound over makespan, for these engines; step times: {answer.machine.source}."
        if answer.machine
        else "",
        base=answer.base.arm.name,
        arm_keys=list(colors.items()),
        **charts.forest(answer, colors),
        **charts.stacks(answer),
        in_windows=answer.in_windows,
        curves=charts.curves(answer, colors),
        **charts.timeline(answer, out),
        predictions=charts.predictions(answer, colors),
        counts=_counts(answer),
        diff=[(key, [(name, _cell(row.get(name))) for name in diff_arms]) for key, row in diff.items()],
        diff_arms=diff_arms,
        runs=_runs(answer),
        facts=_facts(answer),
        version=verl_heddle.__version__,
        shell=shell,
    )


def _subtitle(answer: Comparison) -> str:
    plan = answer.plan
    pairs = min((len(arm.runs) for arm in answer.arms.values()), default=0)
    what = f"recipe {plan.recipe}" if plan.recipe else "a verl command"
    warm = f", the first {answer.warmup if answer.warmup > 1 else ''}".rstrip() + " left out" if answer.warmup else ""
    steps = sorted({len(run.steps) for arm in answer.arms.values() for run in arm.runs.values()})
    number_of_steps = " to ".join(map(str, dict.fromkeys((steps[0], steps[-1])))) if steps else "no"
    done = f"{pairs} of {plan.pairs} pair{'s' if plan.pairs > 1 else ''} of real runs finished"
    return f"{what}; {done}, {number_of_steps} steps per run{warm}."


def _tiles(answer: Comparison) -> list[dict[str, str]]:
    best = max((arm for arm in answer.others if arm.headline), key=lambda arm: arm.headline.value if arm.headline else 0.0, default=None)
    base = answer.base
    tiles = []
    if best is not None and (found := best.headline) is not None:
        kind = "best" if found.verdict == "faster" else ""
        tiles.append((kind, f"{best.arm.name} against {base.arm.name}", ratio(found.value), _range(found) or "one step of one pair"))
        rate, theirs = best.trained_tokens_per_s, base.trained_tokens_per_s
        if rate is not None and theirs is not None:
            tiles.append(("", "tokens trained on per second", number(rate), f"{number(theirs)} in {base.arm.name}"))
        took, theirs = best.mean("makespan_s"), base.mean("makespan_s")
        if took is not None and theirs is not None:
            tiles.append(("", "a rollout takes", seconds(took), f"{seconds(theirs)} in {base.arm.name}"))
        if best.bound_fraction is not None and base.bound_fraction is not None:
            tiles.append(
                ("bound", "of the lower bound", percent(best.bound_fraction), f"{percent(base.bound_fraction)} in {base.arm.name}")
            )
    if not tiles:
        tiles.append(("", "finished runs", str(sum(len(arm.runs) for arm in answer.arms.values())), "no pair is complete yet"))
    return [dict(zip(("kind", "what", "value", "note"), tile, strict=True)) for tile in tiles]


def _row(arm: ArmResult, answer: Comparison) -> dict[str, Any]:
    length = WINDOW if answer.in_windows else "makespan_s"
    widest = max((one.mean(length) or 0.0 for one in answer.arms.values()), default=0.0)
    took, share, split = arm.mean(length), arm.bound_fraction, _parts(arm)
    total = sum(split.values())
    parts = [{"kind": kind, "width": round(100 * part / total, 3)} for kind, part in split.items()] if total else []
    headline = arm.headline
    return {
        "name": arm.arm.name,
        "overrides": " ".join(arm.arm.overrides) or "no plugin",
        "parts": parts,
        "width": round(100 * took / widest, 2) if took and widest else 0,
        "bound": round(min(99.5, 100 * share * took / widest), 2) if share is not None and took and widest else None,
        "spoken": f"{arm.arm.name}: {seconds(took)}" if took is not None else arm.arm.name,
        "makespan": seconds(took) if took is not None else "not traced",
        "speedup": ratio(headline.value) if headline else "–",  # noqa: RUF001
        "range": _range(headline, short=True) if headline else "",
        "rate": number(rate) if (rate := arm.trained_tokens_per_s) is not None else "–",  # noqa: RUF001
        "per_token": ratio(arm.throughput_ratio.value) if arm.throughput_ratio else "–",  # noqa: RUF001
        "step": seconds(value) if (value := arm.mean("step_s")) is not None else "–",  # noqa: RUF001
        "step_ratio": f"{ratio(arm.step_ratio.value)} {_range(arm.step_ratio, short=True)}" if arm.step_ratio else "",
        "reward": f"{value:.3f}" if (value := arm.mean("reward")) is not None else "–",  # noqa: RUF001
        "fraction": percent(share) if share is not None else "–",  # noqa: RUF001
    }


def _parts(arm: ArmResult) -> dict[str, float]:
    """The parts of an arm's bar by kind: seconds of the last trajectory, or shares of the time of all trajectories."""
    if (split := arm.split) is not None:
        return {key.removesuffix("_s"): split[key] for key in charts.STACKED}
    shares = {key.removesuffix("_share"): value for key, value in (arm.shares or {}).items()}
    return {**shares, "other": max(0.0, 1.0 - sum(shares.values()))} if shares else {}


def _range(found: Ratio, short: bool = False) -> str:
    if found.low is None or found.high is None:
        return ""
    return f"({found.low:.2f}–{found.high:.2f})" if short else f"95 % interval {found.low:.2f} to {found.high:.2f}"  # noqa: RUF001


def _counts(answer: Comparison) -> list[tuple[str, list[tuple[str, str]]]]:
    """Table rows: decisions by reason, outcomes, fallbacks, moves, preemptions and mean shares."""
    rows = []
    for prefix in COUNTED:
        totals = {name: arm.total(prefix) for name, arm in answer.arms.items()}
        for what in sorted({what for total in totals.values() for what in total}):
            title = {"decisions/": "decision: ", "outcomes/": "trajectories ", "fallbacks/": "fallback: "}[prefix] + what
            rows.append((title, [(name, _count(arm, totals[name].get(what, 0.0))) for name, arm in answer.arms.items()]))
    for title, name in (("turns on a different replica than before", "moves"), ("preemptions in the engine", "preemptions")):
        rows.append((title, [(arm.arm.name, _count(arm, sum(arm.values(name)))) for arm in answer.arms.values()]))
    for title, name in WINDOW_ROWS if answer.in_windows else STEP_ROWS:
        cells = [(arm.arm.name, percent(value) if (value := arm.mean(name)) is not None else "–") for arm in answer.arms.values()]  # noqa: RUF001
        rows.append((title, cells))
    return rows


def _count(arm: ArmResult, value: float) -> str:
    return "–" if arm.split is None and arm.shares is None else count(value)  # noqa: RUF001


def _cell(value: Any) -> str:
    return "(not set)" if value is None else str(value)


def _runs(answer: Comparison) -> list[dict[str, Any]]:
    rows = []
    for key, entry in answer.entries.items():
        result = answer.arms[key.arm].runs.get(key.pair)
        state = "not run yet" if entry is None else entry.state + (f": {entry.why}" if entry.why else "")
        rows.append(
            {
                "folder": f"runs/{key.folder}",
                "seed": answer.plan.seed_of(key.pair),
                "state": state,
                "good": result is not None,
                "steps": len(result.steps) if result else 0,
                "took": duration(entry.seconds) if entry and entry.seconds else "–",  # noqa: RUF001
            }
        )
    return rows


def _facts(answer: Comparison) -> list[tuple[str, str]]:
    plan = answer.plan
    facts = [("command", shlex.join(plan.command))]
    if answer.machine is not None:
        engines = answer.machine.engines
        guessed = f" (assumed: {', '.join(engines.assumed)})" if engines.assumed else ""
        facts.append(("engines", f"{engines.replicas} replicas, tp={engines.tp}, {engines.slots} slots each{guessed}"))
        facts.append(("step times", answer.machine.source))
    facts += [
        ("seeds", f"{', '.join(str(plan.seed_of(pair)) for pair in range(1, plan.pairs + 1))}, the same for all arms of a pair"),
        ("order of runs", "balanced over the pairs"),
        ("interval", "paired bootstrap: pairs, then steps within them, 4,000 draws, 95 %"),
    ]
    for arm in answer.others:
        if arm.throughput_ratio is not None:
            facts.append((f"{arm.arm.name}, per token", interval(arm.throughput_ratio)))
    sums = {name: sum(split.values()) for name, arm in answer.arms.items() if (split := arm.split)}
    if sums:
        facts.append(("accounted time", ", ".join(f"{name} {_accounted(answer.arms[name])}" for name in sums)))
    return facts


def _accounted(arm: ArmResult) -> str:
    worst = arm.values("accounted_share_worst")
    return f"{number(100 * min(worst))} % of the worst trajectory's time" if worst else "unknown"
