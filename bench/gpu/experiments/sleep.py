"""Sleep and wake-up of an engine: time and memory left, for both levels; loading weights from another process; starting once more.

Level 1 keeps the weights in host memory, level 2 drops them (they come with the next weight sync, here `worker.py`'s copy by CUDA IPC).
Memory is that of the whole card, as nvidia-smi counts it, less what was in use before the engine started. Where there is no sleep mode
(CPU) the calls run and free nothing; memory is then that of the process and its children.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from typing import Any

from bench.gpu.device import resident_gib, used_gib
from bench.gpu.engines import Handle, started, words
from bench.gpu.one import Run
from bench.gpu.profiles import Profile
from bench.gpu.results import Prediction, Row
from bench.gpu.shapes import Shape
from bench.gpu.worker import share
from verl_heddle.latency import load

TITLE = "Sleep and wake-up: time, memory left; weights by IPC; relaunch"
CAVEATS = ("Memory is the card's, other processes included; less what was in use before.", "One measurement each.")
KV_TOKENS, SLOTS, LEVELS = 8192, 8, (1, 2)


def predict(profile: Profile) -> Prediction:
    """Waking from level 1 where the table has the model: fixed part and weights over PCIe."""
    rows: list[Row] = []
    for shape in profile.sleep_shapes:
        name = shape.name
        rows.append(Row(f"{name}: memory of the engine awake", "GiB"))
        for level in LEVELS:
            wake = load("H200", name).weight_load_s(1) if level == 1 and name == "Qwen3-8B" else None
            rows += [Row(f"{name}: sleep, level {level}", "s"), Row(f"{name}: memory left asleep, level {level}", "GiB")]
            rows += [Row(f"{name}: wake-up, level {level}", "s", wake), Row(f"{name}: first token after wake-up, level {level}", "ms")]
        rows += [Row(f"{name}: weights by IPC", "s"), Row(f"{name}: weights arrived", "yes", 1.0), Row(f"{name}: relaunch", "s")]
    return Prediction(tuple(rows), "wake-up: the shipped table's model (0.2 s + weight bytes over 35 GB/s); nobody predicts the rest")


async def measure(run: Run) -> None:
    """One shape after the other; what the deadline cuts is the larger one."""
    for shape in run.profile.sleep_shapes:
        before = _memory()
        more = {"enable_sleep_mode": True} if run.profile.sleeps else {}
        receiver = {"worker_extension_cls": "bench.gpu.worker.WeightReceiver"}
        async with started(run.profile, run.scratch, SLOTS, KV_TOKENS, shape=shape, **more, **receiver) as (handle,):
            await _cycle(run, shape, handle, before)
        began = time.monotonic()
        async with started(run.profile, run.scratch, SLOTS, KV_TOKENS, shape=shape, **more) as (handle,):
            await handle.generate(words("r", 64, shape.vocabulary), 1, "relaunched")
            run.put(f"{shape.name}: relaunch", time.monotonic() - began, engine_start_s=handle.start_s)


async def _cycle(run: Run, shape: Shape, handle: Handle, before: float) -> None:
    name = shape.name
    await handle.generate(words("w", 64, shape.vocabulary), 8, "warm-up")
    run.put(f"{name}: memory of the engine awake", _memory() - before, sleep_mode=run.profile.sleeps)
    for level in LEVELS:
        began = time.monotonic()
        await asyncio.wait_for(handle.engine.sleep(level), 60)
        run.put(f"{name}: sleep, level {level}", time.monotonic() - began)
        await asyncio.sleep(1.0)  # nvidia-smi is a moment behind
        run.put(f"{name}: memory left asleep, level {level}", max(0.0, _memory() - before))
        began = time.monotonic()
        await asyncio.wait_for(handle.engine.wake_up(), 60)
        run.put(f"{name}: wake-up, level {level}", time.monotonic() - began)
        if level == 2:
            await _weights(run, shape, handle)
        answer = await handle.generate(words(f"l{level}", 64, shape.vocabulary), 1, f"after{level}")
        run.put(f"{name}: first token after wake-up, level {level}", 1e3 * answer.call_s)


async def _weights(run: Run, shape: Shape, handle: Handle) -> None:
    """Send every parameter once to warm up and once to measure."""
    import torch

    told: list[Any] = (await handle.workers("bench_shapes"))[0]
    device = "cpu" if run.profile.device == "cpu" else "cuda"
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        tensors = {name: torch.full(size, 1e-3, dtype=getattr(torch, dtype), device=device) for name, size, dtype in told}
        before = (await handle.workers("bench_sum"))[0]
        packed = share(tensors, folder)
        await handle.workers("bench_take", packed)
        began = time.monotonic()
        size, inside_s = (await handle.workers("bench_take", packed))[0]
        took = time.monotonic() - began
        arrived = (await handle.workers("bench_sum"))[0] != before
    rate = size / 2**30 / max(inside_s, 1e-9)
    run.put(f"{shape.name}: weights by IPC", took, inside_worker_s=inside_s, gib=size / 2**30, gib_per_s=rate, device=device)
    run.put(f"{shape.name}: weights arrived", arrived)
    del tensors
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.ipc_collect()


def _memory() -> float:
    """GiB in use now."""
    used = used_gib()
    return resident_gib(os.getpid()) if used is None else used
