"""The answer as text: one table, what it assumes, and the sentences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf
from shlex import quote

from verl_heddle.report.advice import Advice, forecast, why
from verl_heddle.report.headline import headline, plan_headline
from verl_heddle.report.setting import Setting
from verl_heddle.report.study import Answer, Row
from verl_heddle.report.words import count, number, ratio, spread

COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("arm", lambda row: row.name),
    ("tp", lambda row: str(row.tp)),
    ("makespan s", lambda row: _makespans(row)),
    ("speedup", lambda row: ratio(row.speedup)),
    ("GPU-h", lambda row: number(row.gpu_hours)),
    ("GPU-h/1k", lambda row: number(row.gpu_hours_per_1000)),
    ("tokens/s", lambda row: f"{row.typical.throughput_tok_s:,.0f}"),
    ("of bound", lambda row: f"{100 * row.bound_fraction:.0f} %"),
    ("queue", lambda row: number(row.typical.tail["queue_s"])),
    ("generate", lambda row: number(row.typical.tail["prefill_s"] + row.typical.tail["generate_s"])),
    ("tool", lambda row: number(row.typical.tail["tool_s"])),
    ("other", lambda row: number(row.typical.tail["other_s"])),
    ("moves", lambda row: count(row.typical.migrations)),
    ("preempt.", lambda row: count(row.typical.preemptions)),
)
"""Heading and cell. The four before the last two split the makespan by what the trajectory that ended last was doing, seconds."""

LEGEND = (
    "makespan: first submit to last end. speedup: over stock in the same draw, weight sync counted on both sides. GPU-h: GPU-hours of a\n"
    "step, weight sync included, and of a thousand trajectories. of bound: lower bound / makespan, 100 % cannot be beaten.\n"
    "queue, generate (prefill included), tool, other: seconds of the trajectory that ended last.\n"
    "moves: turns on another replica than the turn before. preempt.: slots lost, to KV pressure mostly."
)


def assumptions(answer: Answer) -> list[str]:
    """What was simulated, one fact a line."""
    setting, about = answer.setting, answer.source.about
    held = setting.kv_tokens[setting.tp]
    steps = "1 step" if about["steps"] == 1 else f"{about['steps']} steps, numbers are means over them,"
    draws = len(answer.source.draws)
    work = [item for step in answer.source.draws[answer.typical].steps for item in step]
    lines = [
        f"{answer.source.name}: {steps} of {count(about['prompts'])} prompts x {count(about['samples'])} samples "
        f"({count(len(work) / about['steps'])} trajectories, {count(sum(len(item.steps) for item in work) / about['steps'])} turns, "
        f"{count(sum(item.output_tokens for item in work) / about['steps'])} tokens a step)",
        f"{setting.model}, {setting.gpus} GPUs, {setting.slots} slots a replica, gpu_memory_utilization {setting.utilization:g}"
        + (f" ({held:,} KV tokens a replica of tp={setting.tp})" if held is not None else ""),
        f"step times: {setting.step_times}",
        *_beside(setting, "stock_tier" in answer.rows),
        f"heddle has seen {about['history']}",
        f"simulated, nothing was run; {draws} draw"
        + ("s: median, and range in brackets" if draws > 1 else ": chance is not visible, use --seeds"),
    ]
    return lines + list(answer.source.notes)


def _beside(setting: Setting, offloads: bool) -> list[str]:
    """What a step costs beside its kernels and tools (host time goes with the step times): what is assumed, and what was given."""
    at_once, tier = setting.tools_at_once, setting.tier
    facts = {
        "overhead_s": f"{1e3 * setting.overhead_s:g} ms a turn outside engine and tool",
        "sync_s": f"{number(setting.sync_s(setting.tp))} s of weight sync a step",
        "tools_at_once": f"{'any number of' if at_once == inf else f'{at_once:g}'} tools at once",
    }
    lines = []
    for how, names in (("assumed", set(setting.assumed)), ("as given", set(facts) - set(setting.assumed))):
        if told := [text for name, text in facts.items() if name in names]:
            lines.append(f"{how}: {', '.join(told)}")
    if offloads:
        room = "without limit" if tier.host_bytes == inf else f"in {tier.host_bytes / 2**30:g} GiB a host"
        how = "assumed" if "offload" in setting.assumed else "as given"
        lines.append(f"{how}: stock_tier keeps KV cache {room} and reads it back at {tier.bytes_per_s / 1e9:g} GB/s per GPU")
    return lines


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text, first column left."""
    return _aligned(rows, COLUMNS, left=("arm",))


def report(answer: Answer, sentences: Sequence[str]) -> str:
    """Everything `verl-heddle simulate` prints."""
    parts = [
        "\n".join(headline(answer)),
        "\n".join(assumptions(answer)),
        table(list(answer.rows.values())),
        LEGEND,
        "\n".join(f"- {line}" for line in sentences),
    ]
    return "\n\n".join(parts) + "\n"


def _aligned(rows: Sequence[Row], columns: Sequence[tuple[str, Callable[[Row], str]]], left: Sequence[str]) -> str:
    cells = [[heading for heading, _ in columns], *([cell(row) for _, cell in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    flush = [heading in left for heading, _ in columns]
    lines = [
        "  ".join(
            text.ljust(width) if to_left else text.rjust(width) for text, width, to_left in zip(row, widths, flush, strict=True)
        ).rstrip()
        for row in cells
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def _makespans(row: Row) -> str:
    digits = 0 if max(row.makespans_s) >= 100 else 1 if max(row.makespans_s) >= 10 else 2
    return spread(row.makespans_s, row.typical.makespan_s, f"{{:,.{digits}f}}")


def plan_report(answer: Answer, advice: Advice, sentences: Sequence[str]) -> str:
    """Everything `verl-heddle plan` prints: the answer, the ranking, the reasons, the overrides."""
    ranked = [row for name, row in answer.rows.items() if name != "stock"]
    columns: list[tuple[str, Callable[[Row], str]]] = [
        ("tp", lambda row: row.degrees),
        ("rule", lambda row: row.rule + (" (now)" if (row.rule, row.tp) == ("stock", answer.setting.tp) else "")),
        ("makespan s", _makespans),
        ("against now", lambda row: spread(row.speedups, row.speedup, "{:.2f}x")),
        ("GPU-h", lambda row: number(row.gpu_hours)),
        ("GPU-h/1k", lambda row: number(row.gpu_hours_per_1000)),
        ("tokens/s", lambda row: f"{row.typical.throughput_tok_s:,.0f}"),
        ("of bound", lambda row: f"{100 * row.bound_fraction:.0f} %"),
        ("what the last trajectory did most", why),
    ]
    block = " \\\n  ".join(map(quote, advice.overrides))
    parts = [
        "\n".join(plan_headline(answer, advice)),
        "\n".join(assumptions(answer)),
        _aligned(ranked, columns, left=("tp", "rule", columns[-1][0])),
        "\n".join(f"- {line}" for line in sentences),
    ]
    return "\n\n".join([*parts, forecast(answer, advice), f"python -m verl.trainer.main_ppo <your overrides> \\\n  {block}"]) + "\n"
