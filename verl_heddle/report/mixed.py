"""The mixed layout that is asked about beside every fixed degree: what the planner between steps would make of the history.

Lengths are told by history alone, as a run's second epoch has it: a prompt's median is that of its trajectories in the epoch before, the
spread is that within prompts; with no history all are alike. One layout is taken for all draws, from the first, since one is pasted.
"""

from __future__ import annotations

from collections import defaultdict
from math import exp, inf, log, sqrt
from statistics import fmean

from verl_heddle.layout.feasible import packed
from verl_heddle.layout.price import Site, coming, free
from verl_heddle.place.pace import habit_of
from verl_heddle.predict.quantities import LOGISTIC
from verl_heddle.report.draws import Source
from verl_heddle.report.setting import Setting
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
