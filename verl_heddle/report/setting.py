"""What a question to the simulator is asked about: a model, GPUs, verl's rollout settings, and what a step costs beside its kernels.

Defaults are verl's own (`rollout.yaml` of verl 0.9.1: 256 sequences, 0.5 of the GPU's memory) but for the tensor-parallel degree, where
the usual choice is the smallest that holds the model with room for KV, and 2 for a dense 32B (Heddle, arXiv 2603.28101, section 8) and what
weighs as much. What a source of step times does not know (host time, time between turns, weight sync) has a default that is something real,
and `assumed` names it.
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
"""Weights from which a dense model is usually split over two GPUs even where one holds it: a dense 32B in bf16 is 66 GB."""

ROOM_TOKENS = 100_000
"""KV tokens that the usual degree leaves room for: two or three trajectories of full length (40K). Less is no baseline but a mistake."""

OVERHEAD_S = 0.015
"""Seconds of a turn outside engine and tool: asking the router 5 to 6 ms, RPC 8 ms, the client's own work 1 ms, measured with verl's server
class in `bench/fidelity`. Parsing, tokenising and a reward per turn come on top where a loop does them."""


@dataclass(frozen=True)
class Setting:
    """`slots` is `max_num_seqs` of a replica, `utilization` vLLM's `gpu_memory_utilization`, `overhead_s` a turn's seconds outside engine
    and tool, `host_s` the host's seconds in an engine step (they are in `latency`). Make it with `setting`, which checks."""

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
    """Tools that run at the same time in a whole step; inf: all, as verl's agent loops do."""
    assumed: tuple[str, ...] = ()
    """Options that nobody gave: what they stand for is assumed, not measured on these engines."""
    tier: HostTier = field(default_factory=HostTier)
    """What `stock_tier` keeps evicted KV cache in."""
    times: Times | None = None
    """Which source the step times have, and how far off it is; None: made by hand."""
    asked: bool = True
    """Whether the user chose `tp`; if not, it may give way to a degree that holds the work (`holding`)."""
    mixed: tuple[int, ...] = ()
    """Degrees of a mixed layout that is asked about beside the fixed degrees, most GPUs first; none: not asked."""

    @property
    def model(self) -> str:
        """Model and GPU as the latency table calls them."""
        return self.latency.name

    @property
    def step_times(self) -> str:
        """Where they come from, and how far off they are."""
        return self.latency.source if self.times is None else self.times.told(self.latency.source)

    @cached_property
    def tps(self) -> tuple[int, ...]:
        """Degrees that hold the model and divide the GPUs, ascending."""
        return tuple(tp for tp in self.latency.tps if self.gpus % tp == 0 and self.latency.fits(tp, self.utilization))

    @cached_property
    def bound_tps(self) -> tuple[int, ...]:
        """Degrees a replica of some layout could have: also those that do not divide the GPUs evenly."""
        return tuple(tp for tp in self.latency.tps if tp <= self.gpus and self.latency.fits(tp, self.utilization))

    @cached_property
    def kv_tokens(self) -> Mapping[int, int | None]:
        """KV tokens of a replica by degree."""
        return {tp: self.latency.kv_tokens(tp, self.utilization) for tp in self.latency.tps}

    def fleet(self, tp: int) -> list[Replica]:
        """All GPUs cut into replicas of one degree."""
        return make_fleet(self.gpus, tp, self.latency, self.slots, self.kv_tokens)

    def sync_s(self, tp: int) -> float:
        """Seconds before a step in which engines of that degree get their weights.

        Not given: what it takes at least, a replica's weights at the speed of PCIe (`LatencyModel.weight_load_s`)."""
        return self.latency.weight_load_s(tp) if self.synced_s is None else self.synced_s

    def mixed_fleet(self) -> list[Replica]:
        """All GPUs cut as `mixed` says."""
        return make_fleet(self.gpus, self.mixed, self.latency, self.slots, self.kv_tokens)

    def engine(self, order: Literal["fcfs", "priority"]) -> EngineOptions:
        """vLLM's settings; with more slots than verl's token budget the budget grows to it, since vLLM refuses less."""
        return EngineOptions(order, batch_tokens=max(BATCH_TOKENS, self.slots), turn_overhead_s=self.overhead_s)

    def able(self, trajectories: Sequence[Trajectory]) -> tuple[int, ...]:
        """Those of `tps` whose replica holds the longest turn.

        Raises:
            ValueError: none does, or not the degree that the user chose.
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
        """This setting, or where nobody chose its degree and that does not hold the longest turn, one at the smallest degree that does;
        and the reason in a line, empty where nothing changes.

        Raises:
            ValueError: as `able`.
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
    """A `Setting` with the best step times there are; `tp` None: the usual one. Of the others None is the default, and told as assumed.

    Args:
        weights, kv: their precision, "bf16" or "fp8"; None: as the model's config says.
        run: name and trajectories of a recorded run whose engines' times to use.

    Raises:
        ValueError: unknown model or GPU, a number out of range, a run that cannot be calibrated on, or a degree that does not hold the
            model or divide the GPUs; one line.
    """
    found = times(gpu, model, weights, kv)
    if run is not None:
        if host_s is not None:
            raise ValueError("--host-s is part of what --calibrate measures: give one of the two")
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
        roomy = [one for one in draft.tps if (held := draft.kv_tokens[one]) is None or held >= ROOM_TOKENS]
        tp = next((one for one in roomy if one >= least_usual(found.shape)), draft.tps[-1])
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
    """The least tensor-parallel degree that is usual for a model."""
    return 2 if not shape.experts and shape.weight_bytes(1) >= HEAVY_BYTES else 1
