"""Several arms over several draws, side by side: the numbers behind `verl-heddle simulate` and `verl-heddle plan`.

Ratios are taken within a draw and then summarised, because draws differ far more than arms do. A summary is the lower median: the value
of a draw that was really simulated, so that a makespan and its split belong together. A difference counts (`wins`) when it has the same
sign in every draw and its median is at least `WORTH`; everything else is called chance.

The mixed layout that is asked about beside every fixed degree: what the planner between steps would make of the history.

Lengths are told by history alone, as a run's second epoch has it: a prompt's median is that of its trajectories in the epoch before, the
spread is that within prompts; with no history all are alike. One layout is taken for all draws, from the first, since one is pasted.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import exp, inf, log, sqrt
from statistics import fmean, median_low
from typing import TypeVar

from verl_heddle.layout.feasible import packed
from verl_heddle.layout.price import Site, coming, free
from verl_heddle.place.pace import habit_of
from verl_heddle.predict.quantities import LOGISTIC
from verl_heddle.report.draws import Source
from verl_heddle.report.play import Run
from verl_heddle.report.pool import Pool, Progress, Wanted
from verl_heddle.report.rules import RULES, is_file, rule_of
from verl_heddle.report.setting import Setting
from verl_heddle.report.words import mixture
from verl_heddle.simulate import Bound
from verl_heddle.simulate.workload import most_kv

NODE = 8
"""GPUs of a node, as everywhere in the latency tables."""


def mixed_layout(setting: Setting, source: Source) -> tuple[int, ...]:
    """Degrees, most GPUs first; empty where one degree for all is forecast to be as good as any mix."""
    draw = source.draws[0]
    seen = [item for step in draw.before or draw.steps for item in step if item.output_tokens]
    habit = habit_of(seen)
    work = [item for step in draw.steps for item in step]
    if habit is None or setting.gpus < 2:
        return ()
    known: dict[str, list[float]] = defaultdict(list)
    for item in seen:
        known[item.prompt_id].append(log(item.output_tokens))
    logs = [value for values in known.values() for value in values]
    usual = fmean(logs)
    means = {prompt: fmean(values) for prompt, values in known.items()} if draw.before else {}
    spread = fmean([(value - means.get(prompt, usual)) ** 2 for prompt, values in known.items() for value in values])
    medians = [exp(means.get(item.prompt_id, usual)) for item in draw.steps[0]]
    most = max(item.output_tokens for item in seen)
    step = coming(medians, LOGISTIC * sqrt(spread), most if draw.before else inf)
    needed = most_kv(work)
    site = Site(
        setting.latency,
        setting.gpus,
        min(NODE, setting.gpus),
        setting.slots,
        setting.utilization,
        setting.kv_tokens,
        longest_context=needed,
    )
    able = site.degrees()
    if len(able) < 2:
        return ()
    layout = free(step, setting.gpus, {tp: site.tempo(tp, len(medians), habit) for tp in able}).layout
    return packed(layout, site.gpus_per_node) if len(set(layout)) > 1 and sum(layout) == setting.gpus else ()


T = TypeVar("T")

WORTH = 1.02
"""Smallest ratio of makespans called a difference: 2 %, about what other tie-breaks of the router move a large step by."""

MIXED = "heddle_mixed"

PEERS = tuple(name for name in RULES if name not in ("stock", "heddle", "heddle_place", MIXED, "lpt_oracle"))

ARMS = ("stock", "stock_best_tp", *PEERS, "heddle", "heddle_place", "heddle_best_tp", "lpt_oracle")
"""Every arm of `study`, in the order of a table."""


@dataclass(frozen=True)
class Row:
    """One arm over all draws: `runs`, `bounds_s` and `stock` (the baseline's runs) in the order of the draws."""

    name: str
    title: str
    rule: str
    tp: int
    runs: tuple[Run, ...]
    bounds_s: tuple[float, ...]
    stock: tuple[Run, ...]
    layout: tuple[int, ...] = ()
    """Of mixed degrees; `tp` is then the highest."""
    gpus: int = 0
    """Of the whole fleet, whatever part of it was simulated."""
    trajectories: float = 1.0
    """Of a step, in the mean, in the typical draw."""

    @property
    def degrees(self) -> str:
        """As "4", or "4+2+1+1", or "2x8+12x4" of a mixed layout."""
        return mixture(self.layout) if self.layout else str(self.tp)

    @property
    def where(self) -> str:
        """As "tp=4", or "on 4+2+1+1"."""
        return f"on {self.degrees}" if self.layout else f"tp={self.tp}"

    @cached_property
    def typical(self) -> Run:
        """The run of median makespan."""
        return median_by(self.runs, lambda run: run.makespan_s)

    @property
    def gpu_hours(self) -> float:
        """Of a step: all GPUs, from the begin of the weight sync to the last trajectory's end."""
        return self.gpus * self.typical.step_s / 3600

    @property
    def gpu_hours_per_1000(self) -> float:
        """Of a thousand trajectories."""
        return 1000 * self.gpu_hours / self.trajectories

    @property
    def makespans_s(self) -> list[float]:
        """By draw."""
        return [run.makespan_s for run in self.runs]

    @property
    def speedups(self) -> list[float]:
        """Stock's step over this arm's, weight sync included, by draw."""
        return self.ratios(None)

    @property
    def speedup(self) -> float:
        """Median over the draws."""
        return median_low(self.speedups)

    @property
    def bound_fractions(self) -> list[float]:
        """Lower bound over makespan, by draw: 1 cannot be beaten."""
        return [low / run.makespan_s for low, run in zip(self.bounds_s, self.runs, strict=True)]

    @property
    def bound_fraction(self) -> float:
        """Median over the draws."""
        return median_low(self.bound_fractions)

    def ratios(self, over: Row | None) -> list[float]:
        """Step of `over` (None: stock) over this arm's, weight sync included, by draw."""
        others = self.stock if over is None else over.runs
        return [other.step_s / run.step_s for other, run in zip(others, self.runs, strict=True)]


@dataclass(frozen=True)
class Answer:
    """`rows` by name, the first one stock at the user's degree; `bounds` by draw and step."""

    setting: Setting
    source: Source
    rows: Mapping[str, Row]
    bounds: tuple[tuple[Bound, ...], ...]

    @property
    def stock(self) -> Row:
        """Stock verl as the user runs it."""
        return next(iter(self.rows.values()))

    @property
    def typical(self) -> int:
        """Index of the draw in which stock's makespan is the median: the one that is told of and drawn."""
        return self.stock.runs.index(self.stock.typical)

    @property
    def bound_s(self) -> float:
        """The bound of that draw, mean over its steps."""
        return self.stock.bounds_s[self.typical]

    @property
    def worst_bound(self) -> Bound:
        """The largest bound of a step of that draw."""
        return max(self.bounds[self.typical], key=lambda one: one.makespan_s)


def wins(ratios: Iterable[float]) -> bool:
    """Whether ratios of makespans, one per draw, say faster, by enough and not by chance."""
    values = list(ratios)
    return min(values) > 1.0 and median_low(values) >= WORTH


def loses(ratios: Iterable[float]) -> bool:
    """Whether they say slower."""
    return wins(1.0 / ratio for ratio in ratios)


def median_by(items: Sequence[T], key: Callable[[T], float]) -> T:
    """The item whose key is the lower median; the first of equals."""
    middle = median_low(key(item) for item in items)
    return next(item for item in items if key(item) == middle)


def study(setting: Setting, source: Source, arms: Sequence[str], jobs: int | None = None, progress: Progress | None = None) -> Answer:
    """Simulate `arms` (names of `ARMS` and files of policies; stock always comes along): rules at the user's degree, and stock and heddle
    at stock's best.

    Raises:
        ValueError: an unknown arm, or no replica of the degree that the user chose holds the longest turn.
    """
    own = list(dict.fromkeys(filter(is_file, arms)))
    for name in own:
        rule_of(name)  # what is wrong with it is said before anything is simulated
    if unknown := [name for name in arms if name not in ARMS and name not in own]:
        raise ValueError(f"unknown arm {unknown[0]!r}; there are {', '.join(ARMS)}, and files of policies (docs/simulate.md)")
    setting, source, able = _fitted(setting, source)
    names = [*(name for name in ARMS if name == "stock" or name in arms), *own]
    wanted: list[Wanted] = [(name, setting.tp) for name in names if name in RULES or name in own]
    if any(name.endswith("_best_tp") for name in names):
        wanted += [("stock", tp) for tp in able if tp != setting.tp]
    later = "heddle_best_tp" in names
    with Pool(setting, source.draws, len(wanted) + later + 1, jobs, progress) as pool:
        bounds, runs = pool.bounds(), pool.runs(wanted)
        best = min((tp for name, tp in wanted if name == "stock"), key=lambda tp: (_median_s(runs["stock", tp]), tp))
        if later and ("heddle", best) not in runs:
            runs |= pool.runs([("heddle", best)])
    at = {name: (name.removesuffix("_best_tp"), best) if name.endswith("_best_tp") else (name, setting.tp) for name in names}
    return Answer(setting, source, _rows(at, runs, bounds, setting, source), bounds)


def ranking(setting: Setting, source: Source, jobs: int | None = None, progress: Progress | None = None) -> Answer:
    """Simulate stock and heddle at every degree that works, stock with KV offload at the user's, and heddle on the best mixed layout; rows
    `stock`, then `stock_tp<n>`, `heddle_tp<n>`, `stock_tier` and `heddle_mixed`, fastest first.

    Raises:
        ValueError: a replica of the user's degree does not hold the longest turn.
    """
    setting, source, able = _fitted(setting, source)
    wanted: list[Wanted] = [(rule, tp) for rule in ("stock", "heddle") for tp in able]
    wanted.append(("stock_tier", setting.tp))
    setting = replace(setting, mixed=mixed_layout(setting, source))
    if setting.mixed:
        wanted.append((MIXED, max(setting.mixed)))
    with Pool(setting, source.draws, len(wanted) + 1, jobs, progress) as pool:
        bounds, runs = pool.bounds(), pool.runs(wanted)
    order = sorted(wanted, key=lambda arm: (_median_s(runs[arm]), wanted.index(arm)))  # of equals stock, then the smaller degree
    own = (MIXED, "stock_tier")  # one row each
    at = {"stock": ("stock", setting.tp)} | {rule if rule in own else f"{rule}_tp{tp}": (rule, tp) for rule, tp in order}
    return Answer(setting, source, _rows(at, runs, bounds, setting, source), bounds)


def _fitted(setting: Setting, source: Source) -> tuple[Setting, Source, tuple[int, ...]]:
    """At a degree that holds the work, which is noted where it is another one; and all that do."""
    work = [item for draw in source.draws for step in draw.steps for item in step]
    setting, why = setting.holding(work)
    return setting, replace(source, notes=(*source.notes, why)) if why else source, setting.able(work)


def _median_s(runs: Sequence[Run]) -> float:
    return median_low(run.makespan_s for run in runs)


def _rows(
    at: Mapping[str, Wanted],
    runs: Mapping[Wanted, tuple[Run, ...]],
    bounds: tuple[tuple[Bound, ...], ...],
    setting: Setting,
    source: Source,
) -> dict[str, Row]:
    base = runs["stock", setting.tp]
    steps = source.draws[base.index(median_by(base, lambda run: run.makespan_s))].steps
    gpus = source.gpus or setting.gpus
    trajectories = sum(map(len, steps)) / len(steps) * gpus / setting.gpus
    lows = tuple(sum(one.makespan_s for one in steps) / len(steps) for steps in bounds)
    titles = {"stock_best_tp": "stock verl at its best fixed tp", "heddle_best_tp": "heddle at stock's best tp"}
    return {
        name: Row(
            name,
            titles.get(name) or rule_of(rule).title,
            rule,
            degree,
            runs[rule, degree],
            lows,
            base,
            setting.mixed if rule == MIXED else (),
            gpus,
            trajectories,
        )
        for name, (rule, degree) in at.items()
    }
