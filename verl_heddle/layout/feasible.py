"""Feasibility of layouts, checked before anything starts: GPU counts, node boundaries, attention heads and memory.

Law: replica i of a layout takes the next `layout[i]` GPUs in rank order and must lie within one node: tensor parallelism across nodes costs
more than it gains, and neither vLLM's executor here nor the latency tables support it. A degree must divide the attention heads, and must
divide the KV heads or be a multiple of them (vLLM replicates KV heads only a whole number of times).
`packed` fills one node after another with the largest degree that fits the rest of the node. If the degrees divide one another, as powers
of two do, this finds an order whenever one exists (first fit decreasing on divisible sizes: Coffman, Garey, Johnson 1987). For other
degrees it backtracks to the next smaller one and remembers failed states. Cost: O(replicas) for powers of two.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from verl_heddle.latency.model import DEFAULT_UTILIZATION, LatencyModel


def problems(layout: Sequence[int], gpus: int, gpus_per_node: int, heads: int | None = None, kv_heads: int | None = None) -> list[str]:
    """Reasons why this layout is infeasible, one plain sentence each; empty if it is feasible.

    Args:
        layout: tensor-parallel degrees in the order in which replicas take GPUs.
        heads, kv_heads: the model's head counts; None: unknown, not checked.
    """
    shown = list(layout)
    if not shown:
        return [f"the layout is empty: list tensor-parallel degrees that sum to the {gpus} GPUs"]
    if below := sorted({tp for tp in shown if tp < 1}):
        return [f"the layout {shown} has degree {below[0]}: every degree must be 1 or more"]
    found = []
    if sum(shown) != gpus:
        found.append(f"the layout {shown} takes {sum(shown)} GPUs, there are {gpus}: the degrees must sum to the GPUs")
    for tp in sorted(set(shown)):
        if tp > gpus_per_node:
            found.append(f"tp={tp} does not fit a node of {gpus_per_node} GPUs: a replica must lie within one node")
        if heads is not None and heads % tp:
            found.append(f"tp={tp} does not divide the model's {heads} attention heads")
        if kv_heads is not None and kv_heads % tp and tp % kv_heads:
            found.append(f"tp={tp} neither divides the model's {kv_heads} KV heads nor is divided by them")
    if not found and (crossing := _crossing(shown, gpus_per_node)) is not None:
        order = _order(shown, gpus_per_node)
        remedy = f"this order packs: {list(order)}" if order else "no order packs"
        found.append(f"replica {crossing} (tp={shown[crossing]}) of the layout {shown} spans two nodes of {gpus_per_node} GPUs; {remedy}")
    return found


def degrees(
    gpus_per_node: int,
    heads: int | None = None,
    kv_heads: int | None = None,
    latency: LatencyModel | None = None,
    gpu_memory_utilization: float = DEFAULT_UTILIZATION,
) -> tuple[int, ...]:
    """Degrees a planner may use, ascending: powers of two within a node that divide the heads and, given `latency`, hold the model."""
    powers = (1 << power for power in range(max(0, gpus_per_node).bit_length()))
    return tuple(
        tp
        for tp in powers
        if (heads is None or heads % tp == 0)
        and (kv_heads is None or kv_heads % tp == 0 or tp % kv_heads == 0)
        and (latency is None or latency.fits(tp, gpu_memory_utilization))
    )


def packed(layout: Sequence[int], gpus_per_node: int) -> tuple[int, ...]:
    """The same degrees, larger ones first where possible, in an order in which no replica spans two nodes.

    Raises:
        ValueError: no such order exists.
    """
    order = _order(layout, gpus_per_node)
    if order is None:
        raise ValueError(f"no order of the layout {list(layout)} packs into nodes of {gpus_per_node} GPUs")
    return order


def _crossing(layout: Sequence[int], gpus_per_node: int) -> int | None:
    """Index of the first replica that spans two nodes."""
    used = 0
    for number, tp in enumerate(layout):
        if used // gpus_per_node != (used + tp - 1) // gpus_per_node:
            return number
        used += tp
    return None


def _order(layout: Sequence[int], gpus_per_node: int) -> tuple[int, ...] | None:
    """Backtracking search on an explicit stack. Failed states are keyed by the remaining degrees, which determine how full the node is."""
    sizes = sorted(set(layout), reverse=True)
    left = Counter(layout)
    order: list[int] = []
    tried = [0]
    """Per position of `order` plus the next one: index of the first size not yet tried there."""
    failed: set[tuple[int, ...]] = set()
    used = 0
    while len(order) < len(layout):
        room = gpus_per_node - used % gpus_per_node
        state = tuple(left[size] for size in sizes)
        for number in range(tried[-1], len(sizes)):
            size = sizes[number]
            if left[size] and size <= room:
                left[size] -= 1
                if tuple(left[other] for other in sizes) not in failed:
                    break
                left[size] += 1
        else:
            failed.add(state)
            if not order:
                return None
            back = order.pop()
            left[back] += 1
            used -= back
            tried.pop()
            continue
        tried[-1] = number + 1
        order.append(size)
        used += size
        tried.append(0)
    return tuple(order)
