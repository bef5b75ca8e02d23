"""The step that pictures show: the slowest one of the draw in which stock's makespan is the median, simulated again arm by arm.

Results are not kept while arms are measured (they hold every turn); a simulation repeats bit for bit, so it costs time only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from verl_heddle.report.play import play
from verl_heddle.report.raster import Raster, raster
from verl_heddle.report.rules import rule_of
from verl_heddle.report.study import Answer, Row
from verl_heddle.simulate import Result


@dataclass(frozen=True, slots=True)
class Scene:
    """One arm's step. `bound_s` is that step's lower bound."""

    row: Row
    result: Result
    bound_s: float

    @property
    def title(self) -> str:
        """For example "stock verl, tp=1"."""
        return f"{rule_of(self.row.rule).title}, {self.row.where}"

    @property
    def idle_share(self) -> float:
        """Share of its makespan in which a replica had nothing to do, mean over replicas."""
        return max(0.0, float(self.result.summary()["idle_share"]))


def pictured(answer: Answer) -> list[str]:
    """Which rows to draw: stock, heddle below it, and the best fixed degree where that is another one."""
    rows = answer.rows
    names = [name for name in ("stock", "heddle") if name in rows]
    better = next((name for name in ("heddle_best_tp", "stock_best_tp") if name in rows), None)
    if better is not None and rows[better].tp != answer.setting.tp:
        names.append(better)
    if len(names) == 1:
        names += [name for name in rows if name != "stock"][:1]
    return names


def scenes(answer: Answer, names: Sequence[str]) -> list[Scene]:
    """Simulate the step again for each of the rows."""
    draw = answer.source.draws[answer.typical]
    played = [play(answer.rows[name].rule, answer.rows[name].tp, answer.setting, draw) for name in names]
    stock = played[0] if names[0] == "stock" else play("stock", answer.setting.tp, answer.setting, draw)
    slowest = max(range(len(stock)), key=lambda index: stock[index].makespan_s)
    low = answer.bounds[answer.typical][slowest].makespan_s
    return [Scene(answer.rows[name], results[slowest], low) for name, results in zip(names, played, strict=True)]


def rasters(shown: Sequence[Scene]) -> list[Raster]:
    """Pictures of the scenes on one time axis and one scale of lengths; bands are full at the most that a replica of the arm ran."""
    span = max(scene.result.makespan_s for scene in shown)
    longest = max(int(scene.result.output_tokens.max()) for scene in shown)
    return [raster(scene.result, span, longest) for scene in shown]
