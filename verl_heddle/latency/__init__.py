"""Latency of a rollout replica: shipped tables, formulas, and calibration from a recorded run.

Example:

    model = load("H200", "Qwen/Qwen3-8B")
    model.decode_s(tp=2, batch=64, context_tokens=8192)

returns 0.0125 seconds per decode step.
"""

from verl_heddle.latency.calibrate import calibrate, calibrate_host
from verl_heddle.latency.model import HOST_STEP_S, AffineDecode, AffinePrefill, Engine, FitQuality, LatencyModel, Memory
from verl_heddle.latency.shipped import available, load
from verl_heddle.latency.surface import Surface, monotone_fit

__all__ = [
    "HOST_STEP_S",
    "AffineDecode",
    "AffinePrefill",
    "Engine",
    "FitQuality",
    "LatencyModel",
    "Memory",
    "Surface",
    "available",
    "calibrate",
    "calibrate_host",
    "load",
    "monotone_fit",
]
