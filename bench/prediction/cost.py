"""What prediction costs at 10,000 live trajectories, and what a censoring-aware objective buys."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any

import numpy as np

from bench.prediction.replay import Notebook, play
from verl_heddle.predict import fit as fitting
from verl_heddle.predict.predictor import Predictor
from verl_heddle.predict.window import ROWS, Batch
from verl_heddle.traces import generate
from verl_heddle.trajectory import ToolStart, Trajectory, TrajectoryId, TurnEnd, TurnStart

LIVE = 10_000


def cost() -> dict[str, Any]:
    """Seconds, wall and CPU of one thread (the machine may be shared, CPU time is what one core of its own would need)."""
    predictor, notebook = Predictor(), Notebook()
    items = generate("coding", 100, 16, seed=2)
    for step in range(2):
        play(predictor, notebook, items[step * 800 : step * 800 + 800], step)
    small, pool = predictor.fit_job().batch, predictor.fit_job().pool
    copies = -(-ROWS // len(small))
    prompts = [small.prompt + np.uint32(number) for number in range(copies)]
    noise = np.random.default_rng(0).normal(0, 0.02, (copies * len(small), small.state.shape[1]))
    state = (np.tile(small.state, (copies, 1)) * (1 + np.abs(noise))).astype(np.float32)
    full = Batch(state, *(np.tile(side, (copies, 1)) for side in (small.lower, small.upper)), np.concatenate(prompts))
    full = Batch(*(getattr(full, name)[:ROWS] for name in Batch.__slots__))
    models = []
    result: dict[str, Any] = {
        "live": LIVE,
        "fit_rows": len(full),
        "fit": _timed(lambda: models.append(fitting.FitJob(full, pool).run()), 1),
    }
    predictor.adopt(models[0])
    keys = []
    for number in range(LIVE):
        identity = TrajectoryId(f"p{number // 16}", f"u{number // 16}", number, 9)
        predictor.turn_started(TurnStart(identity, identity.key, 0, 500, 0))
        predictor.turn_finished(TurnEnd(identity, identity.key, "r", 0, 100 + number % 999))
        predictor.tool_started(ToolStart(identity, "run_code"))
        keys.append(identity.key)
    predictor.predict_many(keys)
    result["predict_10000"] = _timed(lambda: predictor.predict_many(keys), 15)
    one = iter(keys * 2)
    result["predict_1"] = _timed(lambda: predictor.predict(next(one)), 500)
    stored = predictor.to_bytes()
    result["stored_bytes"] = len(stored)
    result["restore"] = _timed(lambda: Predictor.from_bytes(stored), 3)
    return result


def censoring() -> dict[str, Any]:
    """Half of the trajectories stopped early: bias and error of log remaining on new prompts, by what is said of the stopped ones.

    A trajectory is stopped where another one, drawn at random, would have ended: the stop knows nothing of its own length, as with a step
    that ends or a group that has enough samples.
    """
    items, new = generate("coding", 150, 8, seed=3), generate("coding", 100, 8, seed=4)
    rng = np.random.default_rng(3)
    limits = rng.permutation([item.output_tokens for item in items]).tolist()
    cut = [_stop(item, limit) for item, limit in zip(items, limits, strict=True)]
    stopped = frozenset(number for number, item in enumerate(cut) if len(item.steps) < len(items[number].steps))
    rest = [item for number, item in enumerate(cut) if number not in stopped]
    variants: dict[str, tuple[list[Trajectory], frozenset[int]]] = {
        "none stopped": (items, frozenset()),
        "aft": (cut, stopped),
        "as if finished": (cut, frozenset()),
        "left out": (rest, frozenset()),
    }
    result: dict[str, Any] = {"stopped_share": len(stopped) / len(items)}
    for name, (train, cancelled) in variants.items():
        predictor, notebook = Predictor(), Notebook()
        play(predictor, notebook, train, 0, cancelled=cancelled)
        predictor.adopt(predictor.fit_job().run())
        looks = play(predictor, notebook, new, 1, group_of={item.prompt_id: item.prompt_id for item in new})
        error = np.array([np.log(look.says["heddle"] / look.left) for look in looks if look.turns in (0, 2)])
        result[name] = {"bias": float(error.mean()), "median_bias": float(np.median(error)), "absolute_error": float(np.abs(error).mean())}
    return result


def _stop(item: Trajectory, limit: float) -> Trajectory:
    """The turns that fit into `limit` tokens, at least one."""
    reached = np.cumsum([turn.output_tokens for turn in item.steps])
    return replace(item, steps=item.steps[: max(1, int((reached <= limit).sum()))])


def _timed(call: Callable[[], Any], times: int) -> dict[str, float]:
    wall, cpu = [], []
    for _ in range(times):
        begin, begin_cpu = time.perf_counter(), time.thread_time()
        call()
        wall.append(time.perf_counter() - begin)
        cpu.append(time.thread_time() - begin_cpu)
    return {"wall_s": median(wall), "cpu_s": median(cpu)}
