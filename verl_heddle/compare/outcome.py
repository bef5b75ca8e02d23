"""Writes the results of a comparison: JSON and HTML files, the text report, and the W&B summary run.

`write` produces `compare.json` and `report.html` after every pair. `publish` prints the text report (one table, findings, caveats) at the
end and logs the summary run (table, curves, page and config diff) to the W&B group of the comparison's runs. The summary works offline and
needs `wandb` (`verl-heddle[wandb]`). Its id is the same in all calls of one comparison, so an upload replaces the older summary.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from verl_heddle.compare.bootstrap import Ratio
from verl_heddle.compare.document import document
from verl_heddle.compare.findings import cautions, findings, not_helped
from verl_heddle.compare.launch import wandb_offline
from verl_heddle.compare.ledger import Ledger
from verl_heddle.compare.measure import SPLIT, measured
from verl_heddle.compare.plan import Plan, write_json
from verl_heddle.compare.result import ArmResult, Comparison, comparison
from verl_heddle.latency import LatencyModel
from verl_heddle.report.words import number

Column = tuple[str, Callable[[ArmResult], str]]


def _number(value: float | None, form: str = "") -> str:
    return "-" if value is None else format(value, form) if form else number(value)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f} %"


def _ratio(found: Ratio | None) -> str:
    if found is None:
        return "-"
    return f"{found.value:.2f}x" + (f" ({found.low:.2f}..{found.high:.2f})" if found.low is not None else "")


COLUMNS: tuple[Column, ...] = (
    ("arm", lambda arm: arm.arm.name),
    ("runs", lambda arm: str(len(arm.runs))),
    ("makespan s", lambda arm: _number(arm.mean("makespan_s"))),
    ("speedup", lambda arm: _ratio(arm.speedup)),
    ("per token", lambda arm: _ratio(arm.throughput_ratio)),
    ("whole step s", lambda arm: _number(arm.mean("step_s"))),
    ("speedup", lambda arm: _ratio(arm.step_ratio)),
    ("reward", lambda arm: _number(arm.mean("reward"), ".3f")),
    ("of bound", lambda arm: _percent(arm.bound_fraction)),
    ("queue", lambda arm: _number(arm.split["queue_s"] if arm.split else None)),
    ("generate", lambda arm: _number(arm.split["generate_s"] if arm.split else None)),
    ("tool", lambda arm: _number(arm.split["tool_s"] if arm.split else None)),
    ("other", lambda arm: _number(arm.split["other_s"] + arm.split["late_start_s"] if arm.split else None)),
)
"""Heading and cell text. The last four columns split the makespan by what the trajectory that ended last was doing, in seconds."""


def _share(name: str) -> Callable[[ArmResult], str]:
    return lambda arm: _percent(arm.shares[name] if arm.shares else None)


WINDOW_COLUMNS: tuple[Column, ...] = (
    ("arm", lambda arm: arm.arm.name),
    ("runs", lambda arm: str(len(arm.runs))),
    ("trained tokens/s", lambda arm: _number(arm.trained_tokens_per_s)),
    ("ratio", lambda arm: _ratio(arm.trained_ratio)),
    ("whole step s", lambda arm: _number(arm.mean("step_s"))),
    ("reward", lambda arm: _number(arm.mean("reward"), ".3f")),
    ("validation", lambda arm: _number(arm.mean("validation"), ".3f")),
    ("generate", _share("generate_share")),
    ("queue", _share("queue_share")),
    ("tool", _share("tool_share")),
    ("paused", _share("paused_share")),
    ("recomputed", lambda arm: _percent(arm.read_again_share)),
    ("age steps", lambda arm: _number(arm.mean("trained/age_steps/mean"), ".1f")),
    ("dropped", lambda arm: _percent(arm.dropped_share)),
)
"""The columns under an asynchronous trainer."""


def table(answer: Comparison) -> str:
    """The comparison as a text table with one row per arm."""
    columns = WINDOW_COLUMNS if answer.in_windows else COLUMNS
    cells = [[heading for heading, _ in columns], *([cell(arm) for _, cell in columns] for arm in answer.arms.values())]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(text.ljust(w) if i == 0 else text.rjust(w) for i, (text, w) in enumerate(zip(row, widths, strict=True))) for row in cells
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def report(answer: Comparison) -> str:
    """The text report shown on the terminal at the end."""
    first = f"the first {answer.warmup} steps" if answer.warmup > 1 else "the first step"
    warm = f"without {first} of each run" if answer.warmup else "all steps"
    over = f"over {answer.base.arm.name} in the same pairs, 95 % interval"
    legend = (
        f"means over steps ({warm}); speedup: {over}; makespan: first\n"
        "start to last end of the step's trajectories, from the trace; queue to other: seconds of the trajectory that ended last"
    )
    if answer.in_windows:
        legend = (
            f"means over the windows between batches ({warm}); ratio: tokens trained on per second, {over};\n"
            "generate to paused: share of the time of trajectories that ended; recomputed: share of prefilled tokens; age: of training data"
        )
    parts = [table(answer), legend, "\n".join(f"- {line}" for line in findings(answer))]
    for heading, lines in (("did not help", not_helped(answer)), ("to know", cautions(answer))):
        if lines:
            parts.append(f"{heading}:\n" + "\n".join(f"- {line}" for line in lines))
    return "\n\n".join(parts) + "\n"


CURVES = {
    "makespan_s": "makespan of a rollout, s",
    "trained/tokens_per_s": "tokens trained on per second",
    "reward": "reward",
    "validation": "validation",
    "response_tokens": "tokens per response",
    "step_s": "training step, s",
}


def summarise(answer: Comparison, out: Path) -> str:
    """Log the summary run; returns a message with its location, or with the reason for a failure. Never raises because of W&B."""
    try:
        import wandb
    except ImportError:
        return "no summary: pip install wandb"
    offline = wandb_offline(os.environ) or os.environ.get("WANDB_MODE") == "offline"
    plan = answer.plan
    if offline:
        for old in out.glob(f"wandb/offline-run-*-{plan.summary_id}"):  # left by an earlier call and never uploaded
            if not list(old.glob("*.synced")):
                shutil.rmtree(old, ignore_errors=True)
    try:
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or _project(answer),
            entity=os.environ.get("WANDB_ENTITY"),
            group=plan.name,
            job_type="summary",
            name=f"{plan.name}-summary",
            id=plan.summary_id,
            resume="allow",
            dir=str(out),
            mode="offline" if offline else None,
            tags=["verl-heddle", "compare"],
            config={**document(answer)["config"], "arms": {arm.arm.name: list(arm.arm.overrides) for arm in answer.arms.values()}},
            settings=wandb.Settings(silent=True, console="off"),
        )
        _log(wandb, run, answer, out)
        where = run.dir
        run.finish()
    except Exception as error:  # W&B's errors have no common base class, and none may cost the comparison
        return f"no summary ({type(error).__name__}: {' '.join(str(error).split())})"
    return f"summary run {plan.name}-summary in {Path(where).parent}" if offline else f"summary run {plan.name}-summary"


def offline_runs(out: Path) -> list[Path]:
    """W&B's offline folders of all runs and of the summary that are not uploaded yet."""
    found = [*sorted(out.glob("runs/*/wandb/offline-run-*")), *sorted(out.glob("wandb/offline-run-*"))]
    return [run for run in found if run.is_dir() and not list(run.glob("*.synced"))]


def _log(wandb: Any, run: Any, answer: Comparison, out: Path) -> None:
    rows, columns = [], ["arm", *_cells(answer.base)]
    for name, arm in answer.arms.items():
        rows.append([name, *_cells(arm).values()])
    media: dict[str, Any] = {
        "compare/arms": wandb.Table(columns=columns, data=rows),
        "compare/config_diff": _diff(wandb, answer),
        "compare/report": wandb.Html(str(out / "report.html"), inject=False),
        "compare/what_came_out": wandb.Html(_sentences(answer)),
    }
    for metric, title in CURVES.items():
        lines = {name: arm.curve(metric) for name, arm in answer.arms.items() if arm.curve(metric)}
        if lines:
            xs, ys = [[step for step, _ in line] for line in lines.values()], [[value for _, value in line] for line in lines.values()]
            media[f"compare/{metric}"] = wandb.plot.line_series(xs=xs, ys=ys, keys=list(lines), title=title, xname="training step")
    run.log(media)
    for name, arm in answer.arms.items():
        for kind in ("speedup", "trained_ratio", "step_ratio", "throughput_ratio"):
            if (found := getattr(arm, kind)) is not None:
                run.summary.update({f"{name}/{kind}": found.value, f"{name}/{kind}_low": found.low, f"{name}/{kind}_high": found.high})
        run.summary.update({f"{name}/{key}": value for key, value in _cells(arm).items() if isinstance(value, float)})


def _cells(arm: ArmResult) -> dict[str, Any]:
    """The values of one arm's row in the W&B table; the speedup is `headline`."""
    found, split = arm.headline, arm.split or dict.fromkeys(SPLIT)
    return {
        "runs": len(arm.runs),
        "speedup": found.value if found else None,
        "low": found.low if found else None,
        "high": found.high if found else None,
        "makespan_s": arm.mean("makespan_s"),
        "trained_tokens_per_s": arm.trained_tokens_per_s,
        "step_s": arm.mean("step_s"),
        "reward": arm.mean("reward"),
        "validation": arm.mean("validation"),
        "tokens_per_s": arm.mean("tokens_per_s"),
        "bound_fraction": arm.bound_fraction,
        "queue_share": arm.mean("queue_share"),
        **{f"last_{key}": split[key] for key in SPLIT},
    }


def _diff(wandb: Any, answer: Comparison) -> Any:
    diff = answer.config_diff()
    names = list(answer.arms)
    return wandb.Table(
        columns=["key", *names], data=[[key, *(str(values.get(name, "")) for name in names)] for key, values in diff.items()]
    )


def _sentences(answer: Comparison) -> str:
    from html import escape

    value = document(answer)
    parts = (("What came out", value["explanation"]), ("What did not help", value["did_not_help"]), ("Notes", value["notes"]))
    return "".join(f"<h3>{title}</h3><ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>" for title, lines in parts if lines)


def _project(answer: Comparison) -> str:
    """The W&B project that verl logged the runs to."""
    for arm in answer.arms.values():
        for run in arm.runs.values():
            if isinstance(name := run.config.get("trainer.project_name"), str):
                return name
    return "verl-heddle"


JSON, PAGE = "compare.json", "report.html"


def write(plan: Plan, out: Path, warmup: int, table: LatencyModel | None, shell: str) -> Comparison:
    """Measure the finished runs and write both files; `shell` is the command as typed, shown on the page.

    Raises:
        ValueError: a trace is damaged.
        OSError: a file cannot be written.
    """
    from verl_heddle.compare.page import page

    notes: list[str] = []
    results, machine = measured(plan, out, warmup, table, notes.append)
    ledger = Ledger(out)
    answer = comparison(plan, results, {key: ledger.entry(key) for key in plan.runs()}, machine, warmup, notes)
    write_json(out / JSON, document(answer))
    draft = out / f".{PAGE}.part"
    draft.write_text(page(answer, out, shell), encoding="utf-8")
    draft.replace(out / PAGE)
    return answer


def publish(answer: Comparison, out: Path) -> None:
    """Print the report and the output paths; log the summary to W&B if the runs are logged there and a pair has finished."""
    print(report(answer), flush=True)
    compared = any(arm.headline or arm.step_ratio for arm in answer.others)
    if answer.plan.wandb and compared:
        where = summarise(answer, out)
        print(f"W&B: group {answer.plan.name}, {where}")
        if runs := offline_runs(out):
            print(f"  {len(runs)} W&B runs are offline; upload one: wandb sync {runs[-1]}")
            print(f"  upload all: wandb sync {out}/runs/*/wandb/offline-run-* {out}/wandb/offline-run-*")
    print(f"page: {out / PAGE}\nJSON: {out / JSON}")
    if not answer.in_windows:
        print(f"why a step was slow: verl-heddle explain {out}")
