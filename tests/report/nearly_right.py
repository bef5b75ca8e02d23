"""A small recorded run and a finished comparison of it, with one line of a trace changed; and the command line, called in this process."""

from __future__ import annotations

import contextlib
import io
import json
from functools import cache
from pathlib import Path

from verl_heddle.cli import main
from verl_heddle.compare.launch import METRICS, TRACE
from verl_heddle.compare.ledger import Entry, Ledger
from verl_heddle.compare.plan import HEDDLE, STOCK, Plan, keep
from verl_heddle.latency import LatencyModel
from verl_heddle.simulate import EngineOptions, make_fleet, simulate
from verl_heddle.simulate.baselines import Stock
from verl_heddle.traces import generate, replayable, to_dict

LATENCY = LatencyModel.affine(0.01, 0.0005, 1e-7, prefill_per_token_s=1e-5, prefill_base_s=0.01, tps=(1,))
STEPS, LIVES = 2, 8
ASKED = ("--model", "qwen3-8b", "--gpus", "2", "--seeds", "1", "--jobs", "1")
COMMANDS = ("explain", "simulate", "plan", "compare")


@cache
def _run() -> bytes:
    return json.dumps(_recorded()).encode()


def run() -> list[dict]:
    """The records of a run, anew at each call: to be changed."""
    return json.loads(_run())


def _recorded() -> list[dict]:
    """A run of `STEPS` steps with `LIVES` trajectories each, as a live run writes them."""
    records = []
    for number in range(1, STEPS + 1):
        work = [replayable(item) for item in generate("search", LIVES // 2, 2, seed=number, median_tokens=60, cap_tokens=400)]
        engine = EngineOptions(turn_overhead_s=0.01)
        result = simulate(work, make_fleet(2, 1, LATENCY, 2), LATENCY, Stock(number), engine=engine, step=number)
        for life in result.trajectories():
            for name in ("start_s", "end_s"):
                life.meta[name] += 1e9 + 1e4 * number
            known = {"tp": 1, "slots": 2, "replicas": 2, "order": "fcfs", "run": "r", "wait_s": 0.0, "truncated": False, "kept": True}
            records.append(to_dict(life) | {"meta": life.meta | known})
    return records


def lines(records: list[dict]) -> bytes:
    """As a file; NaN and infinity as Python's JSON writes them."""
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def compared(out: Path, trace: bytes) -> Path:
    """A comparison of one pair that is finished, whose second run has this trace; returns that trace's path."""
    plan = Plan("cmp", ("true",), (STOCK, HEDDLE), 1, 1, STEPS, wandb=False, summary_id="0")
    out.mkdir(parents=True, exist_ok=True)
    keep(out, plan)
    ledger = Ledger(out)
    for key in plan.runs():
        folder = ledger.folder(key)
        (folder / TRACE).mkdir(parents=True, exist_ok=True)
        ledger.write(key, Entry("finished", 1.0, 2.0, code=0))
        logged = [{"step": step, "data": {"timing_s/step": 9.0, "critic/score/mean": 0.5}} for step in range(1, STEPS + 1)]
        (folder / METRICS).write_bytes(lines(logged))
        (folder / TRACE / "trace.jsonl").write_bytes(trace if key.arm == "heddle" else lines(run()))
    return ledger.folder(key) / TRACE / "trace.jsonl"


def call(*words: str) -> tuple[int, str, str]:
    """`verl-heddle <words>`: exit code, stdout, stderr. Anything but an exit code is raised."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(words)
        except SystemExit as stop:
            code = int(stop.code or 0)
    return code, out.getvalue(), err.getvalue()


def ask(command: str, folder: Path, trace: bytes) -> tuple[int, str, str]:
    """One of `explain`, `simulate`, `plan`, `compare` about this trace, `trace.jsonl` in `folder`."""
    if command == "compare":
        compared(folder, trace)
        return call("compare", "--out", str(folder), "--report-only", "--warmup", "0")
    (folder / "trace.jsonl").write_bytes(trace)
    if command == "explain":
        return call("explain", str(folder / "trace.jsonl"))
    more = ("--html", str(folder / "page.html"), *(("--arms", "heddle") if command == "simulate" else ()))
    return call(command, "--trace", str(folder / "trace.jsonl"), *ASKED, *more)


def page(command: str, folder: Path) -> str:
    """What `ask` left of `simulate`, `plan` or `compare`."""
    return (folder / ("report.html" if command == "compare" else "page.html")).read_text(encoding="utf-8")
