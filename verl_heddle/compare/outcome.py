"""What a comparison leaves behind: `compare.json` and `report.html`, after every pair; then the table and W&B's summary."""

from __future__ import annotations

from pathlib import Path

from verl_heddle.compare.document import document
from verl_heddle.compare.ledger import Ledger
from verl_heddle.compare.measure import measured
from verl_heddle.compare.plan import Plan, write_json
from verl_heddle.compare.progress import Say
from verl_heddle.compare.result import Comparison, comparison
from verl_heddle.compare.text import report
from verl_heddle.latency import LatencyModel

JSON, PAGE = "compare.json", "report.html"


def write(plan: Plan, out: Path, warmup: int, table: LatencyModel | None, shell: str) -> Comparison:
    """Read the finished runs and write the two files; `shell` is the command as typed, for the page.

    Raises:
        ValueError: a trace is damaged.
        OSError: the disk refuses.
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


def publish(answer: Comparison, out: Path, say: Say) -> None:
    """Print the table and where everything is; log the summary to W&B if runs are logged there and a pair is finished."""
    print(report(answer), flush=True)
    compared = any(arm.headline or arm.step_ratio for arm in answer.others)
    if answer.plan.wandb and compared:
        from verl_heddle.compare.wandb_summary import offline_runs, summarise

        where = summarise(answer, out)
        print(f"W&B: group {answer.plan.name}, {where}")
        if runs := offline_runs(out):
            print(f"  {len(runs)} W&B runs are offline; one of them: wandb sync {runs[-1]}")
            print(f"  all of them: wandb sync {out}/runs/*/wandb/offline-run-* {out}/wandb/offline-run-*")
    print(f"page: {out / PAGE}\nJSON: {out / JSON}")
    if not answer.in_windows:
        print(f"why was a step slow: verl-heddle explain {out}")
