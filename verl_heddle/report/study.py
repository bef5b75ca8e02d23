"""Compare several arms over several draws: the numbers behind `verl-heddle simulate` and `verl-heddle plan`.

Summaries. Ratios are taken within a draw and then summarised, because draws differ far more than arms do. A summary is the lower median:
the value of a draw that was simulated, so that a makespan and its split belong together. A difference counts (`wins`) if it has the same
sign in every draw and its median is at least `WORTH`; any other difference is called chance.

Mixed layout. Besides every fixed degree, a plan simulates the mixed layout that the planner between steps would derive from the history.
Lengths come from history alone, as in the second epoch of a run: a prompt's median is that of its trajectories in the previous epoch, and
the spread is the spread within prompts; without history all prompts are alike. The layout of the first draw serves all draws, because the
user pastes a single layout.
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
"""GPUs per node, as in all latency tables."""


def mixed_layout(setting: Setting, source: Source) -> tuple[int, ...]:
    """Degrees of the best mixed layout, most GPUs first; empty if one degree for all replicas is forecast to be as good as any mix."""
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
    degrees = site.degrees()
    if len(degrees) < 2:
        return ()
    layout = free(step, setting.gpus, {tp: site.tempo(tp, len(medians), habit) for tp in degrees}).layout
    return packed(layout, site.gpus_per_node) if len(set(layout)) > 1 and sum(layout) == setting.gpus else ()


T = TypeVar("T")

WORTH = 1.02
"""Smallest ratio of makespans that counts as a difference: 2 %, about how far a large step moves with different router tie-breaks."""

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
    """Degrees of a mixed layout; `tp` is then the highest."""
    gpus: int = 0
    """GPUs of the whole fleet, even if only part of it was simulated."""
    trajectories: float = 1.0
    """Mean trajectories per step of the typical draw, on the whole fleet."""

    @property
    def degrees(self) -> str:
        """For example "4"; for a mixed layout "4+2+1+1" or "2x8+12x4"."""
        return mixture(self.layout) if self.layout else str(self.tp)

    @property
    def where(self) -> str:
        """For example "tp=4", or "on 4+2+1+1"."""
        return f"on {self.degrees}" if self.layout else f"tp={self.tp}"

    @cached_property
    def typical(self) -> Run:
        """The run of median makespan."""
        return median_by(self.runs, lambda run: run.makespan_s)

    @property
    def gpu_hours(self) -> float:
        """GPU-hours of a step: all GPUs, from the start of the weight sync to the end of the last trajectory."""
        return self.gpus * self.typical.step_s / 3600

    @property
    def gpu_hours_per_1000(self) -> float:
        """GPU-hours per thousand trajectories."""
        return 1000 * self.gpu_hours / self.trajectories

    @property
    def makespans_s(self) -> list[float]:
        """Makespans by draw."""
        return [run.makespan_s for run in self.runs]

    @property
    def speedups(self) -> list[float]:
        """Stock's step time over this arm's, weight sync included, by draw."""
        return self.ratios(None)

    @property
    def speedup(self) -> float:
        """Median speedup over the draws."""
        return median_low(self.speedups)

    @property
    def bound_fractions(self) -> list[float]:
        """Lower bound over makespan, by draw: 1 cannot be beaten."""
        return [low / run.makespan_s for low, run in zip(self.bounds_s, self.runs, strict=True)]

    @property
    def bound_fraction(self) -> float:
        """Median bound fraction over the draws."""
        return median_low(self.bound_fractions)

    def ratios(self, over: Row | None) -> list[float]:
        """Step time of `over` (None: stock) over this arm's, weight sync included, by draw."""
        others = self.stock if over is None else over.runs
        return [other.step_s / run.step_s for other, run in zip(others, self.runs, strict=True)]


@dataclass(frozen=True)
class Answer:
    """`rows` by name, starting with stock at the user's degree; `bounds` by draw and step."""

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
        """Index of the draw in which stock's makespan is the median; reports and pictures show this draw."""
        return self.stock.runs.index(self.stock.typical)

    @property
    def bound_s(self) -> float:
        """The lower bound of the typical draw, mean over its steps."""
        return self.stock.bounds_s[self.typical]

    @property
    def worst_bound(self) -> Bound:
        """The largest lower bound of any step of the typical draw."""
        return max(self.bounds[self.typical], key=lambda bound: bound.makespan_s)


def wins(ratios: Iterable[float]) -> bool:
    """Whether ratios of makespans, one per draw, show a speedup that is large enough and not chance."""
    values = list(ratios)
    return min(values) > 1.0 and median_low(values) >= WORTH


def loses(ratios: Iterable[float]) -> bool:
    """Whether the ratios show a slowdown that is large enough and not chance."""
    return wins(1.0 / ratio for ratio in ratios)


def median_by(items: Sequence[T], key: Callable[[T], float]) -> T:
    """The item whose key is the lower median; the first of equals."""
    middle = median_low(key(item) for item in items)
    return next(item for item in items if key(item) == middle)


def study(setting: Setting, source: Source, arms: Sequence[str], jobs: int | None = None, progress: Progress | None = None) -> Answer:
    """Simulate `arms` (names from `ARMS`, and policy files; stock is always included): each rule at the user's degree, and stock and heddle
    at stock's best degree.

    Raises:
        ValueError: an arm is unknown, or a replica of the degree that the user chose cannot hold the longest turn.
    """
    own = list(dict.fromkeys(filter(is_file, arms)))
    for name in own:
        rule_of(name)  # report a broken policy file before simulating anything
    if unknown := [name for name in arms if name not in ARMS and name not in own]:
        raise ValueError(f"unknown arm {unknown[0]!r}; allowed: {', '.join(ARMS)}, and policy files (docs/simulate.md)")
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
    """Simulate stock and heddle at every feasible degree, stock with KV offload at the user's degree, and heddle on the best mixed layout.
    Rows: `stock`, then `stock_tp<n>`, `heddle_tp<n>`, `stock_tier` and `heddle_mixed`, fastest first.

    Raises:
        ValueError: a replica of the user's degree cannot hold the longest turn.
    """
    setting, source, able = _fitted(setting, source)
    wanted: list[Wanted] = [(rule, tp) for rule in ("stock", "heddle") for tp in able]
    wanted.append(("stock_tier", setting.tp))
    setting = replace(setting, mixed=mixed_layout(setting, source))
    if setting.mixed:
        wanted.append((MIXED, max(setting.mixed)))
    with Pool(setting, source.draws, len(wanted) + 1, jobs, progress) as pool:
        bounds, runs = pool.bounds(), pool.runs(wanted)
    order = sorted(wanted, key=lambda arm: (_median_s(runs[arm]), wanted.index(arm)))  # ties: stock first, then the smaller degree
    single = (MIXED, "stock_tier")  # one row each
    at = {"stock": ("stock", setting.tp)} | {rule if rule in single else f"{rule}_tp{tp}": (rule, tp) for rule, tp in order}
    return Answer(setting, source, _rows(at, runs, bounds, setting, source), bounds)


def _fitted(setting: Setting, source: Source) -> tuple[Setting, Source, tuple[int, ...]]:
    """The setting at a degree that holds the work, the source (with a note if the degree changed), and all degrees that hold the work."""
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
    lows = tuple(sum(bound.makespan_s for bound in steps) / len(steps) for steps in bounds)
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
