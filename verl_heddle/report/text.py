"""Format the answer as text: the headline (what a step takes, what would help most, what to paste), assumptions, table, sentences."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import inf
from shlex import quote

from verl_heddle.report.advice import Advice, forecast, why
from verl_heddle.report.explain import gain
from verl_heddle.report.setting import Setting
from verl_heddle.report.study import Answer, Row, wins
from verl_heddle.report.words import count, listed, number, ratio, seconds, spread

TP = "actor_rollout_ref.rollout.tensor_model_parallel_size={tp}"

HELPS: Mapping[str, tuple[str, str]] = {
    "stock_best_tp": ("tp={tp}", TP),
    "heddle": ("the plugin", "+plugin=heddle"),
    "heddle_best_tp": ("tp={tp} with the plugin", f"{TP} +plugin=heddle"),
    "stock_tier": ("KV offload to the host (as assumed below)", "+plugin=heddle heddle.offload.enable=true"),
    "heddle_place": ("the plugin with planned placement", "+plugin=heddle heddle.place.enable=true"),
}
"""Arms that a user can run: name for readers, and overrides."""

COMMAND = "python -m verl.trainer.main_ppo <your overrides>"

NOTHING = "No simulated alternative is faster beyond chance."
NOTHING_BY_WORTH = "No simulated alternative is at least 2 % faster."

MOST = 3
"""Number of improvements listed."""


def headline(answer: Answer) -> list[str]:
    """At most three lines. An arm helps only if it is faster in every draw and by 2 % in the median (`study.wins`)."""
    stock = answer.stock
    first = _takes(answer)
    found = sorted(_helping(answer), key=lambda row: -row.speedup)
    if not found:
        return [first, NOTHING if len(stock.runs) > 1 else NOTHING_BY_WORTH]
    gains = [f"{HELPS[row.name][0].format(tp=row.tp)} {gain(row.speedups)}" for row in found[:MOST]]
    paste = HELPS[found[0].name][1].format(tp=found[0].tp)
    return [first, f"What helps most: {listed(gains)}.", f"To try the first: {COMMAND} {paste}"]


def plan_headline(answer: Answer, advice: Advice) -> list[str]:
    """The headline of a plan: the fastest row of each rule, and the overrides to paste."""
    first = _takes(answer)
    fastest: dict[str, Row] = {}
    for row in answer.rows.values():
        current = (row.rule, row.tp) == ("stock", answer.setting.tp)
        if not current and wins(row.speedups) and (row.rule not in fastest or row.speedup > fastest[row.rule].speedup):
            fastest[row.rule] = row
    degree, plugin = fastest.get("stock"), fastest.get("heddle")
    if degree is not None and plugin is not None and plugin.tp == degree.tp and not wins(plugin.ratios(degree)):
        del fastest["heddle"]  # the degree alone gives the gain
    found = sorted(fastest.values(), key=lambda row: -row.speedup)
    second = f"What helps most: {listed([f'{_words(row, answer)} {gain(row.speedups)}' for row in found[:MOST]])}." if found else NOTHING
    return [first, second, f"Recommended: {COMMAND} {' '.join(map(quote, advice.overrides))}"]


def _takes(answer: Answer) -> str:
    stock = answer.stock
    per = "A step" if answer.source.about["steps"] == 1 else "A step on average"
    return (
        f"{per} takes {seconds(stock.typical.makespan_s)} under stock verl at tp={stock.tp} ({number(stock.gpu_hours)} GPU-hours, "
        f"{number(stock.gpu_hours_per_1000)} per thousand trajectories); no schedule can take less than {seconds(answer.bound_s)}."
    )


def _words(row: Row, answer: Answer) -> str:
    """Name of a plan's row for readers."""
    if row.layout:
        return f"the plugin on degrees {row.degrees}"
    if row.rule in HELPS:
        return HELPS["heddle_best_tp" if row.rule == "heddle" and row.tp != answer.setting.tp else row.rule][0].format(tp=row.tp)
    return f"tp={row.tp}"


def _helping(answer: Answer) -> list[Row]:
    rows = [answer.rows[name] for name in HELPS if name in answer.rows and wins(answer.rows[name].speedups)]
    best = answer.rows.get("stock_best_tp")
    if best is not None:
        if best.tp == answer.stock.tp:  # same arm as without _best_tp
            return [row for row in rows if not row.name.endswith("_best_tp")]
        if "heddle_best_tp" in answer.rows and not wins(answer.rows["heddle_best_tp"].ratios(best)):  # the degree alone gives the gain
            return [row for row in rows if row.name != "heddle_best_tp"]
    return rows


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
"""Heading and cell. `queue` to `other` split the makespan by what the trajectory that ended last was doing, seconds."""

LEGEND = (
    "makespan: first submit to last end. speedup: over stock in the same draw, both with weight sync. GPU-h, GPU-h/1k: GPU-hours per\n"
    "step, weight sync included, and per thousand trajectories. of bound: lower bound / makespan; 100 % cannot be beaten.\n"
    "queue, generate (prefill included), tool, other: seconds of the trajectory that ended last.\n"
    "moves: turns on a different replica than the previous turn. preempt.: preemptions, mostly from KV pressure."
)


def assumptions(answer: Answer) -> list[str]:
    """What was simulated, one fact per line."""
    setting, about = answer.setting, answer.source.about
    held = setting.kv_tokens[setting.tp]
    steps = "1 step" if about["steps"] == 1 else f"{about['steps']} steps (numbers are means over them)"
    draws = len(answer.source.draws)
    work = [item for step in answer.source.draws[answer.typical].steps for item in step]
    lines = [
        f"{answer.source.name}: {steps} of {count(about['prompts'])} prompts x {count(about['samples'])} samples "
        f"({count(len(work) / about['steps'])} trajectories, {count(sum(len(item.steps) for item in work) / about['steps'])} turns, "
        f"{count(sum(item.output_tokens for item in work) / about['steps'])} tokens a step)",
        f"{setting.model}, {setting.gpus} GPUs, {setting.slots} slots a replica, gpu_memory_utilization {setting.utilization:g}"
        + (f" ({held:,} KV tokens a replica of tp={setting.tp})" if held is not None else ""),
        f"step times: {setting.step_times}",
        *_other_costs(setting, "stock_tier" in answer.rows),
        f"heddle's history: {about['history']}",
        f"simulated, nothing was run; {draws} draw"
        + ("s: median, and range in brackets" if draws > 1 else ": use --seeds to see the effect of chance"),
    ]
    return lines + list(answer.source.notes)


def _other_costs(setting: Setting, offloads: bool) -> list[str]:
    """Costs of a step other than kernels and tools, split into assumed and given ones. Host time is listed with the step times."""
    at_once, tier = setting.tools_at_once, setting.tier
    facts = {
        "overhead_s": f"{1e3 * setting.overhead_s:g} ms per turn outside engine and tool",
        "sync_s": f"{number(setting.sync_s(setting.tp))} s of weight sync per step",
        "tools_at_once": f"{'any number of' if at_once == inf else f'{at_once:g}'} tools at once",
    }
    lines = []
    for how, names in (("assumed", set(setting.assumed)), ("as given", set(facts) - set(setting.assumed))):
        if listed_facts := [text for name, text in facts.items() if name in names]:
            lines.append(f"{how}: {', '.join(listed_facts)}")
    if offloads:
        room = "without limit" if tier.host_bytes == inf else f"in {tier.host_bytes / 2**30:g} GiB per host"
        how = "assumed" if "offload" in setting.assumed else "as given"
        lines.append(f"{how}: stock_tier keeps KV cache {room} and reads it back at {tier.bytes_per_s / 1e9:g} GB/s per GPU")
    return lines


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text; the first column is left-aligned."""
    return _aligned(rows, COLUMNS, left=("arm",))


def report(answer: Answer, sentences: Sequence[str]) -> str:
    """The full output of `verl-heddle simulate`."""
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
    """The full output of `verl-heddle plan`: the answer, the ranking, the reasons, the overrides."""
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
        ("where the last trajectory's time went", why),
    ]
    block = " \\\n  ".join(map(quote, advice.overrides))
    parts = [
        "\n".join(plan_headline(answer, advice)),
        "\n".join(assumptions(answer)),
        _aligned(ranked, columns, left=("tp", "rule", columns[-1][0])),
        "\n".join(f"- {line}" for line in sentences),
    ]
    return "\n\n".join([*parts, forecast(answer, advice), f"python -m verl.trainer.main_ppo <your overrides> \\\n  {block}"]) + "\n"
