"""What does asking the router cost? p99 of acquire under open-loop load, CPU per turn, memory over a million turns.

    python bench/router/run.py                   # curve and memory of every option, about 20 minutes; writes bench/results/cpu/router.json
    python bench/router/run.py --quick           # one option, two rates, few turns: a minute; prints only
    python bench/router/run.py --part curve      # or alone, or memory; what is in the JSON and not measured again stays
    python bench/router/run.py --options default place

Three parts. `alone`: the router's methods called in this process, without Ray: CPU per turn. `memory`: the same for a million turns, the
predictor fitted anew after every step. `curve`: the actor as verl gets it, in a Ray cluster on this machine, load from other processes
(load.py), 10,000 trajectories under way on 64 replicas (fakes: nothing runs on them); `floor` is an actor that decides nothing. On
a machine of two cores the load takes its share of the CPU from the actor; the CPU of both is in the table.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np

from bench.provenance import save
from bench.router import page
from bench.router.alone import OPTIONS, Alone, resident_mib, rss_mib, shape, step_times
from bench.router.load import Loader, cpu_s
from verl_heddle.predict.predictor import Predictor
from verl_heddle.trajectory import Decision, Reason
from verl_heddle.verl_plugin.calls import ANSWER_S
from verl_heddle.verl_plugin.news import News

RESULT = ROOT / "bench/results/cpu/router.json"
REPLICAS, LIVE = 64, 10_000
FLOOR = "floor"
"""In place of an option: an actor that decides nothing."""

PARTS = ("alone", "memory", "scale", "curve", "step")
RATES = (250, 500, 1000, 1500, 2000, 2500, 3000)
TARGET_RATE, TARGET_S = 2000, 0.002
POINT_S, WARM_S, PAUSE_S = 8.0, 2.0, 0.5
TURNS = 1_000_000
STEP_TURNS, STEP_S = 20, 300.0
STEP_KV = 2 * LIVE // REPLICAS * 20_000
"""Of the step that is replayed; the KV cache has room for all contexts, so nobody waits for anything but answers."""
SCALE, SCALE_TURNS, SHORT_KV = (1000, 100_000), 50_000, 120_000
"""Replicas and trajectories under way; KV tokens of a replica where there is no room for all of them."""
LOOKS = 20
"""Looks at the memory over all turns."""
SHARE = 0.9
"""Of the offered rate that has to be answered for a point to count as kept up with."""


def percentiles(seconds: Any) -> dict[str, float]:
    """Milliseconds."""
    return {name: 1e3 * float(np.percentile(seconds, share)) for name, share in (("p50", 50), ("p90", 90), ("p99", 99), ("p999", 99.9))}


def alone(name: str, turns: int) -> dict[str, Any]:
    """CPU microseconds per turn in steady state, and of acquire alone."""
    play = Alone(name, REPLICAS, LIVE)

    async def run() -> float:
        await play.turns(3 * LIVE)
        await play.fit()
        play.acquire_s.clear()
        return await play.turns(turns)

    return {"us_per_turn": 1e6 * asyncio.run(run()) / turns, "acquire_ms": percentiles(play.acquire_s)}


def memory(name: str, turns: int) -> dict[str, Any]:
    """Resident MiB after equal numbers of turns, the predictor fitted at every step's end; then everybody ends, and what is left."""
    play = Alone(name, REPLICAS, LIVE)
    rows: list[tuple[int, float]] = []

    async def run() -> float:
        cpu = 0.0
        for look in range(LOOKS):
            cpu += await play.turns(turns // LOOKS)
            play.acquire_s.clear()
            rows.append(((look + 1) * (turns // LOOKS), rss_mib()))
            print(f"    {name}: {rows[-1][0]:,} turns, {rows[-1][1]:.0f} MiB", flush=True)
        return cpu

    cpu = asyncio.run(run())
    left = {what: count for what, count in asyncio.run(play.drain()).items() if count}
    half = [mib for _, mib in rows[LOOKS // 2 :]]
    return {"turns": turns, "mib": rows, "growth_second_half_mib": half[-1] - half[0], "cpu_s": cpu, "left": left} | {
        "trajectories": play.crowd.ended
    }


def scale(short: bool) -> dict[str, Any]:
    """The default at 1,000 replicas and 100,000 trajectories under way, in this process; `short`: there is no KV cache for all of them."""
    before, kv_tokens = rss_mib(), SHORT_KV if short else None
    play = Alone("default", *SCALE, kv_tokens)

    async def run() -> float:
        await play.turns(2 * SCALE[1])
        play.acquire_s.clear()
        return await play.turns(SCALE_TURNS)

    us = 1e6 * asyncio.run(run()) / SCALE_TURNS
    waiting = play.router._orchestrator.residents.now["waiting"] if play.router._orchestrator.residents else 0
    found = {"us_per_turn": us, "acquire_ms": percentiles(play.acquire_s), "asked_share": len(play.acquire_s) / SCALE_TURNS}
    return found | {"waiting": waiting, "mib": rss_mib() - before, "turns": SCALE_TURNS, "replicas": SCALE[0], "live": SCALE[1]}


def taught() -> bytes:
    """A predictor's state after three steps' worth of turns, its trees fitted."""
    play = Alone("place", REPLICAS, LIVE)

    async def run() -> None:
        await play.turns(3 * LIVE)
        await play.fit()

    asyncio.run(run())
    predictor = play.router._orchestrator.predictor
    assert isinstance(predictor, Predictor) and predictor.model is not None
    return predictor.to_bytes()


@contextmanager
def cluster(name: str, loaders: int, kv_tokens: int | None = None) -> Iterator[tuple[Any, int, list[Any]]]:
    """Ray on this machine with the router under an option, the id of its process, and processes of load; `kv_tokens`: of a replica, if
    not verl's default."""
    import ray

    from verl_heddle.verl_plugin.router import RouterActor

    state = taught() if name != FLOOR and OPTIONS[name]().predicts else None
    ray.init(num_cpus=loaders + 1, include_dashboard=False, object_store_memory=100_000_000, log_to_driver=False)
    try:
        if name == FLOOR:
            router = ray.remote(max_concurrency=100_000, enable_task_events=False, num_cpus=0)(Floor).remote()
        else:
            handle = ray.remote(num_cpus=0)(Sink).remote()
            servers = {f"replica_{number}": handle for number in range(REPLICAS)}
            router = RouterActor.options(max_restarts=0, num_cpus=0).remote(servers, {})
            ray.get(router.configure.remote(OPTIONS[name](), **shape(servers, kv_tokens)), timeout=60)
            ray.get(router.step_times_known.remote(step_times()), timeout=60)
        if state is not None:
            assert ray.get(router.learn_again.remote(state), timeout=60) is None
        process = ray.get(router.__ray_call__.remote(lambda _: os.getpid()), timeout=60)
        make = ray.remote(num_cpus=0, max_concurrency=10)(Loader)
        names, predicts = [f"replica_{number}" for number in range(REPLICAS)], name != FLOOR and OPTIONS[name]().predicts
        made = [make.remote(router, names, f"load{number}", LIVE // loaders, name == "place", predicts) for number in range(loaders)]
        yield router, process, made
    finally:
        ray.shutdown()


def curve(name: str, rates: list[int], seconds: float, loaders: int) -> list[dict[str, Any]]:
    """One point per rate, on one actor."""
    import ray

    with cluster(name, loaders) as (router, process, crowd):

        def load(rate: float, point_s: float) -> list[Any]:
            return ray.get([one.load.remote(rate / loaders, point_s, PAUSE_S) for one in crowd], timeout=10 * point_s + 120)

        load(min(1000.0, max(rates)), 2 * LIVE / min(1000.0, max(rates)))  # everybody under way
        points = []
        for rate in rates:
            load(rate, WARM_S)
            before, failed = cpu_s(process), ray.get(router.stats.remote(), timeout=60)
            told = load(rate, seconds)
            points.append(_point(rate, told, cpu_s(process) - before, resident_mib(process)))
            after = ray.get(router.stats.remote(), timeout=60)
            points[-1]["failures"] = sum(count for key, count in after.items() if key.startswith("failed_"))
            points[-1]["moves"] = after["moves"] - failed["moves"]
            print(f"    {name}:", text(points[-1]), flush=True)
            if points[-1]["answered_per_s"] < SHARE * rate:
                break
        ray.get([one.drain.remote() for one in crowd], timeout=300)
        return points


def step(name: str, loaders: int) -> dict[str, Any]:
    """A step of `LIVE` trajectories with `STEP_TURNS` turns each: what their waits add to the seconds in engines and tools."""
    import ray

    with cluster(name, loaders, STEP_KV) as (router, process, crowd):
        before = cpu_s(process)
        told = ray.get([one.step.remote(STEP_TURNS, STEP_S / STEP_TURNS) for one in crowd], timeout=4 * STEP_S)
        first, others, busy = (np.concatenate([getattr(one, field) for one in told]) for field in ("first_s", "others_s", "busy_s"))
        longest = busy.max()
        return {
            "step_s": STEP_S,
            "turns": STEP_TURNS * len(first),
            "first_s": {"p50": float(np.median(first)), "max": float(first.max())},
            "others_s": {"p50": float(np.median(others)), "max": float(others.max())},
            "makespan_added_s": float((first + others + busy).max() - longest),
            "longest_s": float(longest),
            "wall_s": max(one.seconds for one in told),
            "actor_us_per_turn": 1e6 * (cpu_s(process) - before) / (STEP_TURNS * len(first)),
            "failures": sum(count for key, count in ray.get(router.stats.remote(), timeout=60).items() if key.startswith("failed_")),
        }


class Sink:
    """Stands for every server (a fake): takes new priorities."""

    def heddle_priorities(self, table: dict[str, int]) -> int:
        return len(table)


class Floor:
    """An actor of the router's kind that decides nothing: what Ray takes."""

    def turns_started(self, turns: list[Any], told: Any, worker: str) -> tuple[list[Decision], int]:
        return [Decision("replica_0", 0, Reason.STICKY)] * len(turns), 0

    def told(self, events: Any) -> None: ...

    def stats(self) -> dict[str, int]:
        return {"moves": 0}

    async def news(self, worker: str, router: str, heard: int) -> News:
        """There are none."""
        await asyncio.sleep(ANSWER_S)
        return News("floor", [])


def _point(rate: float, told: list[Any], actor_cpu_s: float, actor_mib: float) -> dict[str, Any]:
    acquire, asked = (np.concatenate([getattr(one, name) for one in told]) for name in ("acquire_s", "asked"))
    wall = max(one.seconds for one in told)
    return {
        "rate": rate,
        "turns": len(acquire),
        "answered_per_s": len(acquire) / wall,
        "acquire_ms": percentiles(acquire[asked]),
        "told_ms": percentiles(acquire[~asked]) if not asked.all() else None,
        "asked_share": float(asked.mean()),
        "late_ms": percentiles(np.concatenate([one.late_s for one in told])),
        "turns_per_call": len(acquire) / sum(one.calls for one in told),
        "held": sum(one.held for one in told),
        "actor_us_per_turn": 1e6 * actor_cpu_s / len(acquire),
        "actor_cpu_share": actor_cpu_s / (wall + PAUSE_S),
        "loaders_cpu_share": sum(one.cpu_s for one in told) / wall,
        "actor_mib": actor_mib,
    }


def text(point: dict[str, Any]) -> str:
    """One point on a line."""
    took, told = point["acquire_ms"], point["told_ms"]
    others = f", p99 {told['p99']:.2f} for the others" if told else ""
    return (
        f"{point['rate']:5d}/s: answered {point['answered_per_s']:5.0f}/s, p50 {took['p50']:.2f} p99 {took['p99']:.2f} "
        f"p99.9 {took['p999']:.2f} ms for the {point['asked_share']:.0%} that ask{others}, {point['turns_per_call']:.1f} turns a call, "
        f"begun late p99 {point['late_ms']['p99']:.1f} ms, actor {point['actor_us_per_turn']:.0f} us/turn "
        f"({point['actor_cpu_share']:.0%} of a core), load {point['loaders_cpu_share']:.0%}"
    )


def facts() -> dict[str, Any]:
    """Where and with what."""
    versions = {"python": platform.python_version()} | {name: version(name) for name in ("verl-heddle", "ray", "numpy")}
    machine = f"{os.cpu_count()} cores, {platform.machine()}; load and actor share them"
    return {"date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine, "versions": versions} | {
        "replicas": REPLICAS,
        "live": LIVE,
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="option default, two rates, few turns; nothing written")
    parser.add_argument("--part", choices=PARTS, nargs="+", default=list(PARTS))
    parser.add_argument("--options", choices=[FLOOR, *OPTIONS], nargs="+", default=[FLOOR, *OPTIONS], help="what is measured (all)")
    parser.add_argument("--rates", type=int, nargs="+", default=list(RATES), help="turns a second")
    parser.add_argument("--turns", type=int, default=TURNS, help="of the memory part")
    parser.add_argument("--loaders", type=int, default=2, help="processes of load (2)")
    parser.add_argument("--json", type=Path, default=RESULT)
    args = parser.parse_args(argv)
    seconds = POINT_S
    if args.quick:
        args.options, args.rates, args.turns, seconds = ["default"], args.rates[:2], 20_000, 4.0
    result = json.loads(args.json.read_text()) if args.json.exists() and not args.quick else {}
    for name in args.options:
        found = result.setdefault("options", {}).setdefault(name, {})
        if "alone" in args.part and name != FLOOR:
            found["alone"] = alone(name, 5_000)
            print(f"    {name}: alone {found['alone']['us_per_turn']:.0f} us/turn, acquire {found['alone']['acquire_ms']}", flush=True)
        if "memory" in args.part and name != FLOOR:
            found["memory"] = memory(name, args.turns)
        if "scale" in args.part and name == "default" and not args.quick:
            found["scale"] = {"room for all": scale(False), "short of room": scale(True)}
            print(f"    {name}: {found['scale']}", flush=True)
        if "curve" in args.part:
            found["curve"] = curve(name, args.rates, seconds, args.loaders)
        if "step" in args.part and name in (FLOOR, "default") and not args.quick:
            found["step"] = step(name, args.loaders)
            print(f"    {name}: {found['step']}", flush=True)
        if not args.quick:
            result |= facts()
            save(args.json, result, kept=True)
            if args.json == RESULT:
                page.write(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
