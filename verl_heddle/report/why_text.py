"""Format a `Why` as sentences, a table of turns, settings to try, and JSON with stable keys (`docs/explain.md`)."""

from __future__ import annotations

import json
from importlib.resources import files
from statistics import median
from typing import Any

import verl_heddle
from verl_heddle.report.explain import spent
from verl_heddle.report.study import WORTH
from verl_heddle.report.why import Why
from verl_heddle.report.words import count, number, percent, ratio, seconds
from verl_heddle.traces.schema import plain

SCHEMA = "verl-heddle/explain/1"

MOST_TURNS = 16
"""Turns printed of the last trajectory; if it has more, the shortest in the middle are left out."""

OFF = 0.15
"""Replay error from which the report calls what-ifs directions only."""

ROLLOUT = "actor_rollout_ref.rollout"


def sentences(answer: Why) -> list[str]:
    """The explanation: how long the step took, what it waited for, where that time went, and the bound."""
    took, last = answer.metrics["makespan_s"], answer.last
    lengths = [item.output_tokens for item in answer.items]
    against = f", {ratio(took / answer.typical_s)} the run's median of {seconds(answer.typical_s)}" if answer.steps > 1 else ""
    turns = f"{len(last.steps)} turn{'s' if len(last.steps) != 1 else ''}"
    lines = [
        f"Step {answer.step} took {seconds(took)}{against}: {count(len(answer.items))} trajectories, {count(sum(lengths))} tokens "
        f"on {answer.engines.replicas} replicas (tp={answer.engines.tp}, {answer.engines.slots} slots each).",
        f"It waited for prompt {plain(last.prompt_id)}, sample {plain(last.trial)}: {count(last.output_tokens)} tokens in {turns}; "
        f"half of the step's trajectories have at most {count(median(lengths))} tokens.",
        f"That trajectory spent {spent(_parts(answer), took)}.",
    ]
    waited, idle = answer.metrics["wait_share"], answer.metrics.get("idle_share/mean")
    if idle is not None:
        lines.append(
            f"Meanwhile replicas were idle {percent(idle)} of the time"
            + (f", and finished trajectories waited {percent(waited)} of the step for the last one." if waited else ".")
        )
    if answer.bound is not None:
        low = answer.bound
        reason = "its longest trajectory alone takes that long" if low.longest_s >= low.work_s else "the total work takes that long"
        lines.append(
            f"No schedule on these engines takes less than {seconds(low.makespan_s)}, {percent(low.makespan_s / took)} of it: {reason}."
        )
    return lines


def turn_rows(answer: Why) -> list[dict[str, Any]]:
    """The last trajectory's turns. `at_s` counts from the step's start; `left` includes this turn's tokens."""
    rows = []
    left = answer.last.output_tokens
    for index, turn in enumerate(answer.last.steps):
        rows.append(
            {
                "turn": index + 1,
                "at_s": answer.late_s + (turn.start_s or 0.0),
                "queue_s": turn.queue_s,
                "generate_s": turn.gen_s,
                "tool_s": turn.tool_latency_s,
                "tool": turn.tool,
                "other_s": (turn.route_s or 0.0) + (turn.transport_s or 0.0) + (turn.between_s or 0.0),
                "tokens": turn.output_tokens,
                "context": turn.ctx_tokens,
                "replica": turn.replica,
                "reason": turn.reason,
                "priority": turn.priority,
                "predicted_left": turn.predicted_remaining,
                "left": left,
                "preemptions": turn.preemptions,
            }
        )
        left -= turn.output_tokens or 0
    return rows


def settings(answer: Why) -> list[dict[str, Any]]:
    """What to try, best first: `try` (an override; None if not a setting), `why`, `ratio` (simulated; None if it cannot be simulated)."""
    gains = {case.name: case for case in answer.what_ifs if case.ratio >= WORTH}
    found: list[dict[str, Any]] = []

    def add(name: str, override: str | None, why: str) -> None:
        if name in gains:
            found.append({"try": override, "why": why, "ratio": gains[name].ratio})

    add("more_slots", f"{ROLLOUT}.max_num_seqs={2 * answer.engines.slots}", "turns wait for a slot; helps if the KV cache suffices")
    add("fewer_slots", f"{ROLLOUT}.max_num_seqs={answer.engines.slots // 2}", "other trajectories on its replica slow down the last one")
    for case in gains.values():
        if case.kind == "tp":
            found.append(
                {
                    "try": f"{ROLLOUT}.tensor_model_parallel_size={case.value}",
                    "why": "generates the longest trajectory faster",
                    "ratio": case.ratio,
                }
            )
    if answer.engines.order != "priority":
        add(
            "known_order",
            "+plugin=heddle",
            "the longest waited behind shorter ones; simulated with known lengths, so an upper limit",
        )
    else:
        add("known_order", None, "better length predictions could gain this much; predictions improve with every epoch over the prompts")
        add("stock", "+plugin=observe", "verl's own decisions would have been faster in this step")
    add("trajectory_fcfs", None, "order: turns of started trajectories wait behind new trajectories")
    add(
        "kv_offload",
        f"+{ROLLOUT}.engine_kwargs.vllm.kv_offloading_size=<GiB>",
        "contexts evicted from the KV cache are recomputed; needs no plugin",
    )
    add(
        "spare_samples",
        "heddle.shape.enable=true",
        "a few samples delay the step; changes which samples are trained on (docs/shaping.md)",
    )
    add("least_loaded", None, "placement: the replica of the last trajectory had more load than others")
    add("no_tools", None, "tools: make them faster, or give them a deadline")
    add("no_overhead", f"{ROLLOUT}.agent.num_workers=<more>", "time between turns: routing, transport, parsing, reward")
    add("without_last", None, "a single trajectory: a lower data.max_response_length or multi_turn.max_assistant_turns cuts it short")
    add("more_replicas", None, "more GPUs for rollout")
    preempted = answer.metrics.get("preemptions", 0)
    if preempted:
        why = f"KV pressure preempted turns {count(preempted)} times"
        found.append({"try": f"{ROLLOUT}.gpu_memory_utilization=<more>", "why": why, "ratio": None})
    return sorted(found, key=lambda row: -(row["ratio"] or 0.0))


def fidelity(answer: Why) -> str:
    """How far to trust the what-ifs."""
    assert answer.replayed_s is not None and answer.machine is not None
    error = answer.replayed_s / answer.metrics["makespan_s"] - 1
    text = (
        f"Simulated with step times {answer.machine.source}. The simulated step as recorded takes {seconds(answer.replayed_s)}, "
        f"{percent(abs(error))} {'less' if error < 0 else 'more'} than measured"
    )
    return text + (": take the ratios as directions only." if abs(error) >= OFF else ".")


def text(answer: Why) -> str:
    """Everything the terminal shows."""
    parts = [answer.source, "\n".join(f"- {line}" for line in sentences(answer)), _turn_table(answer)]
    if answer.what_ifs:
        rows = sorted(answer.what_ifs, key=lambda case: -case.ratio)
        width = max(len(case.label) for case in rows)
        cases = [f"  {case.label.ljust(width)}  {seconds(case.makespan_s):>8}  {ratio(case.ratio):>6}" for case in rows]
        parts.append("What would have helped, one change at a time:\n" + "\n".join(cases) + f"\n{fidelity(answer)}")
        tips = settings(answer)
        lines = [f"  {tip['try']}{_forecast(tip)}\n      {tip['why']}" for tip in tips if tip["try"]]
        parts.append("Settings to try:\n" + ("\n".join(lines) if lines else f"  none: no case gains {percent(WORTH - 1)}"))
        if beyond := [f"  {tip['why']}{_forecast(tip)}" for tip in tips if not tip["try"]]:
            parts.append("Beyond settings:\n" + "\n".join(beyond))
    if answer.notes:
        parts.append("Notes:\n" + "\n".join(f"- {note}" for note in answer.notes))
    return "\n\n".join(parts) + "\n"


def schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of `document`."""
    value: dict[str, Any] = json.loads(files("verl_heddle.report").joinpath("explain.schema.json").read_text())
    return value


def document(answer: Why) -> dict[str, Any]:
    """The JSON document; keys are only ever added."""
    engines, low = answer.engines, answer.bound
    return {
        "schema": SCHEMA,
        "version": verl_heddle.__version__,
        "source": answer.source,
        "step": answer.step,
        "makespan_s": answer.metrics["makespan_s"],
        "typical_s": answer.typical_s,
        "metrics": {name: value for name, value in answer.metrics.items() if value == value},
        "engines": {
            "tp": engines.tp,
            "slots": engines.slots,
            "replicas": engines.replicas,
            "order": engines.order,
            "assumed": list(engines.assumed),
        },
        "last": {
            "prompt": answer.last.prompt_id,
            "sample": answer.last.trial,
            "tokens": answer.last.output_tokens,
            "parts": [{"what": what, "seconds": value} for value, what in _parts(answer)],
            "turns": turn_rows(answer),
        },
        "bound": None if low is None else {"makespan_s": low.makespan_s, "longest_s": low.longest_s, "work_s": low.work_s},
        "step_times": answer.machine.source if answer.machine else None,
        "replayed_s": answer.replayed_s,
        "what_ifs": [
            {"name": case.name, "kind": case.kind, "told": case.label, "makespan_s": case.makespan_s, "ratio": case.ratio}
            for case in answer.what_ifs
        ],
        "settings": settings(answer),
        "explanation": sentences(answer),
        "notes": list(answer.notes),
    }


def _parts(answer: Why) -> list[tuple[float, str]]:
    done = answer.split
    own = [(done.generate_s, "generating")]
    if answer.alone_s is not None and answer.shared_s is not None:
        alone = min(answer.alone_s, done.generate_s)
        own = [(alone, "generating its own tokens"), (answer.shared_s, "slowed down by others on its replica")]
    waits = [
        (done.queue_s, "waiting for a slot"),
        (done.tool_s, "in tools"),
        (done.other_s, "between turns"),
        (answer.late_s, "starting late"),
    ]
    return sorted([*own, *waits], key=lambda part: -part[0])


def _forecast(tip: dict[str, Any]) -> str:
    return "" if tip["ratio"] is None else f"   ({ratio(tip['ratio'])} in simulation)"


def _turn_table(answer: Why) -> str:
    rows = turn_rows(answer)
    shown = set(range(len(rows)))
    if len(rows) > MOST_TURNS:
        middle = sorted(
            range(2, len(rows) - 2),
            key=lambda index: -sum(rows[index][key] or 0.0 for key in ("queue_s", "generate_s", "tool_s", "other_s")),
        )
        shown = {0, 1, len(rows) - 2, len(rows) - 1, *middle[: MOST_TURNS - 4]}
    head = ["turn", "at s", "queue", "generate", "tool", "other", "tokens", "context", "replica", "priority", "left", "predicted"]
    names = {name: f"#{index}" for index, name in enumerate(sorted({row["replica"] for row in rows if row["replica"]}))}
    cells = [head]
    for index in sorted(shown):
        row = rows[index]
        times = [number(row[key]) if row[key] is not None else "-" for key in ("at_s", "queue_s", "generate_s", "tool_s", "other_s")]
        predicted = "-" if row["predicted_left"] is None else count(round(row["predicted_left"]))
        sizes = [str(row[key]) if row[key] is not None else "-" for key in ("tokens", "context")]
        cells.append(
            [str(row["turn"]), *times, *sizes, names.get(row["replica"], "-"), str(row["priority"] or 0), count(row["left"]), predicted]
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)) for row in cells]
    hidden = len(rows) - len(shown)
    where = ", ".join(f"{short} {plain(name)}" for name, short in names.items())
    end = f"\n  {hidden} short turns left out" if hidden else ""
    return f"That trajectory, turn by turn (seconds; left: tokens still to generate; replicas: {where}):\n  " + "\n  ".join(lines) + end
