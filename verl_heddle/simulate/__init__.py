"""A simulated cluster that drives the same `Orchestrator` as a real one.

    from verl_heddle.latency import load
    from verl_heddle.orchestrator import Orchestrator
    from verl_heddle.simulate import make_fleet, simulate
    latency = load("h200", "Qwen3-8B")
    result = simulate(trajectories, make_fleet(64, 1, latency), latency, Orchestrator(Options()))
    result.makespan_s, result.split()

Modelled: continuous batching in virtual time; slots; KV capacity with vLLM's preemption and recomputation; the prefix cache across turns
and across the samples of a prompt; a host tier for evicted KV; chunked prefill that slows decoding; tools and their concurrency limit;
groups; early stop; migrations; pre-warming; outages; fleet changes. Host time is one constant per turn, plus one per step in the latency
model.
Not modelled: sampling (lengths are inputs), network and KV transfer between replicas, pipeline and data parallelism inside a replica,
speculative decoding, block-granular KV capacity.
"""

from verl_heddle.simulate.bound import Bound, lower_bound
from verl_heddle.simulate.layouts import DEFAULT_SLOTS, make_fleet
from verl_heddle.simulate.options import PRIORITY, EngineOptions, FleetChange, HostTier, Outage
from verl_heddle.simulate.policy import Action, Cancel, Latency, Policy, Prewarm, StopAt
from verl_heddle.simulate.result import ReplicaResult, Result
from verl_heddle.simulate.run import simulate

__all__ = [
    "DEFAULT_SLOTS",
    "PRIORITY",
    "Action",
    "Bound",
    "Cancel",
    "EngineOptions",
    "FleetChange",
    "HostTier",
    "Latency",
    "Outage",
    "Policy",
    "Prewarm",
    "ReplicaResult",
    "Result",
    "StopAt",
    "lower_bound",
    "make_fleet",
    "simulate",
]
