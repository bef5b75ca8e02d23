"""What `heddle.auto` is worth: runs of 30 steps in which it chooses between resident sets and verl's own rule, all simulated.

    python bench/auto/run.py               all scenes; writes bench/results/simulated/auto.json and the README's table
    python bench/auto/run.py --quick       one scene, four steps, printed only
    python bench/auto/run.py --table       only write the README's table again

A run has ten different steps: the first five, three times over, then the others; over a run lengths grow by half. Each step is played under
both rules, as what would have happened, and under both again with other random ties, as what the twin makes of it; that is what is stored.
The choice is applied to it when the table is written: it sees the twin's answer one step late, as in a run. Also: other fixed rules on
cells of the map, and large steps of which the twin plays a part (`judge.sampled`). Open traces are read from VERL_HEDDLE_TRACES or
../shared/traces; without them those rows are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "bench" / "regimes")]

from cells import GPU, SLOTS, Cell, cells, draw

from bench.marked import fill
from bench.provenance import FOLDER, measured_again, save
from verl_heddle.latency import LatencyModel
from verl_heddle.options import Options, Place, Residents
from verl_heddle.orchestrator import Orchestrator
from verl_heddle.report.draws import recorded
from verl_heddle.report.play import engine_for, teach
from verl_heddle.report.recorded import Engines
from verl_heddle.report.setting import Setting, setting
from verl_heddle.simulate import simulate
from verl_heddle.simulate.baselines import Stock
from verl_heddle.traces import TraceError, trace_files
from verl_heddle.trajectory import Trajectory
from verl_heddle.twin import MOST_ERROR
from verl_heddle.twin.choice import Choice
from verl_heddle.twin.judge import sampled, turns_of

STEPS, TIMES, REPLICAS = 10, 3, 2
"""Different steps of a run, how often each comes, and replicas."""

GROWS = 1.5
"""Factor by which lengths grow over a run."""

TRACE_SLOTS = (32, 256)
NEAR = 0.97
"""At least so fast as the better fixed rule, in hindsight."""

Step = Sequence[Trajectory]


@dataclass(frozen=True)
class Scene:
    """A run. The rest is what goes wrong in it."""

    name: str
    group: str
    cell: Cell | None = None
    trace: str = ""
    slots: int = SLOTS
    tools_double: bool = False
    """Tool times are twice as long from the middle on."""
    explodes: bool = False
    """In every third step, the samples of one prompt are five times as long."""
    reading: float = 1.0
    """Reading contexts is believed to take so many times as long as it does, by resident sets and by the twin."""
    flatters: float = 1.0
    """The twin makes verl's rule so many times as fast as it is."""


HARD = (Cell("Qwen3-30B-A3B", 128, 0.5, 0.3), Cell("Qwen3-8B", 128, 0.9, 0.3), Cell("Qwen3-32B", 64, 0.9, 0.6))
FIXED = {
    "resident sets, least served first": Options(),
    "by arrival": Options(residents=Residents(order="by_arrival")),
    "longest predicted first": Options.longest(),
    "planned placement": Options(place=Place(enable=True)),
}
RULE_CELLS, RULE_SEEDS = 15, (0, 1)
"""How many cells of the map, spread over it, and draws."""

LARGE = (
    *(Cell("Qwen3-32B", 128, sigma, share) for sigma, share in ((0.9, 0.3), (1.3, 0.0))),
    *(Cell("Qwen3-8B", 128, sigma, share) for sigma, share in ((0.9, 0.3), (0.5, 0.6))),
    *(Cell("Qwen3-30B-A3B", 128, sigma, share) for sigma, share in ((0.5, 0.3), (0.9, 0.0))),
)
"""Cells whose step is played in part."""

WRONG: dict[str, dict[str, Any]] = {
    "tool times double": {"tools_double": True},
    "a prompt explodes": {"explodes": True},
    "reading believed 30 % slower": {"reading": 1.3},
    "reading believed 30 % faster": {"reading": 0.7},
    "twin flatters verl's rule by 10 %": {"flatters": 1.1},
    "twin flatters resident sets by 10 %": {"flatters": 1 / 1.1},
}


def scenes() -> Iterator[Scene]:
    """The regime map from 64 trajectories per GPU, what goes wrong in three of its cells, and the open traces."""
    for cell in cells():
        if cell.concurrency >= 64:
            yield Scene(_name(cell), "regime map", cell)
    for cell in HARD:
        for name, wrong in WRONG.items():
            yield Scene(f"{_name(cell)}: {name}", "goes wrong", cell, **wrong)
    folder = os.environ.get("VERL_HEDDLE_TRACES", ROOT.parent / "shared" / "traces")
    try:
        files = sorted(trace_files(folder))
    except TraceError as error:
        print(f"open traces left out: {error}", file=sys.stderr)
        return
    for file in files:
        for slots in TRACE_SLOTS:
            yield Scene(f"{file.name.split('.')[0]}, {slots} slots", "open trace", None, str(file), slots)


def _name(cell: Cell) -> str:
    memory = f", memory {cell.utilization:.0%}" if cell.utilization != 0.5 else ""
    return f"{cell.model}, {cell.concurrency} per GPU, sigma {cell.sigma}, tools {cell.tool_share:.0%}{memory}"


@dataclass(frozen=True)
class _Misread:
    """Step times of which those of reading are believed to be others."""

    inner: LatencyModel
    factor: float

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def prefill_s(self, *what: Any) -> Any:
        return self.factor * self.inner.prefill_s(*what)


def _where(scene: Scene) -> Setting:
    """Two replicas of the usual degree, or for a trace of tp 4, as bench/schedule has it."""
    if scene.cell is None:
        return setting("Qwen3-8B", GPU, 4 * REPLICAS, 4, scene.slots)
    usual = setting(scene.cell.model, GPU, 8, None, scene.slots, scene.cell.utilization)
    return replace(usual, gpus=usual.tp * REPLICAS)


def _steps(scene: Scene, where: Setting, number: int) -> Iterator[Step]:
    """Trajectories of each step."""
    work = [item for step in recorded(scene.trace, (0,)).draws[0].steps for item in step] if scene.cell is None else []
    prompts = sorted({item.prompt_id for item in work})
    for index in range(number):
        rng = Random(index)
        if scene.cell is None:
            kept = set(rng.sample(prompts, max(1, len(prompts) // 2)))
            step = [item for item in work if item.prompt_id in kept]
        else:
            step = list(draw(scene.cell, where, index, 1 + (GROWS - 1) * index / STEPS).steps[0])
        if scene.tools_double and index >= number // 2:
            step = [_times(item, tools=2.0) for item in step]
        if scene.explodes and index % 3 == 0:
            which = rng.choice(sorted({item.prompt_id for item in step}))
            step = [_times(item, tokens=5) if item.prompt_id == which else item for item in step]
        yield step


def _times(item: Trajectory, tools: float = 1.0, tokens: int = 1) -> Trajectory:
    turns = [
        replace(turn, output_tokens=tokens * (turn.output_tokens or 0), tool_latency_s=tools * (turn.tool_latency_s or 0.0))
        for turn in item.steps
    ]
    return replace(item, steps=tuple(turns))


def _play(step: Step, where: Setting, latency: Any, believed: Any, rests: bool, seed: int) -> float:
    """Makespan under verl's own rule, or under resident sets that believe these step times."""
    policy: Any = Stock(seed)
    if not rests:
        policy = Orchestrator(Options(seed=seed))
        policy.step_times_known(believed)
    return simulate(step, where.fleet(where.tp), latency, policy, engine=where.engine("fcfs" if rests else "priority")).makespan_s


def measure(scene: Scene, number: int = STEPS) -> dict[str, Any]:
    """The different steps of one run: seconds under verl's rule and under resident sets, as they would take, and as the twin makes them."""
    where = _where(scene)
    believed = _Misread(where.latency, scene.reading)
    steps = []
    for seed, step in enumerate(_steps(scene, where, number)):
        true = [_play(step, where, where.latency, believed, rests, seed) for rests in (True, False)]
        twins = [_play(step, where, believed, believed, rests, 1000 + seed) for rests in (True, False)]
        steps.append({"true_s": true, "twin_s": [twins[0] / scene.flatters, twins[1]]})
    return {"name": scene.name, "group": scene.group, "steps": steps}


def course(row: dict[str, Any]) -> dict[str, Any]:
    """The run: seconds under both fixed rules and under the choice."""
    steps, half = row["steps"], max(1, len(row["steps"]) // 2)
    order = [*steps[:half] * TIMES, *steps[half:] * TIMES]
    choice, late, total, rested, changes = Choice(), dict[str, float](), 0.0, 0, 0
    for number, step in enumerate(order, start=1):
        ran = 0 if choice.rests else 1
        total += step["true_s"][ran]
        rested += choice.rests
        choice.ran(number)
        if late:
            changes += choice.judged(late) is not None
        late = _answer(number, ran, step["true_s"][ran], step["twin_s"])
    stock_s, heddle_s = (sum(step["true_s"][rule] for step in order) for rule in (0, 1))
    about = {"name": row["name"], "group": row["group"]}
    return {**about, "stock_s": stock_s, "heddle_s": heddle_s, "auto_s": total, "rested": rested, "changes": changes}


def _answer(number: int, ran: int, took: float, twins: Sequence[float]) -> dict[str, float]:
    """As `twin.judge.judge` tells, of a step that took so long under verl's rule (0) or resident sets (1)."""
    error = twins[ran] / took - 1
    if abs(error) > MOST_ERROR:
        return {"step": number, "error": error}
    stock_s, heddle_s = (took * one / twins[ran] for one in twins)
    return {"step": number, "error": error, "stock_s": stock_s, "heddle_s": heddle_s, "speedup": stock_s / heddle_s}


def rules(cell: Cell) -> dict[str, Any]:
    """Verl's rule over other fixed rules that a user can have, each with what it learns from one epoch before."""
    where = setting(cell.model, GPU, 8, None, SLOTS, cell.utilization)
    row: dict[str, Any] = {"name": _name(cell), "speedup": {name: [] for name in FIXED}}
    for seed in RULE_SEEDS:
        one = draw(cell, where, seed)
        stock_s = _play(one.steps[0], where, where.latency, where.latency, True, seed)
        for name, options in FIXED.items():
            policy = Orchestrator(replace(options, seed=seed), cap_tokens=one.cap_tokens)
            teach(policy, one)
            policy.step_times_known(where.latency)
            engine = engine_for(options, where)
            played = simulate(one.steps[0], where.fleet(where.tp), where.latency, policy, engine=engine, step=len(one.before))
            row["speedup"][name].append(stock_s / played.makespan_s)
    return row


def rules_table(rows: Sequence[dict[str, Any]]) -> str:
    """Median and least of the draws."""
    lines = ["| cell | " + " | ".join(FIXED) + " |", "|---|" + "---|" * len(FIXED)]
    for row in rows:
        lines.append(f"| {row['name']} | " + " | ".join(" ".join(f"{one:.2f}" for one in row["speedup"][name]) for name in FIXED) + " |")
    return "\n".join(lines)


def part(cell: Cell, replicas: int = 8) -> dict[str, Any]:
    """Verl's rule over resident sets on a large step, and on the part of it that the twin would play were it four times as large."""
    usual = setting(cell.model, GPU, 8, None, SLOTS, cell.utilization)
    where = replace(usual, gpus=usual.tp * replicas)
    whole = list(draw(cell, where, 0).steps[0])
    kept, engines = sampled(whole, Engines(where.tp, SLOTS, replicas, "fcfs"), turns_of(whole) // 4)
    row: dict[str, Any] = {"name": _name(cell), "trajectories": len(whole), "kept": len(kept)}
    for name, step, fleet in (("whole", whole, where), ("part", kept, replace(where, gpus=where.tp * engines.replicas))):
        both = [_play(step, fleet, where.latency, where.latency, rests, 0) for rests in (True, False)]
        row[name] = both[0] / both[1]
    return row


def parts_table(rows: Sequence[dict[str, Any]]) -> str:
    """Speedup of resident sets, on the whole and on the part."""
    lines = ["| step | trajectories | of which played | speedup, whole step | speedup, the part |", "|---|---|---|---|---|"]
    lines += [f"| {row['name']} | {row['trajectories']} | {row['kept']} | {row['whole']:.2f} | {row['part']:.2f} |" for row in rows]
    return "\n".join(lines)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """By group, then every run in which something was changed."""
    lines = [
        "| runs | number | auto over verl's rule | resident sets always | within 3 % of the better one | that rested |",
        "|---|---|---|---|---|---|",
    ]
    rows = [course(row) for row in rows]
    for group in dict.fromkeys(row["group"] for row in rows):
        of = [row for row in rows if row["group"] == group]
        auto, always = ([row["stock_s"] / row[name] for row in of] for name in ("auto_s", "heddle_s"))
        near = sum(min(row["stock_s"], row["heddle_s"]) / row["auto_s"] >= NEAR for row in of)
        spans = (f"{min(values):.3f} to {max(values):.2f}" for values in (auto, always))
        lines.append(f"| {group} | {len(of)} | " + " | ".join(spans) + f" | {near} | {sum(row['rested'] > 0 for row in of)} |")
    lines += [
        "",
        "| runs in which they rested | steps at rest | changes | auto over verl's rule | resident sets always |",
        "|---|---|---|---|---|",
    ]
    for row in sorted((row for row in rows if row["rested"]), key=lambda row: row["stock_s"] / row["heddle_s"]):
        ratios = (f"{row['stock_s'] / row[name]:.3f}" for name in ("auto_s", "heddle_s"))
        lines.append(f"| {row['name']} | {row['rested']} | {row['changes']} | " + " | ".join(ratios) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one scene, four steps, printed only")
    parser.add_argument("--table", action="store_true", help="write the README's table from the results that are there")
    parser.add_argument("--only", default="", metavar="TEXT", help="scenes whose group or name has it, printed only")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: as many as cores)")
    parser.add_argument("--check", type=int, metavar="N", help="measure N runs anew: are they what they were? Then the results still hold")
    arguments = parser.parse_args()
    results = FOLDER / "simulated" / "auto.json"
    if arguments.check:
        known = {scene.name: scene for scene in scenes()}
        rows = [row for row in json.loads(results.read_text())["rows"] if row["name"] in known]
        return measured_again(results, rows, lambda row: measure(known[row["name"]]), arguments.check)
    if arguments.quick:
        print(json.dumps(course(measure(Scene("quick", "quick", Cell("Qwen3-8B", 16, 0.9, 0.3)), 4)), indent=1))
        return
    if not arguments.table:
        todo = [scene for scene in scenes() if arguments.only in f"{scene.group}: {scene.name}"]
        begun, rows = time.monotonic(), []
        with ProcessPoolExecutor(arguments.jobs) as pool:
            for row in pool.map(measure, todo):
                rows.append(row)
                print(f"{len(rows)} of {len(todo)}, {time.monotonic() - begun:.0f} s:", course(row), file=sys.stderr, flush=True)
            if arguments.only:
                print(table(rows))
                return
            parts = list(pool.map(part, LARGE))
            spread = [scene.cell for scene in todo if scene.group == "regime map"]
            others = list(pool.map(rules, spread[:: len(spread) // RULE_CELLS]))
        about = {"kind": "simulated", "gpu": GPU, "replicas": REPLICAS, "steps": STEPS * TIMES}
        save(results, {**about, "rows": rows, "parts": parts, "rules": others})
    told, readme = json.loads(results.read_text()), Path(__file__).with_name("README.md")
    fill(readme, "auto", table(told["rows"]))
    fill(readme, "parts", parts_table(told["parts"]))
    fill(readme, "rules", rules_table(told["rules"]))


if __name__ == "__main__":
    main()
