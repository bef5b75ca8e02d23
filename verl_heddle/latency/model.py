"""How long a replica takes: decode steps, prefills, loading weights; and how many tokens its KV cache holds.

`LatencyModel` is what the planner and the simulator ask. Its numbers come from a shipped table (`verl_heddle.latency.load`), from a
recorded run (`verl_heddle.latency.calibrate`) or from a formula (`LatencyModel.affine`). It is a value: no clock, no randomness,
pickles.

Units: seconds, tokens, bytes. Times are of the engine alone: no RPC, no queueing. The host's own work in a step (scheduling, preparing
inputs, handling outputs) is in calibrated models, and in others what `with_host` puts there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[Any]

MIN_KV_TOKENS = 8192
"""A layout whose replica holds fewer tokens does not `fit`: one long sequence fills it, and so does one step of
verl's default `max_num_batched_tokens`."""

DEFAULT_UTILIZATION = 0.9
"""vLLM's long-standing `gpu_memory_utilization`; verl's rollout default is lower (0.5), pass yours."""

WAKE_S = 0.2
"""Fixed part of waking a sleeping engine. vLLM's sleep-mode measurements (blog, 26 Oct 2025, level 1): 0.26 s for a 1.5 GB model, 0.82 s
for 8.3 GB, which is 0.14 s at no bytes; rounded up for the RPCs to several workers."""

HOST_TO_GPU_BYTES_PER_S = 35e9
"""Pinned host memory to each of 8 H100 at once over PCIe 5: 35.0 to 35.4 GB/s (NVIDIA/nvbandwidth issue 24, `host_to_device_memcpy_sm`)."""


@dataclass(frozen=True, slots=True)
class Memory:
    """What one GPU of a replica holds.

    Every GPU of a tensor-parallel group holds its share of the weights and, for *every* token of the replica, its share of the KV heads.
    So the tokens that fit one GPU are the tokens of the replica.
    """

    gpu_bytes: int
    """Memory of the GPU as torch reports it (`torch.cuda.get_device_properties().total_memory`)."""
    weight_bytes: int
    kv_bytes_per_token: int
    overhead_bytes: int
    """Activations, communication buffers, CUDA context and graphs."""

    @property
    def load_s(self) -> float:
        """Seconds to bring the weights back from pinned host memory (`LatencyModel.weight_load_s`)."""
        return WAKE_S + self.weight_bytes / HOST_TO_GPU_BYTES_PER_S

    def kv_tokens(self, gpu_memory_utilization: float) -> int:
        """Tokens that fit beside the weights, 0 if the weights alone do not."""
        if not 0.0 < gpu_memory_utilization <= 1.0:
            raise ValueError(f"gpu_memory_utilization must be in (0, 1], got {gpu_memory_utilization}")
        free = self.gpu_bytes * gpu_memory_utilization - self.weight_bytes - self.overhead_bytes
        return max(0, int(free // self.kv_bytes_per_token))


@dataclass(frozen=True, slots=True)
class FitQuality:
    """How well a calibrated engine explains the turns it was fitted to, and where it was not looked at."""

    turns: int
    median_error: float
    """Median over the turns of |predicted - recorded| / recorded engine time."""
    p90_error: float
    max_batch: float
    """Largest mean batch a turn ran in; beyond it the fit extrapolates."""
    max_context: float
    """Largest mean context per sequence, tokens."""


@dataclass(frozen=True, slots=True)
class AffineDecode:
    """Seconds per decode step: `base_s + per_seq_s * batch + per_context_s * batch * context`, exact for all arguments."""

    base_s: float
    per_seq_s: float = 0.0
    per_context_s: float = 0.0

    def __call__(self, batch: Any, context: Any) -> Any:
        return self.base_s + batch * (self.per_seq_s + self.per_context_s * context)


@dataclass(frozen=True, slots=True)
class AffinePrefill:
    """Seconds to prefill: `base_s + per_token_s * new + per_context_s * new * (context + new / 2)`, and 0 for no new tokens.

    The last term is attention: each new token reads what is cached and, on average, half of its fellows.
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

    `decode(batch, context)` and `prefill(new, context)` return seconds; they are non-decreasing and take numbers or arrays.
    """

    decode: Callable[[Any, Any], Any]
    prefill: Callable[[Any, Any], Any]
    memory: Memory | None = None
    """None: not known, KV not limiting."""
    load_s: float = 0.0
    fit: FitQuality | None = None
    """None: not fitted to a run, but a table or a formula."""
    host_s: float = 0.0
    """Seconds that the host adds to every step, beyond `decode` and `prefill`."""


@dataclass(frozen=True, slots=True)
class LatencyModel:
    """Times and sizes of one model on one kind of GPU, by tensor-parallel degree.

    Raises:
        ValueError: from every method that takes a `tp` the model does not know.
    """

    name: str
    engines: Mapping[int, Engine] = field(repr=False)
    source: str = ""
    """Where the numbers come from, for reports."""

    def __post_init__(self) -> None:
        if not self.engines or min(self.engines) < 1:
            raise ValueError(
                f"latency model {self.name}: needs engines for tensor-parallel degrees of 1 or more, got {sorted(self.engines)}"
            )

    @property
    def tps(self) -> tuple[int, ...]:
        """Tensor-parallel degrees the model knows, ascending; not all need to fit (`fits`)."""
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
            batch: sequences decoding together, 1 or more (fractions allowed: a mean).
            context_tokens: tokens each of them attends to, the mean over the batch. Arrays broadcast against each other.

        Non-decreasing in both. A mean is enough: attention reads the sum of the contexts. The shipped tables cover batches to 512 and
        contexts from 128 to 131072; beyond, times grow linearly (within 10 % of the source at twice the batch or context).
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
        """Seconds to read `new_tokens` of one sequence after `context_tokens` that are cached, alone on the replica; 0 for no new tokens.

        The first output token comes with it. Non-decreasing in both. A prefill that shares its step with decoding sequences reads no
        weights of its own: it adds about `prefill_s(tp, new, context) - prefill_s(tp, 1, context)` to their step. The shipped tables cover
        131072 tokens of each; more new tokens at once are extrapolated linearly, too low by a third at twice that.
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
        """Tokens the KV cache of a replica holds (all its GPUs together); 0 where the weights do not fit, None where it is not known.

        An estimate, on the careful side; a running engine logs its own number, which is better.
        """
        memory = self._engine(tp).memory
        return None if memory is None else memory.kv_tokens(gpu_memory_utilization)

    def kv_bytes(self, tp: int) -> int | None:
        """Bytes of one token's KV cache on each GPU of a replica; None where it is not known."""
        memory = self._engine(tp).memory
        return None if memory is None else memory.kv_bytes_per_token

    def fits(self, tp: int, gpu_memory_utilization: float = DEFAULT_UTILIZATION) -> bool:
        """Whether the weights and at least `MIN_KV_TOKENS` fit (True where memory is not known); False for a degree the model does not
        know."""
        if tp not in self.engines:
            return False
        tokens = self.kv_tokens(tp, gpu_memory_utilization)
        return tokens is None or tokens >= MIN_KV_TOKENS

    def with_host(self, host_s: float, how: str) -> LatencyModel:
        """The model with `host_s` more seconds in every engine step, of the degrees that no run was fitted to: what was fitted holds them.

        Args:
            how: where the number comes from; told with the model's source.

        Raises:
            ValueError: negative or not finite.
        """
        if not 0 <= host_s < float("inf"):
            raise ValueError(f"the host's seconds in a step must be finite and not negative, got {host_s}")
        engines = {tp: engine if engine.fit else replace(engine, host_s=host_s) for tp, engine in self.engines.items()}
        return replace(self, engines=engines, source=f"{self.source}, and {1e3 * host_s:.2g} ms of host time in every step ({how})")

    def weight_load_s(self, tp: int) -> float:
        """Seconds to bring a sleeping replica's weights back from pinned host memory, all its GPUs at once (vLLM sleep level 1).

        From the shipped table: `WAKE_S + weight bytes per GPU / HOST_TO_GPU_BYTES_PER_S`. Weights from a trainer or a disk take longer.
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
        """A model by formula (`AffineDecode`, `AffinePrefill`), for tests and for engines on CPUs.

        Args:
            speedup: by tensor-parallel degree, what all step and prefill times are divided by; missing degrees 1.
            memory: of every degree alike; None: KV not limiting.

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
        return ValueError(f"latency model {self.name} knows tensor-parallel degrees {list(self.tps)}, not {tp}")


HOST_STEP_S = 0.001
"""Assumed where no run tells: in `bench/fidelity` vLLM's engine core and server take 0.08 and 0.05 of a core during decode steps of 6 to
13 ms, which is 0.8 to 1.7 ms a step with up to 8 sequences. The lower end, because asynchronous scheduling hides a part of it on a GPU.
vLLM before it (0.5, its issue 6854) left the GPU idle for 4 to 13 ms a step."""
