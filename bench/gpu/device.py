"""What a result was made with: device, clocks, versions, commit."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bench.fidelity.run import commit as commit_of_the_clone

ROOT = Path(__file__).resolve().parents[2]
COMMIT = "HEDDLE_BENCH_COMMIT"
"""Environment variable that tells the commit where the checkout came without its .git."""

PACKAGES = ("verl-heddle", "verl", "vllm", "torch", "ray", "transformers", "numpy", "triton")
CLOCKS = "clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu,memory.used,driver_version,persistence_mode"
ASK_S = 20


def commit() -> str:
    """What was run: the commit, `+changes` behind it where the working tree differs; "unknown" where nobody knows."""
    if told := os.environ.get(COMMIT):
        return told
    number = commit_of_the_clone()
    try:
        done = subprocess.run(["git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"], capture_output=True, timeout=ASK_S)
    except (OSError, subprocess.SubprocessError):
        return number
    return f"{number}+changes" if done.returncode == 0 and done.stdout.strip() else number


def sources() -> str:
    """Digest of the code that was run, to tell two working trees apart."""
    whole = hashlib.sha256()
    for folder in ("verl_heddle", "bench/gpu", "bench/schedule", "recipes/math"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            whole.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return whole.hexdigest()[:16]


def versions() -> dict[str, str]:
    """Of what decides the times."""
    told = {"python": platform.python_version(), "sources": sources()}
    for name in PACKAGES:
        try:
            told[name] = version(name)
        except PackageNotFoundError:
            told[name] = "not installed"
    return told


def clocks() -> dict[str, str]:
    """What nvidia-smi says now; empty without it."""
    command = ["nvidia-smi", f"--query-gpu={CLOCKS}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=ASK_S)
    except (OSError, subprocess.SubprocessError):
        return {}
    values = [one.strip() for one in done.stdout.splitlines()[0].split(",")] if done.stdout.strip() else []
    return dict(zip(CLOCKS.split(","), values, strict=False))


def device() -> dict[str, Any]:
    """The GPU torch sees first, or the CPU. Does not create a CUDA context: nvidia-smi answers, and torch only counts."""
    told: dict[str, Any] = {"type": "cpu", "name": f"{os.cpu_count()} cores, {platform.machine()}", "clocks": {}}
    command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=ASK_S)
    except (OSError, subprocess.SubprocessError):
        return told
    if not done.stdout.strip():
        return told
    name, memory, driver = (one.strip() for one in done.stdout.splitlines()[0].split(","))
    return {"type": "cuda", "name": name, "memory_gib": float(memory) / 1024, "driver": driver, "clocks": clocks()}


def used_gib() -> float | None:
    """Memory in use on the first GPU, GiB, by all processes; None without one."""
    told = clocks().get("memory.used", "")
    return float(told.split()[0]) / 1024 if told.endswith("MiB") else None


def resident_gib(pid: int) -> float:
    """Memory of a process and its descendants on a CPU machine, shared pages divided among those who share them, GiB."""
    from bench.fidelity.disturbance import family

    total = 0
    for one in family(pid):
        try:
            text = Path(f"/proc/{one}/smaps_rollup").read_text()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:"))
    return total / 2**20
