"""What the host adds to an engine step: scheduling, preparing inputs, handling outputs, while the GPU waits.

A table composed of kernels knows nothing of it. It weighs most where steps are short: at high degrees and small batches.

Law: a turn of N output tokens is in N steps, so the host's part is (recorded seconds - the table's seconds) / N; the median over the turns
of a run, 0 at least. Whatever else the table gets wrong at those batches is in it too.
Source: derived here.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from verl_heddle.latency.batches import Work, batch_history
from verl_heddle.latency.model import AffineDecode, AffinePrefill, Engine

HOST_STEP_S = 0.001
"""Assumed where no run tells: in `bench/fidelity` vLLM's engine core and server take 0.08 and 0.05 of a core during decode steps of 6 to
13 ms, which is 0.8 to 1.7 ms a step with up to 8 sequences. The lower end, because asynchronous scheduling hides a part of it on a GPU.
vLLM before it (0.5, its issue 6854) left the GPU idle for 4 to 13 ms a step."""


def host_s(table: Engine, fitted: Engine, replicas: Sequence[Sequence[Work]]) -> float:
    """Seconds a step that recorded turns take beyond a table's.

    Args:
        table: decode and prefill times to compare with; its own `host_s` is not counted.
        fitted: the affine engine that explains these turns best; it says which turns shared their steps.
        replicas: the turns of each replica, of one degree.
    """
    decode, prefill = fitted.decode, fitted.prefill
    if not (isinstance(decode, AffineDecode) and isinstance(prefill, AffinePrefill)):
        raise TypeError("needs a fitted engine")
    parameters = (decode.base_s, decode.per_seq_s, decode.per_context_s, prefill.per_token_s)
    found = []
    for works in replicas:
        history = batch_history(works, parameters)
        use = np.array([work.usable for work in works])
        steps = np.array([max(1.0, work.output_tokens) for work in works])
        took = np.array([work.end_s - work.begin_s for work in works])
        new = float(np.mean([work.new_tokens for work in works]))
        context = float(np.mean([work.context_tokens for work in works]))
        rate = (float(table.prefill(new, context - new)) - float(table.prefill(1.0, context - new))) / new if new > 1 else 0.0
        known = steps * np.asarray(table.decode(history.batch, history.total_context / history.batch)) + rate * history.prefilled_tokens
        found.append(((took - known) / steps)[use])
    return max(0.0, float(np.median(np.concatenate(found))))
