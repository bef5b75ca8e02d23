"""The thesis: prediction knows the prompt, shaping removes what prediction cannot know, and each is worth little without the other. All
simulated.

    python bench/shaping/thesis.py --json FILE             # about half an hour on one core; --quick for one regime and seed

Per regime, over stock verl at the usual degree and at its best fixed degree (every degree is simulated, the best taken by the median):

    even shaping     20 of 16 samples for every prompt, shortest-only, at stock's best degree, verl's placement: knows no prompt
    even 24          the same with 24
    shaping          the budget's plan at stock's best degree, verl's placement: knows which prompts are long
    planning         layout and placement of `layout.price` from the same statistics of prompts, no spare samples
    even both        even shaping, and a plan that knows that a group ends with its n-th sample: rows of `shape.outlook`
    even both 24     the same with 24
    both             the budget's plan, and such a plan
    both, last       the same, but the plan prices a group by its last sample, as without shaping
    planning, true   the plan is told the true lengths: what prediction could gain without shaping

and the plugin itself (`Orchestrator`: its predictor, priorities, preemption; taught by the same earlier epoch), each also with the budget's
shaping:

    heddle           as released, at stock's best degree
    placing          with `heddle.place.enable`: placement planned, re-planned, moved
    mixed            the same on the layout of `layout.price`, where it is another one

Statistics (`shape.budget`) come from one earlier epoch of the same prompts: 16 other samples each. That is what the plugin knows at a
step's start. The layout is the best of all fixed ones, each planned or split evenly (which is stock's rule), and the robust plan's, by
the expected makespan. In the parts placement is decided once and kept; nothing is re-planned or moved, and priorities are off. The plugin's
own re-planner takes no account of shaping.
Regimes: many turns with and without tools and single turns, group of 16, 70 % of the variance of log length between prompts.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from math import exp, inf
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from bench.provenance import save
from bench.shaping.arms import FREE
from bench.shaping.cases import Pool, pooled
from verl_heddle.layout.price import Coming, Priced, free, priced
from verl_heddle.options import Options, Place, Shape
from verl_heddle.orchestrator import Orchestrator
from verl_heddle.place.outlook import GRID, curves
from verl_heddle.place.pace import Tempo, habit_of
from verl_heddle.report.draws import Draw
from verl_heddle.report.play import engine_for, teach
from verl_heddle.report.setting import Setting, setting
from verl_heddle.shape.outlook import live
from verl_heddle.shape.plan import StepPlan, plain
from verl_heddle.shape.settings import ShapeReason
from verl_heddle.shape.shaper import Shaper, fleet_of
from verl_heddle.simulate import Result, lower_bound, make_fleet, simulate
from verl_heddle.simulate.baselines import Stock
from verl_heddle.simulate.baselines.base import Peer, PeerReason
from verl_heddle.simulate.shaped import Shaped, started
from verl_heddle.simulate.workload import most_kv
from verl_heddle.traces import Tool, generate, split_variance
from verl_heddle.traces.workloads import BETWEEN_SHARE
from verl_heddle.trajectory import Trajectory, TurnStart

GPU, GPUS, SIZE, SIGMA, MEAN_TOKENS, CAP = "h200", 32, 16, 0.9, 8000, 40_960
REGIMES = [(model, per_gpu, 8, tools) for tools in (0.0, 5.0) for model in ("Qwen3-8B", "Qwen3-32B") for per_gpu in (25, 100)]
REGIMES += [(model, per_gpu, 1, 0.0) for model in ("Qwen3-8B", "Qwen3-32B") for per_gpu in (25, 100)]
"""Model, trajectories per GPU under stock, median turns, mean seconds of a tool call."""


class Planned(Peer):
    """Every trajectory lives where the plan says."""

    def __init__(self, where: dict[str, str]) -> None:
        super().__init__()
        self._where = where

    def place(self, turn: TurnStart) -> tuple[str, PeerReason]:
        """As planned."""
        return self._where[turn.trajectory.key], PeerReason.ORACLE


def draw(per_gpu: int, turns: int, tools: float, seed: int) -> tuple[Pool, Pool]:
    """The step's samples, 32 a prompt, and 16 others of the same prompts."""
    made = pooled(
        generate(
            "coding",
            per_gpu * GPUS // SIZE,
            3 * SIZE,
            seed=seed,
            median_tokens=MEAN_TOKENS / exp(SIGMA**2 / 2),
            cap_tokens=CAP,
            median_turns=turns,
            max_turns=1 if turns == 1 else 100,
            tools=(Tool("tool", 1.0, 1.0, 0.8),),
            tool_mean_s=tools,
            **split_variance(SIGMA, BETWEEN_SHARE),
        )
    )
    return {p: items[: 2 * SIZE] for p, items in made.items()}, {p: items[2 * SIZE :] for p, items in made.items()}


class Step:
    """One step of one regime: everything the arms have in common."""

    def __init__(self, where: Setting, per_gpu: int, turns: int, tools: float, seed: int) -> None:
        self.where, self.seed = where, seed
        self.pool, before = draw(per_gpu, turns, tools, seed)
        self.prompts = list(self.pool)
        self.shaper = Shaper(Shape(length_bias=0.2, mixed_loss=1.0), SIZE, CAP)
        for prompt, items in before.items():
            self.shaper.spreads.observe(prompt, [(item.output_tokens, bool(item.meta.get("truncated"))) for item in items])
        self.laws = [self.shaper.spreads.law(prompt) for prompt in self.prompts]
        self.before = tuple(item for items in before.values() for item in items)
        self.habit = habit_of(self.before)
        self.none = StepPlan(tuple(plain(SIZE, CAP, ShapeReason.NO_GAIN) for _ in self.prompts))
        self.stock_batch = started(self.none, self.prompts, self.pool)

    def able(self) -> list[int]:
        """Degrees that hold the model and the longest turn."""
        needed = most_kv(item for items in self.pool.values() for item in items)
        return [tp for tp in self.where.tps if (self.where.kv_tokens[tp] or inf) >= needed]

    def stock(self, tp: int) -> Result:
        """verl at one degree."""
        return self._run(self.stock_batch, self.where.fleet(tp), Stock(self.seed))

    def shaped_plan(self, tp: int) -> StepPlan:
        """Budget and rules, forecast for a fleet of one degree."""
        fleet = fleet_of(self.where.latency, self.where.fleet(tp), self.habit, 2 * SIZE * len(self.prompts))
        return self.shaper.plan(0, self.prompts, fleet)

    def even_plan(self, spare: int) -> StepPlan:
        """So many more of every prompt."""
        settings = Shape(spare=spare, uniform=True, longest=0, **FREE)
        return Shaper(settings, SIZE, CAP).plan(0, self.prompts, None)

    def shaping(self, plan: StepPlan, tp: int) -> Result:
        """Shaping alone."""
        batch = started(plan, self.prompts, self.pool)
        return self._run(batch, self.where.fleet(tp), self._selects(Stock(self.seed), plan, batch))

    def planning(self, plan: StepPlan, rows: Sequence[np.ndarray], medians: Sequence[float]) -> Result:
        """Mixed degrees and placement from rows per trajectory; selection as the plan says."""
        batch = started(plan, self.prompts, self.pool)
        found = self._best(rows, medians)
        fleet = make_fleet(GPUS, found.layout, self.where.latency, self.where.slots, self.where.kv_tokens)
        inner = Planned(_homes(found, batch, fleet)) if found.groups else Stock(self.seed)
        return self._run(batch, fleet, self._selects(inner, plan, batch))

    def plugin(self, plan: StepPlan, place: bool, layout: Sequence[int]) -> Result:
        """The plugin itself on such a fleet, selecting as the plan says."""
        batch = started(plan, self.prompts, self.pool)
        fleet = make_fleet(GPUS, layout, self.where.latency, self.where.slots, self.where.kv_tokens)
        inner = Orchestrator(Options(seed=self.seed, place=Place(enable=place)), cap_tokens=CAP)
        teach(inner, Draw(self.seed, (tuple(batch),), (self.before,)))
        inner.step_times_known(self.where.latency)
        policy = self._selects(inner, plan, batch, step=1)
        return simulate(batch, fleet, self.where.latency, policy, engine=engine_for(Options(place=Place(enable=place)), self.where), step=1)

    def layout(self, plan: StepPlan) -> list[int]:
        """Degrees of the layout that the robust plan would choose, knowing that groups end with their n-th sample."""
        return list(self._best(*self.rows(plan, True)).layout)

    def _best(self, rows: Sequence[np.ndarray], medians: Sequence[float]) -> Priced:
        """The best of all fixed layouts, planned or split evenly, and the free one."""
        tempos = {tp: Tempo(self.where.latency, self._replica(tp), GRID, float(len(rows)), self.habit) for tp in self.able()}
        step = Coming(np.array(medians), np.stack(rows))
        ways = [priced(step, [tp] * (GPUS // tp), tempos) for tp in tempos]
        return min([*ways, free(step, GPUS, tempos)], key=lambda way: way.seconds)

    def rows(self, plan: StepPlan, ends_with_nth: bool) -> tuple[list[np.ndarray], list[float]]:
        """Each trajectory's share of its group's rows, and its predicted median."""
        rows: list[np.ndarray] = []
        medians: list[float] = []
        for law, share in zip(self.laws, plan.shares, strict=True):
            if share.samples == SIZE or not ends_with_nth:
                group = live([law], share.samples, share.samples, inf, CAP)[0, 0]
            else:
                group = live([law], SIZE, share.samples, share.rule.patience_tokens if share.rule.longest else 0.0, CAP)[0, -1]
            rows += [group / share.samples] * share.samples
            medians += [exp(law.mean)] * share.samples
        return rows, medians

    def known(self) -> tuple[list[np.ndarray], list[float]]:
        """The true lengths as rows."""
        tokens = [float(item.output_tokens) for item in self.stock_batch]
        return list(curves(np.array(tokens), 0.0, inf)), tokens

    def _replica(self, tp: int) -> Any:
        return self.where.fleet(tp)[0]

    def _selects(self, inner: Any, plan: StepPlan, batch: Sequence[Trajectory], step: int = 0) -> Shaped:
        return Shaped(inner, Shaper(Shape(mixed_loss=1.0), SIZE, CAP), plan, self.prompts, batch, step)

    def _run(self, batch: Sequence[Trajectory], fleet: Any, policy: Any) -> Result:
        return simulate(batch, fleet, self.where.latency, policy, engine=self.where.engine("fcfs"))


def _homes(found: Priced, batch: Sequence[Trajectory], fleet: Sequence[Any]) -> dict[str, str]:
    keys = [f"0:{item.prompt_id}_{item.trial}" for item in batch]
    return {keys[member]: fleet[number].name for number, group in enumerate(found.groups) for member in group}


def measure(model: str, per_gpu: int, turns: int, tools: float, seeds: int) -> dict[str, Any]:
    """One regime; medians over the seeds of ratios over stock at its best degree."""
    where = replace(setting(model, GPU, GPUS, utilization=0.8), slots=512)
    steps = [Step(where, per_gpu, turns, tools, seed) for seed in range(seeds)]
    able = [tp for tp in steps[0].able() if all(tp in step.able() for step in steps)]
    stocks = {tp: [step.stock(tp).makespan_s for step in steps] for tp in able}
    best = min(able, key=lambda tp: median(stocks[tp]))
    usual = where.tp if where.tp in able else able[0]
    rows: dict[str, list[float]] = {f"stock tp={usual} (usual)": [b / u for b, u in zip(stocks[best], stocks[usual], strict=True)]}
    bounds, spares = [], []
    for number, step in enumerate(steps):
        base = stocks[best][number]
        plan, even, more = step.shaped_plan(best), step.even_plan(SIZE // 4), step.even_plan(SIZE // 2)
        one = [best] * (GPUS // best)
        made = {
            "even shaping": step.shaping(even, best),
            "even 24": step.shaping(more, best),
            "shaping": step.shaping(plan, best),
            "planning": step.planning(step.none, *step.rows(step.none, False)),
            "even both": step.planning(even, *step.rows(even, True)),
            "even both 24": step.planning(more, *step.rows(more, True)),
            "both": step.planning(plan, *step.rows(plan, True)),
            "both, last": step.planning(plan, *step.rows(plan, False)),
            "planning, true": step.planning(step.none, *step.known()),
            "heddle": step.plugin(step.none, False, one),
            "placing": step.plugin(step.none, True, one),
            "heddle, shaping": step.plugin(plan, False, one),
            "placing, shaping": step.plugin(plan, True, one),
        }
        for name, shares in (("mixed", step.none), ("mixed, shaping", plan)):
            layout = step.layout(shares)
            same = made["placing" if shares is step.none else "placing, shaping"]
            made[name] = same if layout == one else step.plugin(shares, True, layout)
        for name, result in made.items():
            rows.setdefault(name, []).append(base / result.makespan_s)
        plain = sum(item.output_tokens for item in step.stock_batch)
        for name in ("even shaping", "even 24", "shaping"):
            rows.setdefault(f"tokens of {name}", []).append(made[name].tokens / plain)
        bounds.append(lower_bound(step.stock_batch, GPUS, where.latency, able, slots=512, kv_tokens=where.kv_tokens).makespan_s / base)
        spares.append(sum(share.samples - SIZE for share in plan.shares) / len(plan.shares))
    about = {"model": model, "per_gpu": per_gpu, "turns": turns, "tools_s": tools, "best_tp": best, "usual_tp": usual, "seeds": seeds}
    told = {name: {"median": median(values), "least": min(values), "most": max(values)} for name, values in rows.items()}
    return about | {"spare": median(spares), "stock_of_bound": median(bounds), "over_best_stock": told}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one regime, one seed")
    parser.add_argument("--seeds", type=int, default=3, help="steps of each regime (3)")
    parser.add_argument("--only", type=int, nargs="+", help="numbers of regimes, from 0")
    parser.add_argument("--json", type=Path, help="put the numbers into this file of bench/shaping/run.py, under `thesis`")
    args = parser.parse_args(argv)
    for number, (model, per_gpu, turns, tools) in enumerate(REGIMES[:1] if args.quick else REGIMES):
        if args.only and number not in args.only:
            continue
        begun = time.process_time()
        found = measure(model, per_gpu, turns, tools, 1 if args.quick else args.seeds)
        print(json.dumps(found), f"({time.process_time() - begun:.0f} s)", flush=True)
        if args.json:
            document = json.loads(args.json.read_text()) if args.json.exists() else {"kind": "simulated", "cases": []}
            same = ("model", "per_gpu", "turns", "tools_s")
            rest = [one for one in document.get("thesis", []) if any(one[name] != found[name] for name in same)]
            save(args.json, document | {"thesis": [*rest, found]}, kept=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
