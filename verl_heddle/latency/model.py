"""Engine times of a replica (decode steps, prefills, weight loading) and the token capacity of its KV cache.

The planner and the simulator query `LatencyModel`. Its numbers come from a shipped table (`verl_heddle.latency.load`), a recorded run
(`verl_heddle.latency.calibrate`) or a formula (`LatencyModel.affine`). It is a plain value: no clock, no randomness, picklable.

Units: seconds, tokens, bytes. Times cover the engine alone: no RPC, no queueing. The host's work per step (scheduling, preparing inputs,
handling outputs) is included in calibrated models; `with_host` adds it to the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[Any]

MIN_KV_TOKENS = 8192
"""A replica whose KV cache holds fewer tokens does not `fit`: one long sequence fills it, and so does one step of
verl's default `max_num_batched_tokens`."""

DEFAULT_UTILIZATION = 0.9
"""vLLM's long-standing `gpu_memory_utilization`. verl's rollout default is lower (0.5); pass the value in use."""

WAKE_S = 0.2
"""Fixed cost of waking a sleeping engine. vLLM's sleep-mode measurements (blog, 26 Oct 2025, level 1): 0.26 s for a 1.5 GB model, 0.82 s
for 8.3 GB, which extrapolates to 0.14 s at zero bytes; rounded up for the RPCs to several workers."""

HOST_TO_GPU_BYTES_PER_S = 35e9
"""Pinned host memory to each of 8 H100s at once over PCIe 5: 35.0 to 35.4 GB/s (NVIDIA/nvbandwidth issue 24,
`host_to_device_memcpy_sm`)."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory of one GPU of a replica.

    Every GPU of a tensor-parallel group holds its share of the weights and, for *every* token of the replica, its share of the KV heads.
    So the replica holds as many tokens as fit on one GPU.
    """

    gpu_bytes: int
    """GPU memory as torch reports it (`torch.cuda.get_device_properties().total_memory`)."""
    weight_bytes: int
    kv_bytes_per_token: int
    overhead_bytes: int
    """Activations, communication buffers, CUDA context and graphs."""

    @property
    def load_s(self) -> float:
        """Seconds to reload the weights from pinned host memory (`LatencyModel.weight_load_s`)."""
        return WAKE_S + self.weight_bytes / HOST_TO_GPU_BYTES_PER_S

    def kv_tokens(self, gpu_memory_utilization: float) -> int:
        """Tokens that fit beside the weights; 0 if the weights alone do not fit."""
        if not 0.0 < gpu_memory_utilization <= 1.0:
            raise ValueError(f"gpu_memory_utilization must be in (0, 1], got {gpu_memory_utilization}")
        free = self.gpu_bytes * gpu_memory_utilization - self.weight_bytes - self.overhead_bytes
        return max(0, int(free // self.kv_bytes_per_token))


@dataclass(frozen=True, slots=True)
class FitQuality:
    """How well a calibrated engine explains the turns it was fitted to, and the range those turns cover."""

    turns: int
    median_error: float
    """Median over the turns of |predicted - recorded| / recorded engine time."""
    p90_error: float
    max_batch: float
    """Largest mean batch of any turn; beyond it the fit extrapolates."""
    max_context: float
    """Largest mean context per sequence, tokens."""


@dataclass(frozen=True, slots=True)
class AffineDecode:
    """Seconds per decode step: `base_s + per_seq_s * batch + per_context_s * batch * context`, with no interpolation."""

    base_s: float
    per_seq_s: float = 0.0
    per_context_s: float = 0.0

    def __call__(self, batch: Any, context: Any) -> Any:
        return self.base_s + batch * (self.per_seq_s + self.per_context_s * context)


@dataclass(frozen=True, slots=True)
class AffinePrefill:
    """Seconds to prefill: `base_s + per_token_s * new + per_context_s * new * (context + new / 2)`, and 0 for no new tokens.

    The last term is attention: each new token reads the cached tokens and, on average, half of the new ones.
    """

    per_token_s: float
    per_context_s: float = 0.0
    base_s: float = 0.0

    def __call__(self, new: Any, context: Any) -> Any:
        value = self.base_s + new * (self.per_token_s + self.per_context_s * (context + 0.5 * new))
        if isinstance(value, np.ndarray):
            return np.where(np.asarray(new) > 0, value, 0.0)
        return float(value) if new > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Engine:
    """A replica of one tensor-parallel degree.

    `decode(batch, context)` and `prefill(new, context)` return seconds, take numbers or arrays, and are non-decreasing.
    """

    decode: Callable[[Any, Any], Any]
    prefill: Callable[[Any, Any], Any]
    memory: Memory | None = None
    """None: unknown, and KV is treated as unlimited."""
    load_s: float = 0.0
    fit: FitQuality | None = None
    """None: a table or a formula, not fitted to a run."""
    host_s: float = 0.0
    """Host seconds per step on top of `decode` and `prefill`."""


@dataclass(frozen=True, slots=True)
class LatencyModel:
    """Times and sizes of one model on one kind of GPU, by tensor-parallel degree.

    Raises:
        ValueError: any method given a `tp` without an engine, except `fits`.
    """

    name: str
    engines: Mapping[int, Engine] = field(repr=False)
    source: str = ""
    """Origin of the numbers, for reports."""

    def __post_init__(self) -> None:
        if not self.engines or min(self.engines) < 1:
            raise ValueError(
                f"latency model {self.name}: needs engines for tensor-parallel degrees of 1 or more, got {sorted(self.engines)}"
            )

    @property
    def tps(self) -> tuple[int, ...]:
        """Tensor-parallel degrees with an engine, ascending; some may not fit (`fits`)."""
        return tuple(sorted(self.engines))

    @overload
    def decode_s(self, tp: int, batch: float, context_tokens: float) -> float: ...
    @overload
    def decode_s(self, tp: int, batch: Numbers, context_tokens: float | Numbers) -> NDArray[np.float64]: ...
    @overload
    def decode_s(self, tp: int, batch: float | Numbers, context_tokens: Numbers) -> NDArray[np.float64]: ...

    def decode_s(self, tp: int, batch: float | Numbers, context_tokens: float | Numbers) -> float | NDArray[np.float64]:
        """Seconds of one decode step of a replica: every sequence in the batch gets one token.

        Args:
            batch: sequences decoding together, 1 or more; may be a fractional mean.
            context_tokens: tokens each sequence attends to, as the mean over the batch. Arrays broadcast against each other.

        Non-decreasing in both. The mean context suffices because attention reads the sum of the contexts. The shipped tables cover batches
        to 512 and contexts from 128 to 131072; beyond, times grow linearly (within 10 % of the source at twice the batch or context).
        """
        try:
            engine = self.engines[tp]
        except KeyError:
            raise self._unknown(tp) from None
        return engine.decode(batch, context_tokens) + engine.host_s

    @overload
    def prefill_s(self, tp: int, new_tokens: float, context_tokens: float = 0) -> float: ...
    @overload
    def prefill_s(self, tp: int, new_tokens: Numbers, context_tokens: float | Numbers = 0) -> NDArray[np.float64]: ...
    @overload
    def prefill_s(self, tp: int, new_tokens: float | Numbers, context_tokens: Numbers) -> NDArray[np.float64]: ...

    def prefill_s(self, tp: int, new_tokens: float | Numbers, context_tokens: float | Numbers = 0) -> float | NDArray[np.float64]:
        """Seconds to prefill `new_tokens` of one sequence after `context_tokens` cached ones, alone on the replica; 0 for no new tokens.

        Includes the first output token. Non-decreasing in both. A prefill that shares its step with decoding sequences does not reread the
        weights: it adds about `prefill_s(tp, new, context) - prefill_s(tp, 1, context)` to their step. The shipped tables cover 131072
        tokens of each; beyond that, new tokens are extrapolated linearly, which is too low by a third at twice that number.
        """
        try:
            engine = self.engines[tp]
        except KeyError:
            raise self._unknown(tp) from None
        seconds = engine.prefill(new_tokens, context_tokens)
        if engine.host_s:
            seconds = seconds + engine.host_s * (new_tokens > 0)
        return seconds

    def kv_tokens(self, tp: int, gpu_memory_utilization: float = DEFAULT_UTILIZATION) -> int | None:
        """KV cache capacity of a replica in tokens, over all its GPUs; 0 if the weights do not fit, None if unknown.

        A conservative estimate; the number that a running engine logs is better.
        """
        memory = self._engine(tp).memory
        return None if memory is None else memory.kv_tokens(gpu_memory_utilization)

    def kv_bytes(self, tp: int) -> int | None:
        """KV bytes per token on each GPU of a replica; None if unknown."""
        memory = self._engine(tp).memory
        return None if memory is None else memory.kv_bytes_per_token

    def fits(self, tp: int, gpu_memory_utilization: float = DEFAULT_UTILIZATION) -> bool:
        """Whether the weights and at least `MIN_KV_TOKENS` fit; True if memory is unknown, False for a degree without an engine."""
        if tp not in self.engines:
            return False
        tokens = self.kv_tokens(tp, gpu_memory_utilization)
        return tokens is None or tokens >= MIN_KV_TOKENS

    def with_host(self, host_s: float, how: str) -> LatencyModel:
        """A copy whose unfitted engines add `host_s` seconds to every step; fitted engines already include host time.

        Args:
            how: origin of the number, appended to `source`.

        Raises:
            ValueError: negative or not finite.
        """
        if not 0 <= host_s < float("inf"):
            raise ValueError(f"host seconds per step must be finite and not negative, got {host_s}")
        engines = {tp: engine if engine.fit else replace(engine, host_s=host_s) for tp, engine in self.engines.items()}
        return replace(self, engines=engines, source=f"{self.source}, and {1e3 * host_s:.2g} ms of host time in every step ({how})")

    def weight_load_s(self, tp: int) -> float:
        """Seconds to reload a sleeping replica's weights from pinned host memory, all its GPUs in parallel (vLLM sleep level 1).

        Shipped tables use `WAKE_S + weight bytes per GPU / HOST_TO_GPU_BYTES_PER_S`. Loading from a trainer or a disk takes longer.
        """
        return self._engine(tp).load_s

    @classmethod
    def affine(
        cls,
        base_s: float,
        per_seq_s: float = 0.0,
        per_context_s: float = 0.0,
        *,
        prefill_per_token_s: float = 0.0,
        prefill_per_context_s: float = 0.0,
        prefill_base_s: float = 0.0,
        weight_load_s: float = 0.0,
        tps: tuple[int, ...] = (1,),
        speedup: Mapping[int, float] | None = None,
        memory: Memory | None = None,
        name: str = "affine",
    ) -> LatencyModel:
        """A model from a formula (`AffineDecode`, `AffinePrefill`), for tests and for engines on CPUs.

        Args:
            speedup: divisor of all step and prefill times by tensor-parallel degree; missing degrees use 1.
            memory: the same for every degree; None: KV is unlimited.

        Raises:
            ValueError: a time is negative, a speed-up is not positive, or `tps` is empty.
        """
        times = (base_s, per_seq_s, per_context_s, prefill_per_token_s, prefill_per_context_s, prefill_base_s, weight_load_s)
        factors = {tp: (speedup or {}).get(tp, 1.0) for tp in tps}
        if min(times) < 0 or any(factor <= 0 for factor in factors.values()):
            raise ValueError(f"times must not be negative and speed-ups must be positive, got {times} and {factors}")
        engines = {
            tp: Engine(
                AffineDecode(base_s / factor, per_seq_s / factor, per_context_s / factor),
                AffinePrefill(prefill_per_token_s / factor, prefill_per_context_s / factor, prefill_base_s / factor),
                memory,
                weight_load_s,
            )
            for tp, factor in factors.items()
        }
        return cls(name, engines, "formula")

    def _engine(self, tp: int) -> Engine:
        if tp not in self.engines:
            raise self._unknown(tp)
        return self.engines[tp]

    def _unknown(self, tp: int) -> ValueError:
        return ValueError(f"latency model {self.name} covers tensor-parallel degrees {list(self.tps)}, not {tp}")


HOST_STEP_S = 0.001
"""Host seconds per step assumed without a recorded run. In `bench/fidelity` vLLM's engine core and server use 0.08 and 0.05 of a core
during decode steps of 6 to 13 ms, which is 0.8 to 1.7 ms per step with up to 8 sequences. This is the lower end, because asynchronous
scheduling hides part of it on a GPU. vLLM 0.5, without asynchronous scheduling, left the GPU idle for 4 to 13 ms per step (issue 6854)."""
