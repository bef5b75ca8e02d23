"""What is lost by taking the order of arrival for the order of lengths, as the authors' code does.

Their rule, per group of m started samples, n kept, l long slots, c finished so far: keep the c-th to finish iff c <= n - l or c > m - l.
It is applied here to the finish times of a simulated step in which all m samples run to their end, and compared with the same rule on
lengths.
"""

from __future__ import annotations

from collections import defaultdict
from statistics import fmean

from bench.shaping.cases import Case, Pool
from verl_heddle.shape.select import Rule, Sample, choose
from verl_heddle.simulate import simulate
from verl_heddle.simulate.baselines import Stock


def arrival(case: Case, pool: Pool) -> dict[str, float]:
    """Shares of groups whose kept differ, and of kept samples that do, with one long slot and with none."""
    size, most = case.size, case.most
    batch = [item for items in pool.values() for item in items[:most]]
    where = case.where
    result = simulate(batch, where.fleet(where.tp), where.latency, Stock(0), engine=where.engine("fcfs"))
    groups: dict[str, list[tuple[float, int, int]]] = defaultdict(list)
    for item, end_s in zip(batch, result.finish_s.tolist(), strict=True):
        groups[item.prompt_id].append((end_s, len(groups[item.prompt_id]), item.output_tokens))
    told = {}
    for longest in (0, 1):
        differ, samples = [], []
        for ends in groups.values():
            by_length = set(choose(Rule(size, longest), [Sample(number, tokens) for _, number, tokens in ends]))
            order = [number for _, number, _ in sorted(ends)]
            by_arrival = {number for c, number in enumerate(order, 1) if c <= size - longest or c > most - longest}
            differ.append(by_length != by_arrival)
            samples.append(len(by_length - by_arrival) / size)
        told |= {f"groups_differ_{longest}_long": fmean(differ), f"samples_differ_{longest}_long": fmean(samples)}
    return told
