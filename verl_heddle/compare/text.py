"""A comparison as text: one table, the sentences, what to know."""

from __future__ import annotations

from collections.abc import Callable

from verl_heddle.compare.bootstrap import Ratio
from verl_heddle.compare.result import ArmResult, Comparison
from verl_heddle.compare.told import cautions, not_helped, told
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
"""Heading and cell. The last four split the makespan by what the trajectory that ended last was doing, seconds."""


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
    ("read again", lambda arm: _percent(arm.read_again_share)),
    ("age steps", lambda arm: _number(arm.mean("trained/age_steps/mean"), ".1f")),
    ("dropped", lambda arm: _percent(arm.dropped_share)),
)
"""The same under an asynchronous trainer."""


def table(answer: Comparison) -> str:
    """One row an arm."""
    columns = WINDOW_COLUMNS if answer.in_windows else COLUMNS
    cells = [[heading for heading, _ in columns], *([cell(arm) for _, cell in columns] for arm in answer.arms.values())]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(text.ljust(w) if i == 0 else text.rjust(w) for i, (text, w) in enumerate(zip(row, widths, strict=True))) for row in cells
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def report(answer: Comparison) -> str:
    """Everything the terminal shows at the end."""
    first = f"the first {answer.warmup} steps" if answer.warmup > 1 else "the first step"
    warm = f"{first} of a run left out" if answer.warmup else "all steps"
    over = f"over {answer.base.arm.name} in the same pairs, 95 % interval"
    legend = (
        f"means over steps ({warm}); speedup: {over}; makespan: first\n"
        "start to last end of the step's trajectories, from the trace; queue to other: seconds of the trajectory that ended last"
    )
    if answer.in_windows:
        legend = (
            f"means over the windows between batches ({warm}); ratio: tokens trained on per second, {over};\n"
            "generate to paused: of all time of the trajectories that ended; read again: of what engines read; age: of what is trained on"
        )
    parts = [table(answer), legend, "\n".join(f"- {line}" for line in told(answer))]
    for heading, lines in (("did not help", not_helped(answer)), ("to know", cautions(answer))):
        if lines:
            parts.append(f"{heading}:\n" + "\n".join(f"- {line}" for line in lines))
    return "\n\n".join(parts) + "\n"
