"""The summary run on W&B: the comparison's table, curves, page and config diff, in the group of its runs. Works offline.

The run keeps its id over all calls of one comparison, so an upload replaces the older summary. Needs `wandb` (`verl-heddle[wandb]`).
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from verl_heddle.compare.document import document
from verl_heddle.compare.launch import wandb_offline
from verl_heddle.compare.measure import SPLIT
from verl_heddle.compare.result import ArmResult, Comparison

CURVES = {
    "makespan_s": "makespan of a rollout, s",
    "trained/tokens_per_s": "tokens trained on per second",
    "reward": "reward",
    "validation": "validation",
    "response_tokens": "tokens of a response",
    "step_s": "training step, s",
}


def summarise(answer: Comparison, out: Path) -> str:
    """Log it; says where it went. Fails softly: a comparison is not lost for W&B's sake."""
    try:
        import wandb
    except ImportError:
        return "no summary: pip install wandb"
    offline = wandb_offline(os.environ) or os.environ.get("WANDB_MODE") == "offline"
    plan = answer.plan
    if offline:
        for old in out.glob(f"wandb/offline-run-*-{plan.summary_id}"):  # of an earlier call, and not uploaded
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
    except Exception as error:  # W&B's own errors have no common base, and none of them may cost the comparison
        return f"no summary ({type(error).__name__}: {' '.join(str(error).split())})"
    return f"summary run {plan.name}-summary in {Path(where).parent}" if offline else f"summary run {plan.name}-summary"


def offline_runs(out: Path) -> list[Path]:
    """W&B's offline folders of all runs and of the summary, not uploaded yet."""
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
    """The columns of the table; the speedup is `headline`."""
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

    told = document(answer)
    parts = (("What came out", told["explanation"]), ("What did not help", told["did_not_help"]), ("To know", told["notes"]))
    return "".join(f"<h3>{title}</h3><ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>" for title, lines in parts if lines)


def _project(answer: Comparison) -> str:
    """The project verl logged the runs to."""
    for arm in answer.arms.values():
        for run in arm.runs.values():
            if isinstance(name := run.config.get("trainer.project_name"), str):
                return name
    return "verl-heddle"
