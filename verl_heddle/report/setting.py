"""Define the setting of a simulation: a model, GPUs, verl's rollout settings, and the costs of a step other than its kernels.

Defaults are verl's own (`rollout.yaml` of verl 0.9.1: 256 sequences, 0.5 of the GPU's memory), except for the tensor-parallel degree. Its
default is the usual choice: the smallest degree that holds the model with room for KV, and at least 2 for a dense 32B (Heddle, arXiv
2603.28101, section 8) and dense models as large. Costs that a source of step times does not cover (host time, time between turns, weight
sync) have realistic defaults, and `assumed` names them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import inf
from typing import Literal

from verl_heddle.fleet import BATCH_TOKENS, Replica
from verl_heddle.latency import HOST_STEP_S, LatencyModel
from verl_heddle.latency.shape import Shape
from verl_heddle.latency.times import CALIBRATED, Times, calibrated, times, would_fit
from verl_heddle.simulate import DEFAULT_SLOTS, EngineOptions, HostTier, make_fleet
from verl_heddle.simulate.workload import most_kv
from verl_heddle.trajectory import Trajectory

UTILIZATION = 0.5
"""verl's default `rollout.gpu_memory_utilization`: the trainer shares the GPU."""

HEAVY_BYTES = 60e9
"""Weight bytes from which a dense model is usually split over two GPUs even if it fits on one: a dense 32B in bf16 is 66 GB."""

ROOM_TOKENS = 100_000
"""KV tokens for which the usual degree has room: two or three trajectories of full length (40K). With less, a baseline is misconfigured."""

OVERHEAD_S = 0.015
"""Seconds of a turn outside engine and tool: router call 5 to 6 ms, RPC 8 ms, the client's own work 1 ms, measured with verl's server
class in `bench/fidelity`. Parsing, tokenising and a reward per turn come on top if the agent loop does them."""


@dataclass(frozen=True)
class Setting:
    """`slots`: `max_num_seqs` of a replica; `utilization`: vLLM's `gpu_memory_utilization`; `overhead_s`: a turn's seconds outside engine
    and tool; `host_s`: host seconds in an engine step (included in `latency`). Build it with `setting`, which validates."""

    latency: LatencyModel
    gpu: str
    gpus: int
    tp: int
    slots: int = DEFAULT_SLOTS
    utilization: float = UTILIZATION
    overhead_s: float = 0.0
    host_s: float = 0.0
    synced_s: float | None = None
    """Weight sync before a step, seconds; None: see `sync_s`."""
    tools_at_once: float = inf
    """Tool calls that run concurrently in a whole step; inf: all, as in verl's agent loops."""
    assumed: tuple[str, ...] = ()
    """Options that were not given: their values are assumed, not measured on these engines."""
    tier: HostTier = field(default_factory=HostTier)
    """Where `stock_tier` keeps evicted KV cache."""
    times: Times | None = None
    """The source of the step times and its error; None: built by hand."""
    asked: bool = True
    """Whether the user chose `tp`; if not, `holding` may replace it by a degree that holds the work."""
    mixed: tuple[int, ...] = ()
    """Degrees of a mixed layout to simulate besides the fixed degrees, most GPUs first; empty: none."""

    @property
    def model(self) -> str:
        """Model and GPU as named in the latency table."""
        return self.latency.name

    @property
    def step_times(self) -> str:
        """The source of the step times, and its error."""
        return self.latency.source if self.times is None else self.times.told(self.latency.source)

    @cached_property
    def tps(self) -> tuple[int, ...]:
        """Degrees that hold the model and divide the GPUs, ascending."""
        return tuple(tp for tp in self.latency.tps if self.gpus % tp == 0 and self.latency.fits(tp, self.utilization))

    @cached_property
    def bound_tps(self) -> tuple[int, ...]:
        """Degrees that a replica of any layout could have, including those that do not divide the GPUs evenly."""
        return tuple(tp for tp in self.latency.tps if tp <= self.gpus and self.latency.fits(tp, self.utilization))

    @cached_property
    def kv_tokens(self) -> Mapping[int, int | None]:
        """KV tokens of a replica by degree."""
        return {tp: self.latency.kv_tokens(tp, self.utilization) for tp in self.latency.tps}

    def fleet(self, tp: int) -> list[Replica]:
        """All GPUs cut into replicas of one degree."""
        return make_fleet(self.gpus, tp, self.latency, self.slots, self.kv_tokens)

    def sync_s(self, tp: int) -> float:
        """Seconds of weight sync before a step for engines of that degree.

        If not given: a lower limit, a replica's weights at PCIe speed (`LatencyModel.weight_load_s`)."""
        return self.latency.weight_load_s(tp) if self.synced_s is None else self.synced_s

    def mixed_fleet(self) -> list[Replica]:
        """All GPUs cut into the replicas of `mixed`."""
        return make_fleet(self.gpus, self.mixed, self.latency, self.slots, self.kv_tokens)

    def engine(self, order: Literal["fcfs", "priority"]) -> EngineOptions:
        """vLLM's settings; the token budget is raised to the number of slots if it is smaller, because vLLM requires that."""
        return EngineOptions(order, batch_tokens=max(BATCH_TOKENS, self.slots), turn_overhead_s=self.overhead_s)

    def able(self, trajectories: Sequence[Trajectory]) -> tuple[int, ...]:
        """The degrees of `tps` whose replica holds the longest turn.

        Raises:
            ValueError: no degree holds it, or the degree that the user chose does not.
        """
        needed = most_kv(trajectories)
        able = tuple(tp for tp in self.tps if (held := self.kv_tokens[tp]) is None or held >= needed)
        if not able or (self.asked and self.tp not in able):
            tp = self.tp if able else self.tps[-1]
            raise ValueError(
                f"the longest turn needs {needed:,} KV tokens and a replica of tp={tp} holds {self.kv_tokens[tp]:,}: "
                f"raise {'--tp or ' if able else ''}--gpu-memory-utilization"
            )
        return able

    def holding(self, trajectories: Sequence[Trajectory]) -> tuple[Setting, str]:
        """This setting, or one at the smallest degree that holds the longest turn if `tp` is a default and does not hold it; and the
        reason in one line, empty if nothing changes.

        Raises:
            ValueError: as in `able`.
        """
        able = self.able(trajectories)
        if self.tp in able:
            return self, ""
        why = (
            f"tp={able[0]}: the smallest degree whose replica holds the longest turn, {most_kv(trajectories):,} KV tokens "
            f"(tp={self.tp} holds {self.kv_tokens[self.tp]:,})"
        )
        return replace(self, tp=able[0]), why


def setting(
    model: str,
    gpu: str,
    gpus: int,
    tp: int | None = None,
    slots: int = DEFAULT_SLOTS,
    utilization: float = UTILIZATION,
    overhead_s: float | None = None,
    *,
    host_s: float | None = None,
    sync_s: float | None = None,
    tools_at_once: float | None = None,
    tier: HostTier | None = None,
    weights: str | None = None,
    kv: str | None = None,
    run: tuple[str, Sequence[Trajectory]] | None = None,
) -> Setting:
    """A validated `Setting` with the best available step times; `tp` None: the usual degree. Other arguments left at None take the default
    and are listed in `assumed`.

    Args:
        weights, kv: their precision, "bf16" or "fp8"; None: as in the model's config.
        run: name and trajectories of a recorded run whose engines' times to use.

    Raises:
        ValueError: unknown model or GPU, a number out of range, a run that cannot be calibrated on, or a degree that does not hold the
            model or divide the GPUs; the message is one line.
    """
    found = times(gpu, model, weights, kv)
    if run is not None:
        if host_s is not None:
            raise ValueError("--host-s is part of what --calibrate measures: give only one of them")
        found = calibrated(found, run[1], run[0], tp)
    latency = found.latency
    given = {"host_s": host_s, "overhead_s": overhead_s, "sync_s": sync_s, "tools_at_once": tools_at_once, "offload": tier}
    measured = {"host_s"} if found.kind == CALIBRATED else set()
    assumed = tuple(name for name, value in given.items() if value is None and name not in measured)
    overhead_s = OVERHEAD_S if overhead_s is None else overhead_s
    host_s, host_how = (HOST_STEP_S, "assumed") if host_s is None else (host_s, "as given")
    if gpus < 1 or slots < 1 or not 0 < utilization <= 1:
        raise ValueError(f"--gpus and --slots must be at least 1, --gpu-memory-utilization in (0, 1]; got {gpus}, {slots}, {utilization:g}")
    for option, value in (("--overhead-s", overhead_s), ("--host-s", host_s), ("--sync-s", sync_s or 0.0)):
        if not 0 <= value < 3600:
            raise ValueError(f"{option} must be from 0 to 3600, got {value:g}")
    if found.kind == CALIBRATED:
        host_s = 0.0
    else:
        latency = latency.with_host(host_s, host_how)
    draft = Setting(
        latency,
        latency.name.rsplit(" on ", 1)[-1],
        gpus,
        0,
        slots,
        utilization,
        overhead_s,
        host_s,
        sync_s,
        inf if tools_at_once is None else tools_at_once,
        assumed,
        tier or HostTier(),
        found,
    )
    if not draft.tps:
        raise ValueError(
            f"{latency.name}: no tensor-parallel degree within a node both divides {gpus} GPUs and holds the model in {utilization:g} of "
            f"their memory: {would_fit(found, gpus, utilization)}"
        )
    asked = tp is not None
    if tp is None:
        roomy = [degree for degree in draft.tps if (held := draft.kv_tokens[degree]) is None or held >= ROOM_TOKENS]
        tp = next((degree for degree in roomy if degree >= least_usual(found.shape)), draft.tps[-1])
    if tp not in draft.tps:
        why = "does not divide the GPUs" if gpus % tp else "does not hold the model"
        if tp not in latency.tps:
            why = (
                f"does not divide the model's {found.shape.heads} heads" if not found.shape.splits(tp) else "is not among the degrees known"
            )
        raise ValueError(
            f"--tp {tp} {why} ({latency.name}, {gpus} GPUs, gpu_memory_utilization {utilization:g}); "
            f"possible: {', '.join(map(str, draft.tps))}"
        )
    return replace(draft, tp=tp, asked=asked)


def least_usual(shape: Shape) -> int:
    """The smallest tensor-parallel degree commonly used for a model."""
    return 2 if not shape.experts and shape.weight_bytes(1) >= HEAVY_BYTES else 1
