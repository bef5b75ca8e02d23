"""The replay buffer: verl's own, polled more often. It also turns a step's records into metrics and trace lines.

verl calls `sample` in the task runner for the step's batch, and logs the numbers that come back with it: the one way into W&B without a
patch. All GPUs wait until it returns, so metrics are computed from columns, and a thread writes trace lines during the trainer's update
(`traces.writer`). Only the last step of a run waits for its lines.

Polling costs time on the process that serves the workers: verl lists every key (0.2 s at 11,000). `poll_s` bounds that share.
"""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer, ReplayBufferAsync

from verl_heddle.options import Options
from verl_heddle.report.attribution import step_metrics, window_metrics, write_batch_wait
from verl_heddle.report.step_metrics import Trained, prediction_quality
from verl_heddle.traces.columns import Columns
from verl_heddle.traces.writer import FLUSH_S, TraceWriter
from verl_heddle.twin.choice import Choice
from verl_heddle.twin.process import Twin
from verl_heddle.verl_plugin import manager as agent_loops
from verl_heddle.verl_plugin.log import log, log_once
from verl_heddle.verl_plugin.settings import options_of
from verl_heddle.verl_plugin.stock import buffer_arguments

PREFIX = "heddle/"

POLL_SHARE = 0.05
"""Maximum share of time spent polling."""

MOST_POLL_S = 2.0
"""verl's own interval: never poll less often, unless the user asks for it."""


def poll_s(wanted_s: float, look_s: float) -> float:
    """Seconds between two polls, given that the last one took `look_s`."""
    return max(wanted_s, min(MOST_POLL_S, look_s / POLL_SHARE))


class _Watch:
    """Turns the workers' records into metrics and trace lines. Failures are counted, never raised."""

    def __init__(self, options: Options, fresh_steps: int = agent_loops.STALE_STEPS) -> None:
        self._options = options
        self._trained = Trained(fresh_steps)
        """For asynchronous trainers."""
        self._waiting = Columns()
        """Training trajectories collected by a validation step."""
        self._since_s: float | None = None
        """When the last batch of an asynchronous trainer was complete, unix time."""
        self._run = time.strftime("%Y%m%d-%H%M%S")
        self.failures = 0
        self._before: dict[str, Counter[str]] = {}
        self._twin = Twin(options.twin.budget_s, log_once) if options.judges else None
        self._choice = Choice() if options.chooses else None
        trace = options.trace
        self._writer: TraceWriter | None = None
        if trace.enable:
            path, size = os.path.join(trace.dir, "trace.jsonl"), int(trace.segment_mb * 1e6)
            self._writer = TraceWriter(path, size, lambda error: self._failed("trace lines", error))

    def step(self, global_step: int, partition_id: str, keys: Sequence[str] = ()) -> dict[str, float]:
        """Collect all records since the last call. Returns metrics of the training trajectories if `partition_id` is "train"; `keys`: the
        batch."""
        metrics: dict[str, float] = {}
        try:
            if agent_loops.MANAGER is not None:
                metrics = self._step(agent_loops.MANAGER, global_step, partition_id, keys)
        except Exception as error:
            self._failed("metrics", error)
        if partition_id == "train":
            metrics[PREFIX + "metrics_failures"] = self.failures
        return metrics

    def _step(self, manager: Any, global_step: int, partition_id: str, keys: Sequence[str]) -> dict[str, float]:
        records, counts = manager.collect()
        if manager.sync:
            write_batch_wait(records.metas)
        if self._writer is not None and len(records):
            self._writer.put(records, {"run": self._run, **self._engines(manager)})
        train = records.where(lambda head: not head.meta["validate"])
        if not manager.sync:
            self._waiting.extend(train)
        if partition_id != "train":
            return {}
        if manager.sync:
            metrics = step_metrics(train, list(manager.servers)) | prediction_quality(train) if len(train) else {}
        else:
            train, self._waiting = self._waiting, Columns()
            metrics = self._window(manager, global_step, train, keys)
        router = manager.step_ended(global_step, train)
        metrics |= {f"shape/{name}": value for name, value in manager.shaped(global_step).items()}
        metrics |= self._layout(manager)
        if self._twin is not None and manager.sync and len(train):
            metrics |= self._judge(self._twin, manager, global_step, train)
        for name in ("fit_s", "fit_rows"):
            if name in router:
                metrics[f"predict/{name}"] = router.pop(name)
        for name in [name for name in router if name.startswith(("place/", "residents/most_"))]:
            metrics[name] = router.pop(name)
        for name, count in self._news("router", Counter(router)).items():
            if name.startswith("failed_"):
                counts[f"policy_{name.removeprefix('failed_')}"] += int(router[name])
            else:
                metrics[name if name.startswith("residents/") else f"router/{name}"] = count
        if not self._options.observe:
            engines = manager.engine_counts()
            requests = engines.pop("requests", 0)
            if manager.sync:
                metrics["engines/requests_left"] = requests
            metrics |= {f"preempt/{name}": count for name, count in self._news("engines", engines).items()}
        tools = Counter({name: counts.pop(name) for name in list(counts) if name.startswith("tools/")})
        metrics |= self._news("tools", tools)
        warm = Counter({name: counts.pop(name) for name in list(counts) if name.startswith("prewarm/")})
        metrics |= {f"place/{name.replace('/', '_')}": count for name, count in self._news("prewarm", warm).items()}
        news = self._news("fallbacks", counts)
        metrics["fallbacks/total"] = sum(news.values())
        metrics |= {f"fallbacks/{name}": count for name, count in news.items()}
        return {PREFIX + name: float(value) for name, value in metrics.items()}

    def _judge(self, twin: Twin, manager: Any, global_step: int, train: Columns) -> dict[str, float]:
        """Have the twin judge the finished step, read its answer about an earlier one, and choose the next step's rule by it."""
        answer = twin.told()
        metrics = {f"twin/{name}": value for name, value in answer.items()} | {"twin/failures": twin.failures}
        twin.ask(global_step, train, self._engines(manager))
        if self._choice is not None:
            self._choice.ran(global_step)
            line = self._choice.judged(answer) if answer else None
            if line is not None:
                log(line)
                manager.rest(self._choice.rests)
            metrics |= {f"auto/{name}": value for name, value in self._choice.metrics().items()}
        return metrics

    def _window(self, manager: Any, global_step: int, train: Columns, keys: Sequence[str]) -> dict[str, float]:
        """Metrics of the window since the last batch of an asynchronous trainer."""
        now = time.time()
        since = self._since_s if self._since_s is not None else min((meta["start_s"] for meta in train.metas), default=now)
        seconds, self._since_s = max(now - since, 1e-9), now
        metrics = window_metrics(train, seconds, global_step) if len(train) else {"window_s": seconds}
        self._trained.ended(train)
        metrics |= self._trained.batch(keys, global_step, seconds)
        news = [self._news(f"seconds of {name}", Counter(spent)) for name, spent in manager.engine_seconds().items()]
        whole = max(seconds * len(news), 1e-9)
        return metrics | {f"engines/{name}_share": min(1.0, sum(of[name] for of in news) / whole) for name in ("busy", "paused")}

    def flush(self) -> None:
        """Wait until all trace lines are written, up to a deadline."""
        if self._writer is not None and not self._writer.flush():
            self._failed("trace lines", TimeoutError(f"not written after {FLUSH_S:g} s"))

    def _layout(self, manager: Any) -> dict[str, float]:
        """Metrics of the layout in the finished step; empty without `heddle.layout`."""
        if manager.layouts is None:
            return {}
        degrees = manager.layouts.layout
        now = {"replicas": len(degrees), "largest_tp": max(degrees), "smallest_tp": min(degrees), "static": manager.layouts.static}
        news = self._news("layout", Counter(manager.layouts.counts))
        return {f"layout/{name}": float(value) for name, value in {**now, **news, **manager.chooser.metrics}.items()}

    def _news(self, source: str, counts: Counter[str]) -> Counter[str]:
        """Increase of each count since the last step; a restarted source counts from 0."""
        before, self._before[source] = self._before.get(source, Counter()), counts.copy()
        return Counter({name: count - before[name] if count >= before[name] else count for name, count in counts.items()})

    def _engines(self, manager: Any) -> dict[str, Any]:
        """The engines' settings, recorded in the trace so that a reader can replay the step with others."""
        rollout = manager.config.actor_rollout_ref.rollout
        held = [replica.kv_tokens for replica in manager.fleet.values()]
        return {
            **self._options.decisions(manager.rests),
            "utilization": float(rollout.gpu_memory_utilization),
            "kv_tokens": min((tokens for tokens in held if tokens is not None), default=None),
            "tp": int(rollout.tensor_model_parallel_size),
            "slots": min((replica.slots for replica in manager.fleet.values()), default=rollout.max_num_seqs),
            "replicas": len(manager.servers),
            "order": str(rollout.get("scheduling_policy", "fcfs")),
            **({} if manager.sync else {"trainer_mode": str(manager.config.trainer.v1.trainer_mode)}),
            **({} if manager.layouts is None else {"layout": list(manager.layouts.layout)}),
        }

    def _failed(self, what: str, error: Exception) -> None:
        self.failures += 1
        log_once(f"{what} of a step are lost ({type(error).__name__}: {error})")


class _Heddle:
    """Mixin for one of verl's buffers."""

    def __init__(self, trainer_mode: str, sampler_kwargs: Any, **kwargs: Any) -> None:
        ours = sampler_kwargs["heddle"]
        options = options_of({"heddle": ours["options"]})
        arguments = buffer_arguments(trainer_mode, ours)
        super().__init__(
            trainer_mode=trainer_mode, sampler_kwargs=sampler_kwargs, poll_interval=options.poll_interval_s, **arguments, **kwargs
        )
        drops = trainer_mode != "sync" and self.max_off_policy_strategy == "drop"  # type: ignore[attr-defined]
        fresh_steps = (drops and self.max_off_policy_threshold) or agent_loops.STALE_STEPS  # type: ignore[attr-defined]
        self._watch, self._wanted_s = _Watch(options, fresh_steps), options.poll_interval_s

    def _sync_metadata_from_transfer_queue(self) -> None:
        began = time.monotonic()
        super()._sync_metadata_from_transfer_queue()  # type: ignore[misc]
        self.poll_interval = poll_s(self._wanted_s, time.monotonic() - began)

    def sample(self, global_steps: int, partition_id: str, batch_size: int) -> tuple[Any, dict]:
        batch, metrics = super().sample(global_steps, partition_id, batch_size)  # type: ignore[misc]
        metrics |= self._watch.step(global_steps, partition_id, getattr(batch, "keys", ()))
        if global_steps >= self._last_step():  # Ray may kill this process once verl returns
            self._watch.flush()
        return batch, metrics

    def _last_step(self) -> float:
        """Number of the run's last step, from verl's trainer (the owner of `refill_fn`); infinite if unknown."""
        trainer = getattr(self.refill_fn, "__self__", None)  # type: ignore[attr-defined]
        return getattr(trainer, "total_training_steps", None) or math.inf


class HeddleReplayBuffer(_Heddle, ReplayBuffer):
    """For `trainer_mode=sync`."""


class HeddleReplayBufferAsync(_Heddle, ReplayBufferAsync):
    """For the asynchronous modes."""


def heddle_sampler(trainer_mode: str, **kwargs: Any) -> Any:
    """The custom sampler class, as verl's config names it."""
    cls = HeddleReplayBuffer if trainer_mode == "sync" else HeddleReplayBufferAsync
    return cls(trainer_mode=trainer_mode, **kwargs)
