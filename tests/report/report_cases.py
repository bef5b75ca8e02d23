"""Small questions with known answers, shared by the tests of what a user sees."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import pytest

from verl_heddle.commands import plan, simulate
from verl_heddle.fleet import Replica
from verl_heddle.latency import LatencyModel
from verl_heddle.report.draws import generated
from verl_heddle.report.setting import setting
from verl_heddle.report.study import ARMS, Answer, study
from verl_heddle.simulate import Result
from verl_heddle.simulate import simulate as simulated
from verl_heddle.simulate.baselines import RoundRobin
from verl_heddle.traces import write
from verl_heddle.trajectory import Trajectory, Turn


def chromium() -> str:
    """A browser to look at pages with; the test that asks fails where there is none."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(name):
            return found
    pytest.fail("needs Chromium or Chrome: `envs/tools.sh` says how", pytrace=False)


def small(arms=ARMS, seeds=(0, 1), slots=8, gpus=4, tp=None, workload="search", prompts=8, samples=4, jobs=1) -> Answer:
    """A step with more trajectories than slots."""
    return study(setting("qwen3-8b", "h200", gpus, tp, slots), generated(workload, prompts, samples, seeds), arms, jobs)


def lived(prompt: str, trial: int, tokens: tuple[int, ...], step: int | None = 0, **meta) -> Trajectory:
    """A trajectory as a run records it; the last turn has no tool."""
    turns = [Turn(0 if k == 0 else 20, n, "tool", 0.5, gen_s=1.0, replica="a:1") for k, n in enumerate(tokens)]
    if turns:
        turns[-1] = Turn(turns[-1].input_tokens, tokens[-1], None, None, gen_s=1.0, replica="a:1")
    known = {"validate": False, "outcome": "finished"} | ({} if step is None else {"step": step}) | meta
    return Trajectory("verl", "agents", prompt, trial, 100, tuple(turns), 1.0, "m", known)


def flat(tokens, replicas: int) -> Result:
    """Single turns of some tokens, dealt over replicas of one slot; one second a token, nothing else costs."""
    work = [Trajectory("test", "flat", f"p{k}", 0, 1, (Turn(0, n, None, None),)) for k, n in enumerate(tokens)]
    fleet = [Replica(f"r{k}", slots=1) for k in range(replicas)]
    return simulated(work, fleet, LatencyModel.affine(1.0), RoundRobin())


def trace(folder: Path, trajectories, name="trace.jsonl") -> str:
    """Write a trace file; its path."""
    path = folder / name
    write(path, trajectories)
    return str(path)


def command(*words: str) -> int:
    """Run `verl-heddle <words>`; its exit code."""
    parser = argparse.ArgumentParser(prog="verl-heddle")
    commands = parser.add_subparsers(dest="command", required=True)
    for module in (simulate, plan):
        module.add_parser(commands)
    try:
        args = parser.parse_args(words)
    except SystemExit as stop:
        return int(stop.code or 0)
    return {"simulate": simulate, "plan": plan}[args.command].run(args)
