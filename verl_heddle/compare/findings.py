"""Sentences about a comparison: how fast, why, at what cost, and what did not help. No sentence claims more than the intervals support."""

from __future__ import annotations

from verl_heddle.compare.bootstrap import FEW_PAIRS, Ratio
from verl_heddle.compare.measure import SPLIT
from verl_heddle.compare.result import ArmResult, Comparison
from verl_heddle.report.explain import WAITED
from verl_heddle.report.words import count, listed, number, percent, ratio

ALIKE = 0.03
"""Arms whose mean tokens per trajectory differ by less count as equal: three standard errors of a few hundred trajectories."""

ROUGH = 0.15
"""Above this median error of calibrated step times, bounds are called rough; on dedicated engines it is a few per cent."""

WEAK_RANK = 0.3
"""Below this rank correlation, a prediction ranks trajectories little better than chance."""

ONE_PAIR = "more pairs are needed to rule out chance"
"""Qualifies a difference that the steps of a single pair show."""

MOSTLY = 0.5
"""Above this share of the last trajectory's time in tools, tools and not engines set the pace."""

SPLIT_WORDS = {
    "queue_s": "waiting for a slot",
    "generate_s": "generating",
    "tool_s": "in tools",
    "other_s": "between turns",
    "late_start_s": "starting late",
}


def findings(answer: Comparison) -> list[str]:
    """The findings, most important first."""
    base = answer.base
    lines = []
    for arm in answer.others:
        lines += _speed(arm, base) if arm.trained_ratio is None else _windows(arm, arm.trained_ratio, base)
    lines += _twins(answer)
    lines += _lengths_and_rewards(answer)
    lines += _bound(answer)
    return lines or ["No pair is finished, so nothing can be compared yet."]


def not_helped(answer: Comparison) -> list[str]:
    """What did not help, and why, as far as the runs show."""
    lines = []
    base = answer.base
    for arm in answer.others:
        found, name = arm.headline, arm.arm.name
        if found is None or found.verdict == "faster":
            continue
        if found.verdict == "unclear" and _apart(found):
            if found.value < 1:
                lines.append(f"{name} took longer than {base.arm.name}: {interval(found)}; {ONE_PAIR}.")
        else:
            verdict = "was slower than" if found.verdict == "slower" else "showed no difference beyond chance from"
            lines.append(f"{name} {verdict} {base.arm.name}: {interval(found)}.")
        waited, tools = base.median("queue_share"), _tool_share(base)
        lever = "Tensor parallelism may matter more: run verl-heddle plan."
        if tools > MOSTLY:
            lever = "Faster tools, or more of them at once, would help more."
            lines.append(
                f"In {base.arm.name} the last trajectory to end spends {percent(tools)} of its time in tools: no order helps there."
            )
        if waited is not None and waited < WAITED and not arm.arm.bare:
            lines.append(
                f"In {base.arm.name} turns waited for a slot only {100 * waited:.1f} % of the time, so the order of the queue "
                f"hardly matters. {lever}"
            )
    for arm in answer.arms.values():
        guess = arm.prediction
        if guess is not None and guess.rank is not None and guess.rank < WEAK_RANK and arm is not base:
            lines.append(
                f"{arm.arm.name}'s predictions hardly rank trajectories (rank correlation {guess.rank:.2f}, {count(guess.turns)} turns): "
                "prompts repeated too rarely, or lengths vary more within a prompt than between prompts."
            )
        if fallen := arm.total("fallbacks/").get("total"):
            lines.append(f"In {arm.arm.name} heddle fell back to verl's own rule {count(fallen)} times.")
    return lines


def cautions(answer: Comparison) -> list[str]:
    """Caveats that limit how far the numbers can be trusted."""
    lines = list(answer.notes)
    if answer.machine is not None:
        fit = answer.machine.latency.engines[answer.machine.engines.tp].fit
        if fit is not None and fit.median_error > ROUGH:
            lines.append(
                f"Lower bounds are rough: the calibrated step times are off by more than {percent(fit.median_error)} for half of the turns "
                "(possible causes: engines that share cores, other work on the machine)."
            )
    for key, entry in answer.missing.items():
        state = "not run yet" if entry is None else entry.why or ("interrupted" if entry.state == "running" else entry.state)
        lines.append(f"Pair {key.pair}, {key.arm} is missing: {state}.")
    pairs = max((len(arm.headline.by_pair) for arm in answer.others if arm.headline), default=0)
    if 0 < pairs < FEW_PAIRS:
        lines.append(
            f"The intervals rest on {pairs} pair{'s' if pairs > 1 else ''}, so they are too narrow; "
            f"--pairs {2 * pairs + (pairs == 1) * 2} adds more."
        )
    single = [arm.arm.name for arm in answer.arms.values() if any(run.steps == run.warm for run in arm.runs.values())]
    if single and answer.warmup:
        lines.append(f"The only step of a run includes compilation and cold caches ({listed(sorted(set(single)))}); use more --steps.")
    return lines


def interval(found: Ratio) -> str:
    """A ratio as text, for example "1.12x (95 % interval 1.05 to 1.20; 3 pairs, 12 steps)"."""
    pairs, steps = len(found.by_pair), found.steps
    size = f"{pairs} pair{'s' if pairs > 1 else ''}, {count(steps)} step{'s' if steps > 1 else ''}"
    if found.low is None or found.high is None:
        return f"{ratio(found.value)} (one step of one pair: no interval)"
    return f"{ratio(found.value)} (95 % interval {found.low:.2f} to {found.high:.2f}; {size})"


def _apart(found: Ratio) -> bool:
    """Whether the interval excludes 1, so that the steps alone distinguish the arms."""
    return found.low is not None and found.high is not None and not found.low <= 1 <= found.high


def _speed(arm: ArmResult, base: ArmResult) -> list[str]:
    name, found = arm.arm.name, arm.speedup
    whole = arm.step_ratio
    if found is None:
        if whole is None:
            return []
        return [f"{name} has no trace; by verl's clock its whole training step runs at {interval(whole)} the speed of {base.arm.name}'s."]
    lines = [f"{name}'s rollouts run at {interval(found)} the speed of {base.arm.name}'s: {_verdict(found)}."]
    if whole is not None:
        took, rollout = base.mean("step_s"), base.mean("makespan_s")
        share = f"; rollouts are {percent(rollout / took)} of {base.arm.name}'s step" if took and rollout else ""
        lines.append(f"Its whole training step runs at {interval(whole)}{share}.")
    mine, theirs = arm.split, base.split
    if mine is not None and theirs is not None:
        change = {key: theirs[key] - mine[key] for key in SPLIT}
        total = sum(change.values())
        word = "less" if total > 0 else "more"
        parts = sorted(change.items(), key=lambda part: -abs(part[1]))
        named = [
            f"{number(abs(value))} s {'less' if value > 0 else 'more'} {SPLIT_WORDS[key]}"
            for key, value in parts[:3]
            if abs(value) >= 0.005
        ]
        if named:
            first = f"A step of {name} takes {number(abs(total))} s {word}; the" if found.verdict != "unclear" else f"In {name} the"
            lines.append(f"{first} trajectory that ends last spends {listed(named)}.")
    return lines


def _windows(arm: ArmResult, found: Ratio, base: ArmResult) -> list[str]:
    """Under an asynchronous trainer: how fast, where trajectories spend their time, how stale the training data is."""
    name, other = arm.arm.name, base.arm.name
    lines = [f"{name} trains on {interval(found)} as many tokens per second as {other}: {_verdict(found)}."]
    both = [(one.arm.name, one) for one in (arm, base)]
    spent = [
        f"{percent(shares['paused_share'])} of their time paused for weight updates and {percent(shares['queue_share'])} waiting ({whose})"
        for whose, one in both
        if (shares := one.shares) is not None
    ]
    lines.append(f"Trajectories spend {listed(spent)}.")
    if recomputed := [f"{percent(share)} ({whose})" for whose, one in both if (share := one.read_again_share) is not None]:
        lines.append(f"Share of prefilled tokens that were recomputed after eviction: {listed(recomputed)}.")
    ages = [
        f"{age:.1f} steps old with {percent(one.dropped_share or 0.0)} of tokens dropped as stale ({whose})"
        for whose, one in both
        if (age := one.mean("trained/age_steps/mean")) is not None
    ]
    if ages:
        lines.append(f"The training data is on average {listed(ages)}.")
    return lines


def _verdict(found: Ratio) -> str:
    return {"faster": "faster", "slower": "slower", "unclear": ONE_PAIR if _apart(found) else "no difference beyond chance"}[found.verdict]


def _twins(answer: Comparison) -> list[str]:
    """The speedup of heddle's rule over verl's that the twin in each run estimates, next to the measured one."""
    judged = [(name, arm.twin) for name, arm in answer.arms.items() if arm.twin is not None]
    estimates = [
        f"{ratio(twin.speedup)} inside {name} ({count(twin.steps)} step{'s' * (twin.steps > 1)}, {percent(twin.error)} error on real steps)"
        for name, twin in judged
    ]
    if not estimates:
        return []
    found = [f"{ratio(arm.speedup.value)} ({name})" for name, arm in answer.arms.items() if arm.twin and arm.speedup is not None]
    measured = f"; measured between arms: {listed(found)}" if found else ""
    text = "The twin, which replays each step under verl's rule and under heddle's, estimates heddle's speedup at"
    return [f"{text} {listed(estimates)}{measured}."]


def _lengths_and_rewards(answer: Comparison) -> list[str]:
    rewards = {name: value for name, arm in answer.arms.items() if (value := arm.mean("reward")) is not None}
    lengths = {name: value for name, arm in answer.arms.items() if (value := _length(arm)) is not None}
    lines = []
    if rewards:
        each = listed([f"{value:.3f} ({name})" for name, value in rewards.items()])
        lines.append(
            f"Mean reward: {each}."
            + (f" Tokens per trajectory: {listed([f'{v:,.0f} ({n})' for n, v in lengths.items()])}." if lengths else "")
        )
    if scores := {name: value for name, arm in answer.arms.items() if (value := arm.mean("validation")) is not None}:
        lines.append(f"Validation: {listed([f'{value:.3f} ({name})' for name, value in scores.items()])}.")
    base = lengths.get(answer.base.arm.name)
    for arm in answer.others:
        own, per_token = lengths.get(arm.arm.name), arm.throughput_ratio
        if base and own and per_token is not None and abs(own / base - 1) > ALIKE:
            less = "fewer" if own < base else "more"
            per = f"per token it is {interval(per_token)}"
            if max(_tool_share(arm), _tool_share(answer.base)) > MOSTLY:
                per += ", which says little because tools take most of the time"
            other = f"{percent(abs(own / base - 1))} {less} tokens than {answer.base.arm.name}"
            lines.append(f"{arm.arm.name} generated {other}, by chance in sampling; {per}.")
    return lines


def _tool_share(arm: ArmResult) -> float:
    """Share of the last trajectories' time spent in tools; 0 if unknown."""
    split = arm.split
    total = sum(split.values()) if split else 0.0
    return split["tool_s"] / total if split and total > 0 else 0.0


def _length(arm: ArmResult) -> float | None:
    tokens, number_of = sum(arm.values("tokens")), sum(arm.values("trajectories"))
    return tokens / number_of if number_of else arm.mean("response_tokens")


def _bound(answer: Comparison) -> list[str]:
    reached = {name: value for name, arm in answer.arms.items() if (value := arm.bound_fraction) is not None}
    if not reached or answer.machine is None:
        return []
    each = listed([f"{name} reaches {percent(value)}" for name, value in reached.items()])
    text = f"Of the speed that no schedule on these engines could exceed, {each}."
    over = [name for name, value in reached.items() if value > 1]
    if over:
        text += f" More than 100 % ({listed(over)}) means that the assumed step times ({answer.machine.source}) are too slow."
    elif (best := max(reached.values())) > 0.9:
        text += f" Little is left to gain: {percent(1 - best)}."
    return [text]
