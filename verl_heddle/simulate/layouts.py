"""`make_fleet` builds a fleet from a number of GPUs and a layout of tensor-parallel degrees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from verl_heddle.fleet import Replica
from verl_heddle.simulate.policy import Latency

DEFAULT_SLOTS = 256
"""verl's default `rollout.max_num_seqs`."""


def make_fleet(
    gpus: int,
    tp_layout: int | Sequence[int],
    latency: Latency,
    slots: int | Mapping[int, int] = DEFAULT_SLOTS,
    kv_tokens: Mapping[int, int | None] | None = None,
) -> list[Replica]:
    """Replicas on `gpus` GPUs, named `r<number>-tp<degree>`.

    Args:
        tp_layout: one degree for all replicas, or a degree per replica, for example (4, 2, 1, 1); they must use all GPUs.
        slots: `max_num_seqs` of a replica, one number or by degree.
        kv_tokens: KV capacity by degree, from the engines' logs; default: `latency.kv_tokens`.

    Raises:
        ValueError: the layout does not use exactly `gpus` GPUs, or the model does not fit at one of its degrees.
    """
    if isinstance(tp_layout, int):
        if tp_layout < 1 or gpus < 1 or gpus % tp_layout:
            raise ValueError(f"{gpus} GPUs cannot be split into replicas of {tp_layout} GPUs")
        tp_layout = [tp_layout] * (gpus // tp_layout)
    if sum(tp_layout) != gpus or not tp_layout or min(tp_layout) < 1:
        raise ValueError(f"the layout {list(tp_layout)} uses {sum(tp_layout)} GPUs, but there are {gpus}")
    holds: dict[int, int | None] = {}
    for tp in set(tp_layout):
        fits = latency.fits(tp) if kv_tokens is None else kv_tokens.get(tp, 0) != 0
        if not fits:
            raise ValueError(f"a replica of tensor-parallel degree {tp} does not hold the model")
        holds[tp] = kv_tokens[tp] if kv_tokens is not None else latency.kv_tokens(tp)
    by_tp = slots if isinstance(slots, Mapping) else dict.fromkeys(tp_layout, slots)
    return [Replica(f"r{number}-tp{tp}", tp, by_tp[tp], holds[tp]) for number, tp in enumerate(tp_layout)]
